"""LoRA-SB, and the gradients that it starts from, against loops written out by hand."""

from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from infra.errors import InvalidInput
from tests.tiny_models import tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, train
from tests.training.methods.one_layer import OneLayer
from tests.training.methods.plain_lora import plain_lora
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.starts import StartCache
from training.methods.targets import linear_modules

KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "vit"])


def attached(model: nn.Module, batches: Any, steps: int | None = 10, starts: Any = None, **chosen: Any) -> Any:
    method = get_method("lora-sb")
    config = method.config_type(**{"rank": 3, "learning_rate": 0.01, **chosen})
    context = AttachContext(calibration=lambda: batches, total_steps=steps, starts=starts)
    return method.attach(model, config, context)


def summed(model: nn.Module, batches: list[dict[str, Tensor]], limit: int = 100) -> dict[str, Tensor]:
    """The gradient of every linear layer's W [m, n], summed over samples in a plain loop."""
    rows = [{name: t[i : i + 1] for name, t in batch.items()} for batch in batches for i in range(len(batch["labels"]))]
    for row in rows[:limit]:
        model(**row).loss.backward()
    found = {}
    for name, layer in linear_modules(model).items():
        gradient: Any = layer.weight.grad
        found[name] = gradient if isinstance(layer, nn.Linear) else gradient.T
    return found


@KINDS
@pytest.mark.parametrize("limit", [3, 50])
def test_the_start_is_the_best_approximation_of_the_first_update(kind: str, limit: int) -> None:
    backbone = BACKBONES[kind]
    adapted = attached(backbone.build(), backbone.calibration(), samples=limit)
    gradients, left_out = summed(backbone.build(), backbone.calibration(), limit), 0.0
    for name, slot in adapted.slots().items():
        step = -0.01 * torch.sign(gradients[name]).double().numpy()
        S = np.linalg.svd(step, compute_uv=False)
        A, B, R = (t.detach().double().numpy() for t in (slot.A, slot.B, slot.R))
        assert_close(A @ A.T, np.eye(3), atol=1e-5, rtol=0)
        assert_close(B.T @ B, np.eye(3), atol=1e-5, rtol=0)
        assert_close(R, np.diag(S[:3]), atol=1e-6, rtol=1e-4)
        error = np.linalg.norm(step - B @ R @ A)
        assert error == pytest.approx(sqrt((S[3:] ** 2).sum()), rel=1e-4, abs=1e-6)
        left_out = max(left_out, error)
    assert left_out > 0.1


def test_the_export_is_a_plain_lora_before_and_after_training() -> None:
    backbone = BACKBONES["gpt2"]
    adapted = attached(backbone.build(), backbone.calibration(), alpha=6)
    for steps in (0, 2):
        train(adapted, backbone.batch(), steps=steps)
        stock = plain_lora(backbone.build(), adapted)
        assert_close(logits(stock, backbone.batch()), logits(adapted.model, backbone.batch()), atol=1e-5, rtol=1e-5)
    bare = logits(backbone.build(), backbone.batch())
    assert (logits(adapted.model, backbone.batch()) - bare).abs().max() > 1e-2


def test_the_first_step_lowers_the_loss_of_its_own_samples() -> None:
    backbone = BACKBONES["llama"]
    batches = backbone.calibration()
    adapted = attached(backbone.build(), batches, learning_rate=1e-3)
    bare = backbone.build()
    assert sum(adapted.model(**b).loss for b in batches) < sum(bare(**b).loss for b in batches) - 1e-3


def test_a_step_of_r_is_the_projection_of_a_full_step() -> None:
    G, W = (torch.randn(12, 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    x = torch.randn(64, 9, generator=torch.Generator().manual_seed(2))
    model = OneLayer(W)
    adapted = attached(model, [{"x": x, "labels": x @ (W + G).T}], alpha=6)
    slot: Any = adapted.slots()["layer"]
    labels = torch.randn(64, 12, generator=torch.Generator().manual_seed(3))
    adapted.model(x, labels).loss.backward()
    effective = (W + 2.0 * slot.B @ slot.R.detach() @ slot.A).requires_grad_()
    functional.mse_loss(x @ effective.T, labels).backward()
    full: Any = effective.grad
    assert_close(slot.R.grad, 2.0 * slot.B.T @ full @ slot.A.T, atol=1e-5, rtol=1e-4)
    projected = 4.0 * (slot.B @ slot.B.T) @ full @ (slot.A.T @ slot.A)
    assert_close(2.0 * slot.B @ slot.R.grad @ slot.A, projected, atol=1e-5, rtol=1e-4)


def test_the_scale_makes_no_difference() -> None:
    """SGD whose rate is over s², the same weights after every step."""
    backbone = BACKBONES["llama"]
    trajectories = []
    for alpha, scale in ((3, 1.0), (12, 4.0)):
        adapted = attached(backbone.build(), backbone.calibration(), alpha=alpha)
        optimiser = torch.optim.SGD(adapted.trainable().values(), lr=0.1 / scale**2)
        shown = [logits(adapted.model, backbone.batch())]
        for batch in backbone.calibration() * 2:
            optimiser.zero_grad()
            adapted.model(**batch).loss.backward()
            optimiser.step()
            shown.append(logits(adapted.model, backbone.batch()))
        trajectories.append(torch.stack(shown))
    assert_close(trajectories[0], trajectories[1], atol=1e-4, rtol=1e-3)
    assert (trajectories[0][0] - trajectories[0][-1]).abs().max() > 1e-2


def test_a_shift_in_the_gradients_signs_is_learnt_where_lora_xs_cannot() -> None:
    generator = torch.Generator().manual_seed(0)
    W, noise = torch.randn(24, 16, generator=generator), torch.randn(24, 16, generator=generator)
    u, v = (torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1 for size in (24, 16))
    x = torch.randn(256, 16, generator=generator)
    labels = x @ (W + 0.1 * torch.outer(u, v) + 0.005 * noise).T
    losses = {}
    for name in ("lora-sb", "lora-xs"):
        method = get_method(name)
        context = AttachContext(calibration=lambda: [{"x": x, "labels": labels}], total_steps=50)
        adapted = method.attach(OneLayer(W), method.config_type(rank=8), context)
        optimiser = torch.optim.Adam(adapted.trainable().values(), lr=0.05)
        for _ in range(50):
            optimiser.zero_grad()
            adapted.model(x, labels).loss.backward()
            optimiser.step()
        losses[name] = float(adapted.model(x, labels).loss)
    before = float(OneLayer(W)(x, labels).loss)  # type: ignore[arg-type]
    assert losses["lora-sb"] < 0.1 * before
    assert losses["lora-sb"] < 0.5 * losses["lora-xs"]


@pytest.mark.parametrize(("steps", "ratio", "rate"), [(1000, 0.02, 0.01 / 20), (10, 0.02, 0.01), (10, 0.5, 0.01 / 5)])
def test_the_steps_rate_is_that_of_the_warm_ups_first(steps: int, ratio: float, rate: float) -> None:
    backbone = BACKBONES["llama"]
    name = "model.layers.0.mlp.up_proj"
    adapted = attached(backbone.build(), backbone.calibration(), steps, warmup_ratio=ratio)
    S = np.linalg.svd(torch.sign(summed(backbone.build(), backbone.calibration())[name]).numpy())[1]
    assert_close(adapted.slots()[name].R.diagonal().detach().numpy(), (rate * S[:3]).astype("float32"))


def test_a_kept_start_is_not_taken_for_another_number_of_steps(tmp_path: Path) -> None:
    backbone = BACKBONES["llama"]
    starts = StartCache(tmp_path, "base", "data")
    first = attached(backbone.build(), backbone.calibration(), 10, starts, warmup_ratio=0.5)
    again = attached(backbone.build(), [], 10, starts, warmup_ratio=0.5)  # no data: what was kept is enough
    other = attached(backbone.build(), backbone.calibration(), 20, starts, warmup_ratio=0.5)
    for name, tensor in first.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
        if name.endswith("R"):
            assert_close(2 * other.tensors()[name], tensor)


@pytest.mark.parametrize(
    ("batches", "steps", "chosen", "message"),
    [
        ([], 10, {}, r"needs calibration data"),
        ([{"input_ids": torch.ones(1, 3), "labels": torch.full((1, 3), -100)}], 10, {}, "needs calibration data"),
        (BACKBONES["llama"].calibration(), None, {}, "needs the number of steps"),
        (BACKBONES["llama"].calibration(), 10, {"rank": 33}, "rank 33 needs layers of 33 .*k_proj"),
        (BACKBONES["llama"].calibration(), 10, {"targets": ("q_porj",)}, "matches no module"),
    ],
    ids=["no data", "no labels", "no steps", "rank", "targets"],
)
def test_what_is_missing_is_told(batches: Any, steps: int | None, chosen: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(InvalidInput, match=message):
        attached(model, batches, steps, **chosen)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("slots" in name for name, _ in model.named_modules())


def test_without_a_source_of_calibration_data_it_is_told() -> None:
    method = get_method("lora-sb")
    with pytest.raises(InvalidInput, match="needs calibration data"):
        method.attach(tiny_llama(), method.config_type(rank=4), AttachContext(total_steps=10))


def test_progress_is_told() -> None:
    backbone, heard = BACKBONES["llama"], []
    context = AttachContext(calibration=backbone.calibration, total_steps=10, progress=lambda *told: heard.append(told))
    get_method("lora-sb").attach(backbone.build(), get_method("lora-sb").config_type(rank=4, samples=3), context)
    assert heard[:3] == [("gradients", 1, 3), ("gradients", 2, 3), ("gradients", 3, 3)]
    assert heard[-1] == ("factors of the first update", 14, 14)
