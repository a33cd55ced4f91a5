"""SSF against its equation, its merging on every kind of layer, and the planted shift that it must undo."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.pytorch_utils import Conv1D

from tests.tiny_models import tiny_llama
from tests.training.methods.backbones import BACKBONES, loss
from training.methods.contract import AttachContext
from training.methods.injected import AdapterLayer, fold
from training.methods.ssf import METHOD, SsfConfig, SsfSlot, adds_one, outputs, shifts

KINDS = {
    "linear": (nn.Linear(6, 4), (2, 3, 6), True),
    "linear without bias": (nn.Linear(6, 4, bias=False), (2, 3, 6), True),
    "conv1d of gpt2": (Conv1D(4, 6), (2, 3, 6), True),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 6), True),  # width = channels of the output
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (2, 4, 4, 4), True),
    "layer norm": (nn.LayerNorm(6), (2, 3, 6), True),
    "layer norm without bias": (nn.LayerNorm(6, bias=False), (2, 3, 6), True),
    "rms norm": (nn.RMSNorm(6), (2, 3, 6), False),
    "rms norm with 1 + w": (Gemma3RMSNorm(6), (2, 3, 6), False),
}


@pytest.mark.parametrize(("layer", "size", "shifted"), KINDS.values(), ids=KINDS)
def test_a_layer_is_scaled_by_channel_and_folds_exactly(layer: nn.Module, size: tuple[int, ...], shifted: bool) -> None:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter)
    slot = SsfSlot(layer, shifts(layer, SsfConfig()))
    for parameter in slot.parameters():
        parameter.data = torch.randn_like(parameter)
    assert (slot.offset is not None) is shifted
    x = torch.randn(size)
    y = layer(x)
    channel = 1 if y.ndim == 4 else -1
    expected = [part * g for part, g in zip(y.unbind(channel), slot.scale, strict=True)]
    if shifted:
        expected = [part + b for part, b in zip(expected, slot.offset, strict=True)]
    expected = torch.stack(expected, channel)
    assert_close(slot(layer, x), expected)
    model = nn.Module()
    model.place = AdapterLayer(layer)
    model.place.slots["default"] = slot
    fold(model, "place", "default")
    assert_close(model.place.base_layer(x), expected, atol=1e-5, rtol=1e-5)


def test_only_gemma_s_norm_adds_one() -> None:
    assert adds_one(Gemma3RMSNorm(6))
    assert not any(adds_one(layer) for layer in (nn.RMSNorm(6), nn.LayerNorm(6), nn.Linear(6, 6), Conv1D(4, 6)))


def test_the_gradients_are_the_sums_over_all_positions() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(2, 4, 5)
    slot, g = SsfSlot(layer, True), torch.randn(2, 4, 3)
    (slot(layer, x) * g).sum().backward()
    assert_close(slot.scale.grad, (layer(x) * g).sum((0, 1)))
    assert_close(slot.offset.grad, g.sum((0, 1)))


def test_the_start_is_drawn_around_identity() -> None:
    slots = METHOD.attach(tiny_llama(), SsfConfig(init_std=0.1), AttachContext()).slots().values()
    scale = torch.cat([slot.scale for slot in slots])
    offset = torch.cat([slot.offset for slot in slots if slot.offset is not None])
    assert scale.mean().item() == pytest.approx(1, abs=0.02) and scale.std().item() == pytest.approx(0.1, rel=0.1)
    assert offset.mean().item() == pytest.approx(0, abs=0.02) and offset.std().item() == pytest.approx(0.1, rel=0.1)


def test_the_count_on_vit_base_is_the_papers() -> None:
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=100))
    config = SsfConfig(exclude=("classifier",))
    per_layer = {name: outputs(model.get_submodule(name)) for name in METHOD.places(model, config)}
    assert 2 * sum(per_layer.values()) == 205_824


def test_weight_decay_and_merging_without_a_shift() -> None:
    adapted = METHOD.attach(tiny_llama(), SsfConfig(shift=False), AttachContext())
    optimiser = adapted.optimizer(1e-2, 0.5)
    assert {group["weight_decay"] for group in optimiser.param_groups} == {0.0}
    loss(adapted.model, BACKBONES["llama"].batch()).backward()
    optimiser.step()
    assert adapted.merge().state_dict().keys() == tiny_llama().state_dict().keys()


def test_a_planted_shift_is_undone_by_scale_and_shift_together_only() -> None:
    torch.manual_seed(0)
    first, second, x = nn.Linear(4, 8), nn.Linear(8, 2), torch.randn(256, 4)
    target = second(torch.tanh(first(x))).detach()
    a, c = torch.empty(8).uniform_(0.3, 3), torch.randn(8)
    with torch.no_grad():  # the frozen layer is corrupted: y ← a ⊙ y + c
        first.weight.mul_(a[:, None])
        first.bias.mul_(a).add_(c)
    reached = {}
    for kind in ("both", "scale", "offset"):
        slot = SsfSlot(first, True)
        trained = list(slot.parameters()) if kind == "both" else [getattr(slot, kind)]
        optimiser = torch.optim.Adam(trained, lr=0.03)
        for _ in range(600):
            optimiser.zero_grad()
            error = (second(torch.tanh(slot(first, x))) - target).pow(2).mean()
            error.backward()
            optimiser.step()
        reached[kind] = error.item()
    assert reached["both"] < 1e-4 < 10 * reached["both"] + 1e-4 < min(reached["scale"], reached["offset"])
