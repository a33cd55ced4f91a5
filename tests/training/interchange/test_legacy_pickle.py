"""peft's old adapter_model.bin: converted where it holds tensors, refused where it holds anything else."""

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from infra.errors import CorruptArtifact
from training.interchange.legacy_pickle import convert_pickle

TENSORS = {"base_model.model.q.lora_A.weight": torch.randn(2, 4), "base_model.model.q.lora_B.weight": torch.randn(4, 2)}


def folder(place: Path, content: Any, **options: Any) -> Path:
    place.mkdir()
    torch.save(content, place / "adapter_model.bin", **options)
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    return place


def refused(place: Path, told: str) -> None:
    with pytest.raises(CorruptArtifact, match=told):
        convert_pickle(place, place.parent / "converted")
    assert not (place.parent / "converted").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_its_tensors_are_kept_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    old = folder(tmp_path / "old", OrderedDict(tensors))
    convert_pickle(old, tmp_path / "converted")
    found = load_file(tmp_path / "converted" / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in tensors.items())
    assert sorted(file.name for file in (tmp_path / "converted").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


class Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def test_code_in_it_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for number, content in enumerate((Malicious(canary), {**TENSORS, "extra": Malicious(canary)})):
        refused(folder(tmp_path / f"old{number}", content), "it holds more than tensors: .*system")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "adapter_model.bin").write_bytes(pickle.dumps(Malicious(canary)))
    (bare / "adapter_config.json").write_text("{}")
    refused(bare, "no archive of torch's")
    assert not canary.exists()
    pickle.loads((bare / "adapter_model.bin").read_bytes())  # it would have, here
    assert canary.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([torch.ones(2)], "no mapping"),
        ({}, "no mapping"),
        ({"a": {"b": torch.ones(2)}}, "'a' is no dense tensor"),
        ({1: torch.ones(2)}, "1 is no dense tensor"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is no dense tensor"),
        ({"a": 3}, "'a' is no dense tensor"),
        ({"a": torch.ones(1).expand(1 << 40)}, "larger than the file"),
        ({"a": torch.ones(3, device="meta")}, "no plain tensor|damaged"),
    ],
    ids=str,
)
def test_anything_but_dense_tensors_by_name_is_refused(tmp_path: Path, content: Any, told: str) -> None:
    refused(folder(tmp_path / "old", content), told)


def test_a_damaged_or_compressed_archive_is_refused(tmp_path: Path) -> None:
    old = folder(tmp_path / "old", TENSORS)
    file = old / "adapter_model.bin"
    whole = file.read_bytes()
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        refused(old, "was not read")
    file.write_bytes(whole)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    refused(old, "it is compressed")
    file.unlink()
    torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    refused(old, "no archive of torch's")


def test_tensors_that_share_storage_are_separated(tmp_path: Path) -> None:
    both: Tensor = torch.randn(8, 4)
    convert_pickle(folder(tmp_path / "old", {"a": both[:4], "b": both[4:].T}), tmp_path / "converted")
    found = load_file(tmp_path / "converted" / "adapter_model.safetensors")
    assert torch.equal(found["a"], both[:4]) and torch.equal(found["b"], both[4:].T)


def test_a_damaged_one_is_to_be_copied_again_and_an_older_one_saved_again(tmp_path: Path) -> None:
    old = folder(tmp_path / "old", TENSORS)
    whole = (old / "adapter_model.bin").read_bytes()
    for content in (b"", whole[:-40], whole[: len(whole) // 2]):
        (old / "adapter_model.bin").write_bytes(content)
        with pytest.raises(CorruptArtifact, match="Copy it again"):
            convert_pickle(old, tmp_path / "converted")
    torch.save(TENSORS, old / "adapter_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CorruptArtifact, match="load it with the peft that wrote it"):
        convert_pickle(old, tmp_path / "converted")
