"""Adapter directories: what is written, what is believed, and what is refused."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import BaseModelMismatch, Conflict, CorruptArtifact, InvalidInput, NotFound
from tests.tiny_models import tiny_llama, tiny_tokenizer
from tests.training.methods.backbones import BACKBONES, logits, train
from tests.training.methods.test_contract import CASES
from training import adapter_files
from training.adapter_files import attach_stored, read_adapter, write_adapter
from training.methods.catalog import CATALOG, get_method
from training.methods.contract import Adapted, AttachContext
from training.methods.peft_method import PeftMethod

BATCH = BACKBONES["llama"].batch()
IDENTITY, OTHER = "5f3c" + "0" * 58 + "a1", "88d0" + "0" * 58 + "42"
OPTIONS = {case.method: case.options for case in reversed(CASES)}
RECIPE = {"adapter": "counting", "method": {"name": "lora", "rank": 2}}


def trained(method: str = "lora") -> Adapted:
    calibration = BACKBONES["llama"].calibration
    context = AttachContext(processor=tiny_tokenizer(), calibration=calibration, total_steps=10)
    adapted = get_method(method).attach(tiny_llama(), get_method(method).config_type(**OPTIONS[method]), context)
    train(adapted, BATCH)
    return adapted


def write(directory: Path, adapted: Adapted, method: str = "lora") -> None:
    write_adapter(directory, adapted.save, method, IDENTITY, "hf:tiny/llama", RECIPE, {"loss": 0.5})


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Adapted]:
    adapted = trained()
    write(tmp_path / "counting", adapted)
    return tmp_path / "counting", adapted


def test_what_is_written_is_read_back(stored: tuple[Path, Adapted]) -> None:
    directory, adapted = stored
    assert {file.name for file in directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "regraft.json",
    }
    found = read_adapter(directory)
    assert (found.method, found.base_identity, found.recipe, found.metrics) == ("lora", IDENTITY, RECIPE, {"loss": 0.5})
    assert found.base and found.base.reference == "hf:tiny/llama"
    assert found.versions["peft"] == peft.__version__
    assert {name: line.shape for name, line in found.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in adapted.tensors().items()
    }
    assert json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny/llama"
    assert [path.name for path in directory.parent.iterdir()] == ["counting"]  # nothing temporary is left


@pytest.mark.parametrize("method", CATALOG)
def test_every_method_comes_back_through_its_directory(tmp_path: Path, method: str) -> None:
    adapted = trained(method)
    write(tmp_path / "adapter", adapted, method)
    back = attach_stored(tiny_llama(), tmp_path / "adapter", base_identity=IDENTITY, name="counting@3")
    assert torch.equal(logits(back.model, BATCH), logits(adapted.model, BATCH))


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write(tmp_path / name, trained())
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_another_base_model_is_refused_by_both_names(stored: tuple[Path, Adapted]) -> None:
    model = tiny_llama()
    with pytest.raises(BaseModelMismatch, match=r"hf:tiny/llama \(identity 5f3c…a1\).*identity 88d0…42"):
        attach_stored(model, stored[0], base_identity=OTHER)
    assert not hasattr(model, "peft_config")
    attach_stored(model, stored[0], base_identity=None)  # not known, not checked


def test_a_directory_of_peft_is_attached_by_its_type(tmp_path: Path) -> None:
    for method in CATALOG:
        if isinstance(get_method(method), PeftMethod) and method != "ist":  # which leaves a plain LoRA
            adapted = trained(method)
            adapted.model.save_pretrained(tmp_path / method)
            assert read_adapter(tmp_path / method).is_foreign
            assert read_adapter(tmp_path / method).method == method
            back = attach_stored(tiny_llama(), tmp_path / method, base_identity=IDENTITY)
            assert torch.allclose(logits(back.model, BATCH), logits(adapted.model, BATCH), atol=1e-6)
    peft.get_peft_model(tiny_llama(), peft.PveraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "pvera")
    with pytest.raises(InvalidInput, match="'PVERA'"):
        read_adapter(tmp_path / "pvera")


def test_a_pickle_is_refused_unopened(stored: tuple[Path, Adapted]) -> None:
    directory, _ = stored
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    (directory / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CorruptArtifact, match=r"adapter_model\.bin is a pickle") as error:
        attach_stored(tiny_llama(), directory, base_identity=IDENTITY)
    assert "regraft import" in error.value.remedy


def test_a_truncated_file_is_refused(stored: tuple[Path, Adapted]) -> None:
    path = stored[0] / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptArtifact, match="not a whole safetensors file"):
            attach_stored(tiny_llama(), stored[0], base_identity=IDENTITY)


def test_a_flipped_bit_is_found_and_named(stored: tuple[Path, Adapted]) -> None:
    path = stored[0] / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    last = max(load_file(path))
    model = tiny_llama()
    with pytest.raises(CorruptArtifact, match=f"{last} differ from the manifest"):
        attach_stored(model, stored[0], base_identity=IDENTITY)
    assert not hasattr(model, "peft_config")


def test_a_tensor_too_many_or_too_few_is_found(stored: tuple[Path, Adapted]) -> None:
    path = stored[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"stranger": torch.ones(1)}, path)
    with pytest.raises(CorruptArtifact, match="stranger"):
        attach_stored(tiny_llama(), stored[0], base_identity=IDENTITY)
    removed = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != removed}, path)
    with pytest.raises(CorruptArtifact, match=removed):
        attach_stored(tiny_llama(), stored[0], base_identity=IDENTITY)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", CorruptArtifact),
        ("[]", CorruptArtifact),
        ('{"format": 1}', CorruptArtifact),
        ('{"format": 1, "method": "lora"}', CorruptArtifact),
        ('{"format": 2, "method": "lora"}', InvalidInput),
    ],
)
def test_details_that_cannot_be_read_are_refused(
    stored: tuple[Path, Adapted], content: str, error: type[Exception]
) -> None:
    (stored[0] / "regraft.json").write_text(content)
    with pytest.raises(error, match=r"regraft\.json"):
        read_adapter(stored[0])


def test_what_is_not_an_adapter_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(CorruptArtifact, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CorruptArtifact, match="not JSON"):
        read_adapter(tmp_path)


def test_nothing_is_overwritten(stored: tuple[Path, Adapted]) -> None:
    before = (stored[0] / "regraft.json").read_bytes()
    with pytest.raises(Conflict, match="exists and is not"):
        write(stored[0], stored[1])
    assert (stored[0] / "regraft.json").read_bytes() == before


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_files, "_flush", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "counting", trained())
    assert list(tmp_path.iterdir()) == []
