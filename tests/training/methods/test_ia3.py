"""(IA)³ against its equation, and its places on every family."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from infra.errors import InvalidInput
from tests.training.methods.backbones import BACKBONES, logits, train
from training.methods.contract import AttachContext
from training.methods.ia3 import METHOD, Ia3Config, places

PLACES = {
    "llama": ({"k_proj", "v_proj"}, {"down_proj"}),
    "gpt2": ({"c_attn"}, {"mlp.c_proj"}),
    "gemma3_text": ({"k_proj", "v_proj"}, {"down_proj"}),
    "bert": ({"key", "value"}, {"layer.0.output.dense", "layer.1.output.dense"}),
    "t5": ({"k", "v"}, {"wo"}),
    "vit": ({"k_proj", "v_proj"}, {"fc2"}),
}


@pytest.mark.parametrize("backbone", PLACES)
def test_keys_values_and_feed_forward_are_found(backbone: str) -> None:
    model = BACKBONES[backbone].build()
    outputs, inputs = places(model, Ia3Config())
    for found, expected in zip((outputs, inputs), PLACES[backbone], strict=True):
        assert all(name.endswith(tuple(f".{ending}" for ending in expected)) for name in found)
        assert all(any(name.endswith(f".{ending}") for name in found) for ending in expected)
    attentions = sum(
        "attention" in type(module).__name__.lower() and hasattr(module, "config") for module in model.modules()
    )
    assert len(outputs) == (1 if backbone == "gpt2" else 2) * (attentions or len(inputs))
    assert not any("attention.output" in name or "attn.c_proj" in name for name in inputs)


@pytest.mark.parametrize("backbone", PLACES)
def test_the_forward_pass_is_the_papers_equation(backbone: str) -> None:
    batch, build = BACKBONES[backbone].batch(), BACKBONES[backbone].build
    adapted = METHOD.attach(build(), Ia3Config(), AttachContext())
    train(adapted, batch, steps=3, rate=0.1)
    bare = build()
    outputs, inputs = places(bare, Ia3Config())
    for key, scale in adapted.tensors().items():
        name = key.removeprefix("base_model.model.").removesuffix(".ia3_l")
        _scale(bare.get_submodule(name), scale.flatten(), at_output=name in outputs)
    assert len(adapted.tensors()) == len(outputs) + len(inputs)
    expected = logits(bare, batch)
    assert_close(logits(adapted.model, batch), expected, atol=2e-5, rtol=1e-4)
    assert (expected - logits(build(), batch)).abs().max() > 1e-2


def _scale(layer: nn.Module, scale: torch.Tensor, at_output: bool) -> None:
    if at_output:
        layer.register_forward_hook(lambda module, arguments, output: output * scale)
    else:
        layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] * scale,))


def test_unknown_layer_names_ask_for_the_places() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match=r"which layers of Sequential are its targets") as error:
        METHOD.count(model, Ia3Config())
    assert "Linear modules: 0, 1" in error.value.remedy
    assert METHOD.count(model, Ia3Config(targets=("0",), feedforward=("1",))) == 4
