"""What a file or folder is, told by itself."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from infra.errors import CorruptArtifact, InvalidInput, NotFound, RegraftError
from training.interchange.formats import Format, read_config, recognise

ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("adapter_config.json", "adapter_model.safetensors"), Format.PEFT),
        (("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"), Format.PEFT),  # refused there
        (("adapter_config.json", "adapter_model.bin"), Format.PEFT_PICKLE),
        (("adapter_config.json", "adapters.safetensors", "0000100_adapters.safetensors"), Format.MLX),
        (("config.json", "model.safetensors"), Format.MODEL),
    ],
)
def test_folders_are_told_by_their_names(tmp_path: Path, names: tuple[str, ...], found: Format) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    assert recognise(tmp_path) == (found, tmp_path)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("lora_te_q.lora_down.weight", "lora_te_q.alpha"), Format.KOHYA),
        (("unet.q.lora_A.weight",), Format.DIFFUSERS),
        (("q.lora.down.weight",), Format.DIFFUSERS),
    ],
)
def test_files_are_told_by_their_tensors_alone_or_in_a_folder(
    tmp_path: Path, names: tuple[str, ...], found: Format
) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({name: ONE.clone() for name in names}, file)
    assert recognise(file) == recognise(tmp_path) == (found, file)


def test_anything_else_is_told_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        recognise(tmp_path / "nowhere")
    for place in (tmp_path, tmp_path / "weights.pt", tmp_path / "weights.safetensors"):
        if place.suffix:
            place.write_bytes(save({"weight": ONE}))
        with pytest.raises(InvalidInput) as error:
            recognise(place)
        assert "Known are: a peft folder" in error.value.remedy


@given(st.binary(max_size=200), st.integers(0, 200))
def test_a_cut_or_changed_file_is_recognised_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    whole = save({"lora_te_q.lora_down.weight": ONE, "lora_te_q.lora_up.weight": ONE.clone()})
    for content in (noise, whole[:at], whole[:at] + noise + whole[at:]):
        file.write_bytes(content)
        if content == whole:
            continue
        with pytest.raises(RegraftError):
            recognise(file)
            raise CorruptArtifact("an unlucky change that is a sound file all the same")


def test_a_config_is_a_bounded_json_object(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    for content in (b"[1]", b"{", b"\xff", b"[" * 100_000, b" " * ((16 << 20) + 1)):
        file.write_bytes(content)
        with pytest.raises(CorruptArtifact):
            read_config(file)
    file.write_text(json.dumps({"a": 1}))
    assert read_config(file) == {"a": 1}


def test_half_of_an_mlx_adapter_is_told_what_it_lacks(tmp_path: Path) -> None:
    save_file({"model.layers.0.self_attn.q_proj.lora_a": ONE}, tmp_path / "adapters.safetensors")
    for place in (tmp_path, tmp_path / "adapters.safetensors"):
        with pytest.raises(InvalidInput, match=r"stand in the adapter_config\.json beside it"):
            recognise(place)
