"""LoLDU against torch's own factorisation with its dense permutation, and the paper's weight, written out by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from infra.errors import CorruptArtifact, InvalidInput
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, train
from tests.training.methods.one_layer import OneLayer, fitted
from tests.training.methods.plain_lora import plain_lora, weight_of
from training.methods.catalog import get_method
from training.methods.contract import TENSORS_FILE, AttachContext

BATCH = BACKBONES["llama"].batch()
BUILDS = pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])


def attached(model: nn.Module, method: str = "loldu", **chosen: Any) -> Any:
    return get_method(method).attach(model, get_method(method).config_type(**chosen), AttachContext(seed=3))


def perturbed(adapted: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for slot in adapted.slots().values():
        slot.z.data.add_(torch.randn(slot.z.shape, generator=generator))
    return adapted


def papers_weight(W: Tensor, z: Tensor, sigma: float, sigma0: float) -> Tensor:
    """W_res + σ·P·B·diag(z)·A with W_res = W − σ₀·P·B·diag(z₀)·A, in double."""
    P, L, U = torch.linalg.lu(W.double())
    D, rank = U.diagonal(), len(z)
    A, B = U[:rank] / D[:rank, None], L[:, :rank]
    return W - sigma0 * P @ B @ torch.diag(D[:rank]) @ A + sigma * P @ B @ torch.diag(z.double()) @ A


@BUILDS
@pytest.mark.parametrize(("sigma", "chosen"), [(0.5, {}), (0.7, {"train_scale": True})])
def test_the_forward_pass_is_the_papers_weight(build: Any, sigma: float, chosen: dict[str, Any]) -> None:
    adapted, bare = perturbed(attached(build(), rank=3, alpha=1.5, **chosen)), build()
    before = logits(bare, BATCH)
    with torch.no_grad():
        for name, slot in adapted.slots().items():
            if slot.sigma is not None:
                slot.sigma.fill_(sigma)
            layer: Any = bare.get_submodule(name)
            W = papers_weight(weight_of(layer), slot.z.detach(), sigma, 0.5).float()
            layer.weight.copy_(W if isinstance(layer, nn.Linear) else W.T)
    expected = logits(bare, BATCH)
    assert_close(logits(adapted.model, BATCH), expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)
    assert (expected - before).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(12, 7), (7, 12), (9, 9)])
def test_the_whole_factorisation_gives_the_weight_back(size: tuple[int, int]) -> None:
    W = torch.randn(size, generator=torch.Generator().manual_seed(0))
    slot: Any = attached(OneLayer(W)).slots()["layer"]  # r is cut to the smaller side
    assert len(slot.z) == min(size)
    assert_close(slot.B @ torch.diag(slot.z0) @ slot.A, W, atol=1e-5, rtol=1e-5)
    assert slot.B.abs().max() <= 1  # partial pivoting
    assert_close(slot.A.tril(), torch.eye(*slot.A.shape), atol=1e-6, rtol=0)  # unit upper
    P, L, U = torch.linalg.lu(W)
    assert_close(slot.B, P @ L)
    assert_close(slot.z.detach(), U.diagonal())
    assert_close(torch.diag(slot.z0) @ slot.A, U)


@pytest.mark.parametrize("size", [(12, 7), (7, 12)])
def test_without_a_whole_diagonal_all_of_the_weight_is_scaled(size: tuple[int, int]) -> None:
    """At r = k, z = 0 leaves the paper's residual, (1 − σ)W."""
    W = torch.randn(size, generator=torch.Generator().manual_seed(0))
    adapted = attached(OneLayer(W), alpha=2)
    slot = adapted.slots()["layer"]
    slot.z.data.zero_()
    merged: Any = adapted.merge()
    assert_close(merged.layer.weight.detach(), (1 - 2 / 7) * W, atol=1e-5, rtol=1e-5)


@BUILDS
@pytest.mark.parametrize("chosen", [{}, {"rank": 4, "alpha": 100, "train_scale": True}])
def test_a_fresh_adapter_is_exactly_the_base(build: Any, chosen: dict[str, Any]) -> None:
    assert torch.equal(logits(attached(build(), **chosen).model, BATCH), logits(build(), BATCH))


def test_the_gradient_of_an_entry_is_the_weights_between_its_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    W, x, labels = (torch.randn(size, generator=generator) for size in ((12, 7), (64, 7), (64, 12)))
    adapted = attached(OneLayer(W), rank=5, alpha=3)
    adapted.model(x, labels).loss.backward()
    G = 2 / labels.numel() * (x @ W.T - labels).T @ x
    P, L, U = torch.linalg.lu(W)
    A, PB = U / U.diagonal()[:, None], P @ L
    expected = torch.stack([3 / 5 * PB[:, j] @ G @ A[j] for j in range(5)])
    assert_close(adapted.slots()["layer"].z.grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("scaled", "per_layer"), [(False, 4), (True, 5)])
def test_training_changes_only_the_entries_and_the_scale(scaled: bool, per_layer: int) -> None:
    adapted = attached(tiny_llama(), rank=4, train_scale=scaled, store_factors=True)
    held = {name: tensor.clone() for name, tensor in adapted.tensors().items()}
    train(adapted, BATCH)
    changed = {name.rpartition(".")[2] for name, tensor in adapted.tensors().items() if not tensor.equal(held[name])}
    assert changed == ({"z", "sigma"} if scaled else {"z"})
    assert sum(p.numel() for p in adapted.trainable().values()) == 2 * 7 * per_layer


def test_another_diagonal_is_learnt_by_fewer_parameters_than_a_lora_and_nothing_else_is() -> None:
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(12, 7, generator=generator), torch.randn(64, 7, generator=generator)
    P, L, U = torch.linalg.lu(W)
    change = P @ L @ torch.diag(torch.tensor([1.0, -1, 2, 0, 0, 0, 0])) @ (U / U.diagonal()[:, None])
    outside = torch.randn(12, 7, generator=generator)
    inside = x @ (W + change).T
    assert fitted(attached(OneLayer(W), rank=3), x, inside) < 1e-6
    assert fitted(attached(OneLayer(W), "lora", rank=1), x, inside) > 1e-2  # nineteen parameters, not three
    assert fitted(attached(OneLayer(W)), x, x @ (W + outside).T) > 1e-2


@pytest.mark.parametrize("lost", ["rows", "columns", "all", "rank"])
def test_zero_pivots_do_no_harm(lost: str) -> None:
    W = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    if lost == "rows":
        W[2:8] = 0
    elif lost == "columns":
        W[:, 1:3] = 0
    elif lost == "all":
        W.zero_()
    else:
        W = W[:, :2] @ W[:2]
    adapted = attached(OneLayer(W))
    slot = adapted.slots()["layer"]
    assert_close(slot.B @ torch.diag(slot.z0) @ slot.A, W, atol=1e-5, rtol=1e-5)
    x = torch.eye(7)
    adapted.model(x, torch.ones(7, 12)).loss.backward()
    assert torch.isfinite(slot.z.grad).all()
    assert torch.equal(adapted.model(x).logits, x @ W.T)


@BUILDS
@pytest.mark.parametrize("scaled", [False, True])
def test_stock_peft_computes_the_export(build: Any, scaled: bool) -> None:
    adapted = perturbed(attached(build(), rank=4, alpha=2, train_scale=scaled))
    stock = plain_lora(build(), adapted)
    expected = logits(adapted.model, BATCH)
    assert_close(logits(stock, BATCH), expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=1e-5)


@BUILDS
def test_the_file_holds_four_numbers_an_entry_and_loads(build: Any, tmp_path: Path) -> None:
    adapted = perturbed(attached(build(), rank=3))
    adapted.save(tmp_path)
    shapes = {name.rpartition(".")[2]: tuple(t.shape) for name, t in load_file(tmp_path / TENSORS_FILE).items()}
    assert shapes == {"z": (3,), "z0": (3,), "mark": (2, 3)}
    loaded = get_method("loldu").load(build(), tmp_path)
    assert torch.equal(logits(loaded.model, BATCH), logits(adapted.model, BATCH))


def test_another_base_is_refused_unless_the_factors_are_stored(tmp_path: Path) -> None:
    perturbed(attached(tiny_llama(), rank=3)).save(tmp_path / "small")
    with pytest.raises(CorruptArtifact, match=r"_proj: the factors of this weight are not those"):
        get_method("loldu").load(tiny_llama(seed=1), tmp_path / "small")
    perturbed(attached(tiny_llama(), rank=4, store_factors=True)).save(tmp_path / "whole")
    rounded = tiny_llama().to(torch.bfloat16)
    whole = get_method("loldu").load(rounded, tmp_path / "whole")
    expected = get_method("loldu").load(tiny_llama(), tmp_path / "whole")
    for name, slot in whole.slots().items():
        assert torch.equal(slot.A, expected.slots()[name].A)


def test_a_target_that_is_not_there_is_told() -> None:
    with pytest.raises(InvalidInput, match="matches no module"):
        attached(tiny_llama(), targets=("q_porj",))
