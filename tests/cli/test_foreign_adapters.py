"""Adapters of strangers, damaged or mistaken: refused with what is wrong, and nothing is registered."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from infra.settings import get_settings
from registry import AdapterRegistry
from tests.cli.conftest import Told, run_here
from tests.tiny_models import own_seed, save_tiny_llama, tiny_llama
from training.compression.steps import compress
from training.compression.stored import write_compressed
from training.interchange.as_lora import write_peft
from training.interchange.kohya import layers_to_kohya
from training.interchange.lora_layers import LoraLayer, fold
from training.interchange.mlx import layers_to_mlx

PLACES = [f"model.layers.{number}.self_attn.{kind}_proj" for number in (0, 1) for kind in "qo"]
KEY = f"base_model.model.{PLACES[0]}.lora_A.weight"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(regraft_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    get_settings.cache_clear()
    folder = save_tiny_llama(tmp_path_factory.mktemp("base"), seed=own_seed(__name__))
    other = save_tiny_llama(tmp_path_factory.mktemp("other"), seed=own_seed(__name__) + 1)
    for name, place in (("strangers-base", folder), ("strangers-other", other)):
        assert run_here("base", "add", f"path:{place}", "--name", name).code == 0
    return folder


@pytest.fixture
def layers() -> dict[str, LoraLayer]:
    draw = torch.Generator().manual_seed(0)
    return {
        place: LoraLayer(torch.randn(4, 32, generator=draw) / 9, torch.randn(32, 4, generator=draw) / 9, scale=2)
        for place in PLACES
    }


@pytest.fixture
def stranger(layers: dict[str, LoraLayer], tmp_path: Path) -> Path:
    write_peft(layers, tiny_llama(), tmp_path / "stranger")
    return tmp_path / "stranger"


def imported(path: Path, *options: str) -> Told:
    return run_here("import", str(path), "strangers", "--base", "strangers-base", *options)


def refused(path: Path, code: int, *told: str, options: tuple[str, ...] = ()) -> None:
    result = imported(path, *options)
    assert (result.code, result.out) == (code, ""), result.err
    assert all(part in result.err for part in (str(path), *told)), result.err
    assert result.err.count("\n") <= 2
    assert not AdapterRegistry().has_adapter("strangers")


def set_key(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change(folder: Path, changed: Callable[[Tensors], Tensors]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(changed(load_file(file)), file)


def test_a_sound_one_is_taken(base: Path, stranger: Path) -> None:
    told = run_here("import", str(stranger), "sound-stranger", "--base", "strangers-base", "--task", "navigate")
    assert (told.code, told.err) == (0, "")
    assert AdapterRegistry().get("sound-stranger").method == "lora"


@pytest.mark.parametrize(
    ("values", "code", "told"),
    [
        ({"r": "4"}, 2, "adapter_config.json: r: give a whole number"),
        ({"use_rslora": "x"}, 2, "adapter_config.json: use_rslora: give true or false"),
        ({"r": 10**12}, 5, "is stored at rank 4; the config says 1000000000000"),
        ({"task_type": "x"}, 5, "Invalid task type"),
        ({"monteclora_config": {"unheard": 1}}, 5, "peft cannot read its adapter_config.json"),
        ({"layer_replication": [[0, 9]]}, 5, "peft cannot put it on LlamaForCausalLM"),
    ],
)
def test_a_config_that_makes_no_sense(base: Path, stranger: Path, values: dict[str, Any], code: int, told: str) -> None:
    set_key(stranger, **values)
    refused(stranger, code, told)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda tensors: {key: tensor for key, tensor in tensors.items() if key != KEY}, f"{KEY} is missing"),
        (lambda tensors: tensors | {"extra": torch.ones(2)}, "extra is unknown"),
        (lambda tensors: {key: tensor.int() for key, tensor in tensors.items()}, "is of torch.int32"),
        (lambda tensors: tensors | {KEY: tensors[KEY] * torch.nan}, f"{KEY} has NaN or infinity in it"),
    ],
    ids=["missing", "extra", "whole numbers", "no numbers"],
)
def test_damaged_weights_are_not_blamed_on_the_base(
    base: Path, stranger: Path, changed: Callable[[Tensors], Tensors], told: str
) -> None:
    change(stranger, changed)
    refused(stranger, 5, told)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (KEY.replace("layers.0", "layers.7"), "has no layer model.layers.7.self_attn.q_proj"),
        ("base_model.model.transformer.h.0.attn.c_attn.ia3_l", "has no layer transformer.h.0.attn.c_attn"),
        (KEY.replace("q_proj", "o_proj"), "has 32 inputs, the adapter's 24"),
    ],
)
def test_layers_that_the_base_has_not_are_another_base_s(base: Path, stranger: Path, key: str, told: str) -> None:
    change(stranger, lambda tensors: tensors | {key: torch.ones(4, 24)})
    refused(stranger, 6, told, "Name the base model it was trained on")


def test_a_damaged_compressed_adapter_is_to_be_copied_again(base: Path, stranger: Path, tmp_path: Path) -> None:
    config, tensors = (
        json.loads((stranger / "adapter_config.json").read_text()),
        load_file(stranger / "adapter_model.safetensors"),
    )
    data = bytearray(compress(tensors, "groups:bits=8"))
    data[-1] ^= 1
    write_compressed(tmp_path / "damaged", config, "groups:bits=8", bytes(data))
    refused(tmp_path / "damaged", 5, "has changed since it was written", "Copy it again")
    write_compressed(tmp_path / "dense", config, "groups:bits=8", (stranger / "adapter_model.safetensors").read_bytes())
    refused(tmp_path / "dense", 5, "header of the compressed adapter", "Copy it again")
    (stranger / "adapter_model.safetensors").write_bytes(compress(tensors, "groups:bits=8"))
    refused(stranger, 5, "is missing", "copy it again")


@pytest.mark.parametrize("alpha", [1e308, 1e38])
def test_a_scale_beyond_float32_is_refused_in_every_format(
    base: Path, layers: dict[str, LoraLayer], stranger: Path, tmp_path: Path, alpha: float
) -> None:
    told = "gets an update beyond float32: its scale is"
    set_key(stranger, lora_alpha=alpha)
    refused(stranger, 5, told)

    config, tensors = layers_to_mlx(layers, tiny_llama())
    config["lora_parameters"]["scale"] = alpha / 4
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    refused(tmp_path / "mlx", 5, told)

    stored = layers_to_kohya(layers)
    dtype = torch.float32 if alpha < 1e300 else torch.float64
    huge = {key: torch.tensor(alpha, dtype=dtype) if key.endswith("alpha") else t for key, t in stored.items()}
    save_file(huge, tmp_path / "kohya.safetensors")
    refused(tmp_path / "kohya.safetensors", 5, told)


def test_a_base_that_is_named_and_registered_is_believed(base: Path, stranger: Path) -> None:
    other = AdapterRegistry().base_model("strangers-other").reference.removeprefix("path:")
    set_key(stranger, base_model_name_or_path=other)
    refused(stranger, 6, f"it was trained on {other}, which is registered as strangers-other", "--base strangers-other")
    set_key(stranger, base_model_name_or_path="somebody/unheard-of")
    told = run_here("import", str(stranger), "of-unheard-of", "--base", "strangers-base")
    assert (told.code, told.err) == (0, "")


def tuned(base: Path, layers: dict[str, LoraLayer], place: Path) -> Path:
    """A whole model: the base with a LoRA folded in."""
    shutil.copytree(base, place)
    model = LlamaForCausalLM.from_pretrained(base)
    fold(layers, model)
    model.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("changed", "code", "told"),
    [
        (lambda t: (t * 20).to(torch.int8), 2, "weights are quantised: lm_head.weight is of I8"),
        (lambda t: t + torch.nan, 5, "has NaN or infinity in it"),
        (lambda t: t + torch.inf, 5, "has NaN or infinity in it"),
    ],
    ids=["int8", "nan", "infinity"],
)
def test_a_whole_model_that_is_none(
    base: Path,
    layers: dict[str, LoraLayer],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    changed: Callable[[Tensor], Tensor],
    code: int,
    told: str,
) -> None:
    folder = tuned(base, layers, tmp_path / "tuned")
    tensors = load_file(folder / "model.safetensors")
    save_file({key: changed(t) for key, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, code, told, options=("--rank", "4"))
    assert "ERROR" not in "".join(capfd.readouterr())  # of the libraries that compute


def test_a_whole_model_of_another_base_or_too_much_of_it(
    base: Path, layers: dict[str, LoraLayer], tmp_path: Path
) -> None:
    folder = tuned(base, layers, tmp_path / "tuned")
    refused(folder, 2, "rank 33 is above that of every layer", "Lower --rank to 32", options=("--rank", "33"))
    other = run_here("import", str(folder), "strangers", "--base", "strangers-other", "--rank", "4")
    assert other.code == 6 and "it is not that model" in other.err
    assert not AdapterRegistry().has_adapter("strangers")
    assert run_here("import", str(folder), "of-tuned", "--base", "strangers-base", "--rank", "4").code == 0


def test_a_whole_model_that_is_cut_short_or_quantised_by_its_config(
    base: Path, layers: dict[str, LoraLayer], tmp_path: Path
) -> None:
    folder = tuned(base, layers, tmp_path / "tuned")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    refused(folder, 2, "its config.json has a quantization_config", options=("--rank", "4"))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    refused(folder, 5, "model.safetensors", options=("--rank", "4"))


def test_options_without_sense(base: Path, stranger: Path) -> None:
    assert "--energy 0 would keep nothing" in imported(stranger, "--energy", "0").err
    unknown = imported(stranger, "--task", "navigat")
    assert unknown.code == 3 and "Did you mean 'navigate'?" in unknown.err
    assert not AdapterRegistry().has_adapter("strangers")


def test_a_path_is_printed_as_it_is(base: Path, stranger: Path, tmp_path: Path) -> None:
    assert run_here("import", str(stranger), "shown", "--base", "strangers-base").code == 0
    place = tmp_path / "sp ace [bold]ü"
    told = run_here("export", "shown@1", str(place), width=400)
    assert told.out == f"shown@1 is in {place}\n"


@pytest.mark.parametrize("size", ["0", "0GB", "foo", "5", "-5GB"])
def test_a_shard_size_that_is_none(base: Path, stranger: Path, tmp_path: Path, size: str) -> None:
    run_here("import", str(stranger), "sharded", "--base", "strangers-base")
    told = run_here("export", "sharded", str(tmp_path / "model"), "--to", "merged", "--shard-size", size)
    assert (told.code, told.out) == (2, "") and "Write it like 5GB, 500MB or 40KB." in told.err
    assert not (tmp_path / "model").exists()


def test_an_export_s_rank_above_every_layer_s(base: Path, stranger: Path, tmp_path: Path) -> None:
    run_here("import", str(stranger), "ranked", "--base", "strangers-base")
    told = run_here("export", "ranked", str(tmp_path / "lora"), "--rank", "100000")
    assert told.code == 2 and "rank 100000 is above that of every layer: the largest has 32" in told.err
    assert not (tmp_path / "lora").exists()
