"""Layers of LoRA's kind, computed by kernels while they train: the same function, and nothing left behind."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from tests.tiny_models import PAD, tiny_gpt2, tiny_llama
from tests.training.tiny_training import EXAMPLES, OPTIONS, copied, fresh, run, same_bits
from training.data.batching import Padding
from training.fused_layers import fused_layers
from training.methods.catalog import get_method
from training.methods.contract import Adapted, AttachContext
from training.methods.peft_method import PeftAdapted

LAYERS = 14  # of a tiny Llama: seven in each of two blocks
BATCH = Padding(PAD)(EXAMPLES[:4])
METHODS = [
    ("lora", {"rank": 4, "dropout": 0.0}),
    ("lora", {"rank": 4, "dropout": 0.2}),
    ("rslora", {"rank": 4}),
    ("dora", {"rank": 4, "dropout": 0.0}),
    ("dora", {"rank": 4, "dropout": 0.2}),
    ("pissa", {"rank": 4}),
    ("pissa", {"rank": 4, "dropout": 0.2}),
]


def fused(output: torch.Tensor) -> int:
    """How many layers of a graph were computed by the kernels' formulas."""
    seen: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        step = waiting.pop()
        if step is not None and step not in seen:
            seen.add(step)
            waiting += [before for before, _ in step.next_functions]
    return sum("_InPytorch" in step.name() for step in seen)


def loss(adapted: Adapted) -> torch.Tensor:
    torch.manual_seed(0)
    return adapted.model(**BATCH).loss


@pytest.mark.parametrize(
    ("method", "config", "change"),
    [
        *((method, config, {}) for method, config in METHODS),
        ("lora", {"rank": 4, "dropout": 0.2}, {"gradient_checkpointing": True}),
        ("dora", {"rank": 4, "dropout": 0.2}, {"gradient_checkpointing": True}),
        ("lora", {"rank": 4, "dropout": 0.0}, {"packing": True, "max_length": 24}),
    ],
)
def test_training_comes_to_the_same_losses_and_tensors_as_without(
    tmp_path: Path, method: str, config: dict[str, Any], change: dict[str, Any]
) -> None:
    options = OPTIONS.model_copy(update={"steps": 8, **change})
    found = {
        kernels: run(tmp_path / kernels, options.model_copy(update={"kernels": kernels}), fresh(method, **config))
        for kernels in ("on", "off")
    }
    (ours, our_losses), (usual, usual_losses) = found["on"], found["off"]
    assert [loss for _, loss in our_losses.losses] == pytest.approx([loss for _, loss in usual_losses.losses], abs=2e-5)
    for name, tensor in ours.tensors().items():
        torch.testing.assert_close(tensor, usual.tensors()[name], atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize(("method", "config"), METHODS)
def test_every_layer_is_computed_by_the_kernels_as_long_as_it_is_asked_for(method: str, config: dict[str, Any]) -> None:
    adapted = fresh(method, **config)
    adapted.model.train()
    expected = loss(adapted)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in adapted.trainable().items()}
    adapted.model.zero_grad()
    with fused_layers(adapted, "on"):
        found = loss(adapted)
        found.backward()
    assert fused(found) == (0 if (method, config.get("dropout")) == ("pissa", 0.2) else LAYERS)
    torch.testing.assert_close(found, expected)
    for name, parameter in adapted.trainable().items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)
    assert fused(loss(adapted)) == 0
    assert not any("forward" in vars(module) for module in adapted.model.modules())


def test_layers_that_store_their_weight_transposed_and_have_a_bias_are_fused_too() -> None:
    method = get_method("lora")
    adapted = method.attach(tiny_gpt2(), method.config_type(rank=3), AttachContext(seed=0))
    expected = loss(adapted)
    with fused_layers(adapted, "on"):
        found = loss(adapted)
    assert fused(found) == 8
    torch.testing.assert_close(found, expected)


def test_a_base_in_bfloat16_is_fused_under_autocast_and_gives_what_peft_gives_up_to_rounding() -> None:
    adapted = fresh(dtype=torch.bfloat16, dropout=0.0)
    for parameter in adapted.trainable().values():
        nn.init.normal_(parameter, std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss(adapted)
        with fused_layers(adapted, "auto"):
            found = loss(adapted)
    assert fused(found) == LAYERS
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_by_itself_it_is_used_where_it_was_measured_to_be_faster() -> None:
    for method, config, expected in (
        ("lora", {"dropout": 0.0}, LAYERS),
        ("lora", {"dropout": 0.2}, 0),
        ("dora", {"dropout": 0.2}, LAYERS),
    ):
        adapted = fresh(method, **config)
        adapted.model.train()
        with fused_layers(adapted, "auto"):
            assert fused(loss(adapted)) == expected, (method, config)
        with fused_layers(adapted, "off"):
            assert fused(loss(adapted)) == 0


def test_a_float32_base_under_autocast_is_left_to_peft() -> None:
    adapted = fresh(dropout=0.0)
    with torch.autocast("cpu", torch.bfloat16), fused_layers(adapted, "on"):
        assert fused(loss(adapted)) == 0


def test_an_adapter_that_is_switched_off_or_merged_is_left_to_peft() -> None:
    adapted = fresh(dropout=0.0)
    for parameter in adapted.trainable().values():
        nn.init.normal_(parameter, std=0.1)
    with adapted.disabled():
        without = loss(adapted)
    merged_model = adapted.merge()
    with fused_layers(adapted, "on"):
        adapted_loss = loss(adapted)
        with adapted.disabled():
            torch.testing.assert_close(loss(adapted), without, rtol=0, atol=0)
        adapted.model.merge_adapter()
        merged = loss(adapted)
        adapted.model.unmerge_adapter()
        assert fused(merged) == 0
        torch.testing.assert_close(merged, adapted_loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged_model(**BATCH).loss, adapted_loss, rtol=1e-4, atol=1e-5)


def strange(kind: str) -> Adapted:
    """An adapter that computes more than the kernels know, at one layer or at all."""
    model = tiny_llama()
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_bias=kind == "bias of B")
    wrapped = peft.get_peft_model(model, lora)
    adapted = PeftAdapted(wrapped, "default")
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    if kind == "a base that trains":
        layer.base_layer.weight.requires_grad_(True)
    elif kind == "a listener":
        layer.base_layer.register_forward_hook(lambda module, inputs, output: output + 1)
    elif kind == "a forward of its own":
        layer.forward = layer.forward
    elif kind == "another kind of linear layer":
        layer.base_layer.__class__ = type("Strange", (nn.Linear,), {})
    elif kind == "another module for A":
        layer.lora_A["default"] = type("Strange", (nn.Linear,), {})(32, 4, bias=False)
    return adapted


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("nothing", 0),
        ("bias of B", LAYERS),
        ("a base that trains", 1),
        ("a listener", 1),
        ("a forward of its own", 1),
        ("another kind of linear layer", 1),
        ("another module for A", 1),
    ],
)
def test_what_computes_more_than_a_low_rank_update_of_a_frozen_layer_is_left_to_peft(kind: str, left: int) -> None:
    adapted = strange(kind)
    expected = loss(adapted)
    with fused_layers(adapted, "on"):
        found = loss(adapted)
    assert fused(found) == LAYERS - left
    torch.testing.assert_close(found, expected)


def test_the_same_training_comes_out_the_same_bit_for_bit(tmp_path: Path) -> None:
    options = OPTIONS.model_copy(update={"steps": 6, "kernels": "on"})
    first, second = (copied(run(tmp_path / number, options, fresh("dora", rank=4))[0]) for number in "12")
    assert same_bits(first, second)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_quantised_training_sees_the_quantised_factors(tmp_path: Path, method: str) -> None:
    options = OPTIONS.model_copy(update={"steps": 6, "adapter_bits": 2})
    found = [
        run(tmp_path / kernels, options.model_copy(update={"kernels": kernels}), fresh(method, rank=4, dropout=0.0))
        for kernels in ("on", "off")
    ]
    ours, usual = ([loss for _, loss in outcome.losses] for _, outcome in found)
    assert ours == pytest.approx(usual, abs=1e-4)
