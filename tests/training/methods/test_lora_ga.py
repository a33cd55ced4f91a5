"""LoRA-GA against its equations: the paper's, not peft's."""

from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from infra.errors import InvalidInput
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, train
from tests.training.methods.regression import Regression
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.injected import InjectedAdapted
from training.methods.lora_ga import METHOD, LoraGaConfig

BATCH = BACKBONES["llama"].batch()
M, N, R = 10, 14, 3


def attach(model: nn.Module, *batches: dict[str, Tensor], seed: int = 0, **options: Any) -> InjectedAdapted:
    return METHOD.attach(model, LoraGaConfig(**options), AttachContext(seed=seed, calibration=lambda: iter(batches)))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data() -> dict[str, Tensor]:
    return {"inputs": drawn(8, 5, N), "labels": drawn(8, 5, M, seed=1)}


def gradient() -> Tensor:
    """∂L/∂W [m, n] of the regression, by hand: the mean of (Wx − y)xᵀ."""
    x, y = data()["inputs"].reshape(-1, N).double(), data()["labels"].reshape(-1, M).double()
    W = Regression(M, N).layer.weight.detach().double()
    return (x @ W.T - y).T @ x / len(x)


def factors(**options: Any) -> tuple[Tensor, Tensor, float]:
    (slot,) = attach(Regression(M, N), data(), rank=R, **options).slots().values()
    return slot.A0.double(), slot.B0.double(), slot.scale


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])
@pytest.mark.parametrize("options", [{}, {"alpha": 3, "rank_stabilised": False}, {"size": "gd"}, {"size": "weightS"}])
def test_a_fresh_adapter_is_the_base_at_any_scale(build: type, options: dict[str, Any]) -> None:
    backbone = {tiny_llama: "llama", tiny_gpt2: "gpt2", tiny_bert: "bert"}[build]
    adapted = attach(build(), *BACKBONES[backbone].calibration(), rank=1, **options)
    assert_close(logits(adapted.model, BATCH), logits(build(), BATCH), atol=1e-4, rtol=0)


def test_the_defaults_are_the_papers() -> None:
    config = LoraGaConfig()
    assert (config.rank, config.alpha, config.gamma, config.direction, config.size) == (8, 16, 16, "ArB2r", "stable")
    assert config.scale == pytest.approx(16 / sqrt(8))
    assert LoraGaConfig(rank_stabilised=False).scale == 2


def test_rows_and_columns_have_the_papers_size_and_come_from_disjoint_components() -> None:
    A0, B0, _ = factors(gamma=4)
    U, _, Vh = torch.linalg.svd(gradient(), full_matrices=False)
    square = sqrt(M) / 4 * torch.eye(R, dtype=torch.float64)
    assert_close(A0 @ A0.T, square, atol=1e-5, rtol=1e-4)
    assert_close(B0.T @ B0, square, atol=1e-5, rtol=1e-4)
    assert (U[:, :R].T @ B0).abs().max() < 1e-5 and (A0 @ Vh[R : 2 * R].T).abs().max() < 1e-5
    c = M**0.25 / 2
    assert_close((A0 @ Vh[:R].T).abs(), c * torch.eye(R, dtype=torch.float64), atol=1e-5, rtol=1e-4)
    assert_close((U[:, R : 2 * R].T @ B0).abs(), c * torch.eye(R, dtype=torch.float64), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("direction", "of_a", "of_b"),
    [("ArB2r", [0, 1, 2], [3, 4, 5]), ("A2rBr", [3, 4, 5], [0, 1, 2]), ("ArBr", [1, 3, 5], [0, 2, 4])],
)
def test_each_direction_takes_its_components(direction: str, of_a: list[int], of_b: list[int]) -> None:
    A0, B0, _ = factors(direction=direction, size="unit")
    U, _, Vh = torch.linalg.svd(gradient(), full_matrices=False)
    eye = torch.eye(R, dtype=torch.float64)
    assert_close((A0 @ Vh[of_a].T).abs(), eye, atol=1e-5, rtol=1e-4)
    assert_close((U[:, of_b].T @ B0).abs(), eye, atol=1e-5, rtol=1e-4)


def test_random_directions_are_disjoint_and_drawn_from_the_seed() -> None:
    U, _, Vh = torch.linalg.svd(gradient(), full_matrices=False)
    taken = set()
    for seed in range(6):
        (slot,) = attach(Regression(M, N), data(), rank=R, direction="random", size="unit", seed=seed).slots().values()
        of_a = (slot.A0.double() @ Vh.T).abs().argmax(dim=1).tolist()
        of_b = (U.T @ slot.B0.double()).abs().argmax(dim=0).tolist()
        assert sorted(of_a + of_b) == list(range(2 * R))
        taken.add((*of_a, *of_b))
    assert len(taken) > 1


def test_the_other_sizes() -> None:
    W = Regression(M, N).layer.weight.detach().double()
    A0, B0, scale = factors(size="gd")
    assert_close(A0.norm(dim=1), torch.full((R,), 1 / scale, dtype=torch.float64), atol=1e-6, rtol=1e-5)
    assert_close(B0.norm(dim=0), torch.full((R,), 1 / scale, dtype=torch.float64), atol=1e-6, rtol=1e-5)
    A0, B0, scale = factors(size="weightS")
    c = (torch.linalg.svdvals(W)[:R] / scale).sqrt().mean()
    assert_close(A0.norm(dim=1), c.expand(R), atol=1e-5, rtol=1e-4)
    assert_close(B0.norm(dim=0), c.expand(R), atol=1e-5, rtol=1e-4)


def test_the_first_step_is_along_the_best_approximation_of_the_gradient_of_twice_the_rank() -> None:
    model, rate = Regression(M, N), 1e-3
    adapted = attach(model, data(), rank=R)
    (slot,) = adapted.slots().values()
    adapted.model(**data()).loss.backward()
    s, G = slot.scale, gradient()
    dA, dB = slot.A.grad.double(), slot.B.grad.double()
    step = -rate * s * (slot.B.detach().double() @ dA + dB @ slot.A.detach().double())  # first order in the rate
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = U[:, : 2 * R] * S[: 2 * R] @ Vh[: 2 * R]
    c = M**0.25 / sqrt(16)
    assert_close(step, -rate * s**2 * c**2 * best, atol=1e-8, rtol=1e-4)


def test_a_planted_update_of_low_rank_is_learned_faster_than_by_lora() -> None:
    x = drawn(16, 20, N)
    planted = drawn(M, 2 * R, seed=2) @ drawn(2 * R, N, seed=3) / N
    y = x @ (Regression(M, N).layer.weight.detach() + planted).T
    losses = {}
    for method, options in (("lora-ga", {"gamma": 1, "rank_stabilised": False}), ("lora", {})):
        chosen = get_method(method)
        context = AttachContext(calibration=lambda: iter([{"inputs": x, "labels": y}]))
        config = chosen.config_type(rank=R, alpha=R, targets=("layer",), **options)
        adapted = chosen.attach(Regression(M, N), config, context)
        optimiser = torch.optim.SGD(adapted.trainable().values(), lr=0.1)
        for _ in range(20):
            optimiser.zero_grad()
            loss = adapted.model(x, y).loss
            loss.backward()
            optimiser.step()
        losses[method] = adapted.model(x, y).loss.item()
    assert losses["lora-ga"] < 0.5 * losses["lora"], losses


def test_what_is_stored_is_a_plain_lora_of_twice_the_rank_and_the_same_scale(tmp_path: Path) -> None:
    base = tiny_llama()
    original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = attach(base, *BACKBONES["llama"].calibration(), rank=3)
    train(adapted, BATCH)
    adapted.save(tmp_path)
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    scale = 16 / sqrt(3)
    for name, slot in adapted.slots().items():
        W = original[f"{name}.weight"]
        layer = stock.base_model.model.get_submodule(name)
        mine = W - scale * slot.B0 @ slot.A0 + scale * slot.B @ slot.A
        assert_close(W + layer.get_delta_weight("default"), mine, atol=1e-5, rtol=1e-4)
        assert torch.equal(layer.base_layer.weight, W)
    loaded = METHOD.load(tiny_llama(), tmp_path)
    assert loaded.config.scale == pytest.approx(scale, rel=1e-12)
    assert loaded.adapter_config() == adapted.adapter_config()


def test_only_so_many_samples_are_read() -> None:
    half = {name: tensor[:4] for name, tensor in data().items()}
    (few,) = attach(Regression(M, N), data(), rank=R, samples=4).slots().values()
    (same,) = attach(Regression(M, N), half, rank=R).slots().values()
    (all_,) = attach(Regression(M, N), data(), rank=R).slots().values()
    assert torch.equal(few.A0, same.A0) and not torch.equal(few.A0, all_.A0)


def test_a_layer_without_room_for_twice_the_rank_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"rank 6 needs layers of 12 rows .*layer is 10 × 14\.\n.*rank to 5"):
        attach(Regression(M, N), data(), rank=6)
    with pytest.raises(InvalidInput, match="Regression computes no loss"):
        attach(Regression(M, N), {"inputs": data()["inputs"]}, rank=2)


def test_data_that_show_too_few_directions_are_refused() -> None:
    x, y = drawn(1, 4, N), drawn(1, 4, M, seed=1)  # four tokens, of which no sum of gradients has more than rank 4
    with pytest.raises(InvalidInput, match=r"gradient of layer .* has 4 directions; rank 3 takes 6"):
        attach(Regression(M, N), {"inputs": x, "labels": y}, rank=3)
    attach(Regression(M, N), {"inputs": x, "labels": y}, rank=2)
