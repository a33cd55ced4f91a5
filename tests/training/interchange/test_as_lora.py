"""Any adapter as a LoRA of a rank, in stock peft's hands, with the loss that NumPy finds too."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.conversion import convert_to_lora

from infra.errors import InvalidInput, NotMergeable
from tests.tiny_models import tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, train
from tests.training.methods.test_contract import CASES
from training.interchange.as_lora import lora_layers, lora_layers_at, write_peft
from training.interchange.lora_layers import LoraLayer, fold, layers_from_peft
from training.interchange.weight_changes import base_tensors, parameters_of
from training.methods.catalog import get_method
from training.methods.contract import Adapted, AttachContext
from training.methods.peft_method import bare
from training.methods.targets import ALL_LINEAR

OPTIONS = {case.method: case.options for case in reversed(CASES)}
BATCH = BACKBONES["llama"].batch()
MAKE = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def trained(name: str, backbone: str = "llama", **options: object) -> Adapted:
    method = get_method(name)
    context = AttachContext(calibration=BACKBONES[backbone].calibration, total_steps=10)
    adapted = method.attach(BACKBONES[backbone].build(), method.config_type(**OPTIONS[name] | options), context)
    train(adapted, BATCH)
    return adapted


@pytest.mark.parametrize(
    ("name", "backbone"),
    [("lora", "llama"), ("rslora", "gpt2"), ("dora", "llama"), ("oft", "llama"), ("paca", "llama"), ("s2ft", "gpt2")],
)
def test_at_full_rank_nothing_is_lost(tmp_path: Path, name: str, backbone: str) -> None:
    adapted = trained(name, backbone)
    layers, loss = lora_layers_at(adapted, 32)
    assert loss.total < 1e-6
    write_peft(layers, bare(adapted.model), tmp_path / "lora")
    stock = PeftModel.from_pretrained(MAKE[backbone](), tmp_path / "lora")
    torch.testing.assert_close(logits(stock, BATCH), logits(adapted.model, BATCH), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "backbone"), [("dora", "llama"), ("dora", "gpt2"), ("lora", "llama"), ("loha", "llama")]
)
def test_the_loss_is_that_of_the_best_approximation(name: str, backbone: str) -> None:
    adapted = trained(name, backbone, rank=6) if name == "lora" else trained(name, backbone)
    layers, loss = lora_layers_at(adapted, 2)
    before, after = base_tensors(adapted), parameters_of(adapted.merge())
    assert {layer.rank for layer in layers.values()} == {2}
    for place, lost in loss.layers.items():
        update = (after[f"{place}.weight"].double() - before[f"{place}.weight"].double()).numpy()
        singular = np.linalg.svd(update, compute_uv=False)
        assert lost == pytest.approx(np.linalg.norm(singular[2:]) / np.linalg.norm(singular), abs=1e-4)
    assert 0 < loss.total < 1


def test_it_is_the_lora_that_peft_s_own_conversion_finds() -> None:
    adapted = trained("loha")
    config, tensors = convert_to_lora(adapted.model, 4, compile_kwargs=None)
    written = json.loads(json.dumps({**config.to_dict(), "peft_type": "LORA"}, default=sorted))
    theirs = layers_from_peft(written, tensors)
    ours, _ = lora_layers_at(adapted, 4)
    assert theirs.keys() == ours.keys()
    for place, layer in ours.items():
        torch.testing.assert_close(theirs[place].update(), layer.update(), atol=1e-4, rtol=1e-3)


def test_more_rank_loses_less() -> None:
    adapted = trained("dora")
    losses = [lora_layers_at(adapted, rank)[1].total for rank in (1, 2, 4, 8, 16)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.2


@pytest.mark.parametrize("name", ["full", "lisa", "galore"])
def test_a_trained_base_is_refused_with_a_way_that_is_open_to_it(name: str) -> None:
    adapted = trained(name)
    with pytest.raises(InvalidInput, match=r"No LoRA can say what it does to .*norm.*\n.*regraft import --rank R"):
        lora_layers_at(adapted, 8)
    with pytest.raises(
        InvalidInput, match=r"the base's own weights\.\nExport it --to merged; .*regraft import --rank R"
    ):
        lora_layers(adapted)
    with pytest.raises(InvalidInput, match=r"rank 33 .*\nLower --rank to 32"):
        lora_layers_at(adapted, 33)


@pytest.mark.parametrize(
    ("name", "options", "kind", "told"),
    [
        ("ln-tuning", {}, InvalidInput, "layernorm"),
        ("hydra", {"bias": True}, InvalidInput, r"\.bias"),
        ("ssf", {}, InvalidInput, "No LoRA can say"),
        ("prompt-tuning", {}, NotMergeable, "cannot be merged"),
        ("compacter", {}, NotMergeable, "cannot be merged"),
    ],
)
def test_what_is_no_weight_of_a_linear_layer_is_refused(
    name: str, options: dict[str, object], kind: type[Exception], told: str
) -> None:
    with pytest.raises(kind, match=told):
        lora_layers_at(trained(name, **options), 8)


def test_layers_that_share_a_factor_are_written_apart(tmp_path: Path) -> None:
    A, B = torch.ones(2, 32), torch.ones(32, 2)
    layers = {f"model.layers.{n}.self_attn.q_proj": LoraLayer(A, B) for n in (0, 1)}
    write_peft(layers, tiny_llama(), tmp_path / "lora")
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")


@pytest.mark.parametrize("name", ["lora", "rslora", "paca", "vera"])
def test_what_is_of_low_rank_is_given_exactly(name: str) -> None:
    adapted, folded = trained(name), tiny_llama()
    fold(lora_layers(adapted), folded)
    torch.testing.assert_close(logits(folded, BATCH), logits(adapted.model, BATCH), atol=5e-5, rtol=1e-4)


def test_a_fresh_adapter_changes_nothing_and_is_refused() -> None:
    method = get_method("lora")
    adapted = method.attach(tiny_llama(), method.config_type(targets=ALL_LINEAR), AttachContext())
    with pytest.raises(InvalidInput, match="changes no weight"):
        lora_layers_at(adapted, 4)
