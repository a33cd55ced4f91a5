"""LoRA-XS against numpy's decomposition and the paper's equation, written out by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from infra.errors import CorruptArtifact, InvalidInput
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, loss, train
from tests.training.methods.plain_lora import plain_lora, weight_of
from tests.training.test_trainer_resume import options, raise_at
from tests.training.tiny_training import run, same_bits
from training.methods.catalog import get_method
from training.methods.contract import TENSORS_FILE, AttachContext

BATCH = BACKBONES["llama"].batch()
BUILDS = pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])


def attached(model: nn.Module, seed: int = 3, **chosen: Any) -> Any:
    method = get_method("lora-xs")
    return method.attach(model, method.config_type(**{"rank": 3, **chosen}), AttachContext(seed=seed))


def perturbed(adapted: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for slot in adapted.slots().values():
        slot.R.data.normal_(generator=generator)
    return adapted


@BUILDS
def test_the_factors_are_the_weights_principal_components(build: Any) -> None:
    adapted, bare = attached(build()), build()
    assert adapted.slots()
    for name, slot in adapted.slots().items():
        W = weight_of(bare.get_submodule(name)).double().numpy()
        U, S, Vh = np.linalg.svd(W)
        A, B = slot.A.double().numpy(), slot.B.double().numpy()
        assert_close(B @ A, (U[:, :3] * S[:3]) @ Vh[:3], atol=1e-5, rtol=1e-5)
        assert_close(B.T @ B, np.eye(3), atol=1e-5, rtol=0)
        assert_close(A @ A.T, np.diag(S[:3] ** 2), atol=1e-5, rtol=1e-4)  # the singular values are on the input's side
        largest = np.abs(A).argmax(axis=1)
        assert (A[range(3), largest] > 0).all()


@BUILDS
def test_the_forward_pass_is_the_papers_equation(build: Any) -> None:
    adapted, bare = perturbed(attached(build(), alpha=9)), build()
    before = logits(bare, BATCH)
    with torch.no_grad():
        for name, slot in adapted.slots().items():
            layer: Any = bare.get_submodule(name)
            change = 3.0 * slot.B.double() @ slot.R.double() @ slot.A.double()
            W = (weight_of(layer).double() + change).float()
            layer.weight.copy_(W if layer.weight.shape == W.shape and isinstance(layer, nn.Linear) else W.T)
    assert_close(logits(adapted.model, BATCH), logits(bare, BATCH), atol=2e-5, rtol=1e-4)
    assert (logits(bare, BATCH) - before).abs().max() > 1e-2


def test_r_starts_small_or_at_zero() -> None:
    drawn = torch.cat([slot.R.flatten() for slot in attached(tiny_llama()).slots().values()])
    assert 0.8e-5 < drawn.std() < 1.2e-5
    assert torch.equal(logits(attached(tiny_llama(), init_std=0.0).model, BATCH), logits(tiny_llama(), BATCH))


@BUILDS
def test_the_gradient_of_r_is_the_weights_between_the_factors(build: Any) -> None:
    adapted = perturbed(attached(build(), alpha=6))
    merged = adapted.merge()
    loss(adapted.model, BATCH).backward()
    loss(merged, BATCH).backward()
    for name, slot in adapted.slots().items():
        layer: Any = merged.get_submodule(name)
        G = layer.weight.grad if isinstance(layer, nn.Linear) else layer.weight.grad.T
        assert_close(slot.R.grad, 2.0 * slot.B.T @ G @ slot.A.T, atol=1e-4, rtol=1e-3)


def test_training_changes_only_r() -> None:
    adapted = attached(tiny_llama())
    held = {name: tensor.clone() for name, tensor in adapted.tensors().items()}
    train(adapted, BATCH)
    changed = {name.rpartition(".")[2] for name, tensor in adapted.tensors().items() if not tensor.equal(held[name])}
    assert changed == {"R"}
    assert sum(p.numel() for p in adapted.trainable().values()) == 2 * 7 * 3**2


@BUILDS
def test_stock_peft_computes_the_export(build: Any) -> None:
    adapted = perturbed(attached(build(), alpha=9))
    stock = plain_lora(build(), adapted)
    assert_close(logits(stock, BATCH), logits(adapted.model, BATCH), atol=1e-5, rtol=1e-5)


@BUILDS
def test_the_small_file_holds_r_and_four_numbers_a_direction_and_loads(build: Any, tmp_path: Path) -> None:
    adapted = perturbed(attached(build(), store_factors=False))
    adapted.save(tmp_path)
    shapes = {name.rpartition(".")[2]: tuple(t.shape) for name, t in load_file(tmp_path / TENSORS_FILE).items()}
    assert shapes == {"R": (3, 3), "mark": (2, 3)}
    loaded = get_method("lora-xs").load(build(), tmp_path)
    assert torch.equal(logits(loaded.model, BATCH), logits(adapted.model, BATCH))


def test_factors_made_anew_that_are_not_the_trainings_are_refused(tmp_path: Path) -> None:
    perturbed(attached(tiny_llama(), store_factors=False)).save(tmp_path)
    model = tiny_llama(seed=1)
    with pytest.raises(CorruptArtifact, match=r"_proj: the factors of this weight are not those"):
        get_method("lora-xs").load(model, tmp_path)
    assert torch.equal(logits(model, BATCH), logits(tiny_llama(seed=1), BATCH))
    tensors = load_file(tmp_path / TENSORS_FILE)
    last = list(tensors)[-1]
    assert last.endswith("mark")
    save_file(tensors | {last: tensors[last] * torch.tensor([1, -1, 1])}, tmp_path / TENSORS_FILE)  # another sign
    with pytest.raises(CorruptArtifact, match="the factors of this weight are not those"):
        get_method("lora-xs").load(tiny_llama(), tmp_path)


def test_factors_made_anew_in_a_near_precision_are_taken(tmp_path: Path) -> None:
    rounded = tiny_llama()
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.mul_(1 + 1e-5)
    adapted = perturbed(attached(tiny_llama(), store_factors=False))
    adapted.save(tmp_path)
    loaded = get_method("lora-xs").load(rounded, tmp_path)
    assert_close(logits(loaded.model, BATCH), logits(adapted.model, BATCH), atol=1e-3, rtol=1e-2)


def test_dropout_is_on_the_input_of_a_and_only_in_training() -> None:
    adapted = perturbed(attached(tiny_llama(), dropout=0.5))
    assert torch.equal(logits(adapted.model, BATCH), logits(adapted.model, BATCH))
    slot = adapted.slots()["model.layers.0.self_attn.q_proj"].train()
    base, x = nn.Linear(32, 32), torch.eye(32)
    rows = slot(base, x) - base(x)  # every row of x has one entry, which is dropped, or doubled
    whole = 2 * (slot.B @ slot.R @ slot.A).T
    kept = rows.abs().amax(dim=1) > 1e-6
    assert 0 < kept.sum() < 32
    assert_close(rows[kept], whole[kept], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"rank": 33}, r"rank 33 needs layers of 33 .*model\.layers\.0\.self_attn\.k_proj is 16 × 32"),
        ({"targets": ("q_porj",)}, r"'q_porj'\] matches no module of LlamaForCausalLM"),
    ],
)
def test_what_cannot_be_adapted_is_told(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        attached(tiny_llama(), **chosen)


@pytest.mark.parametrize(
    ("method", "chosen"),
    [
        ("lora-xs", {"rank": 4, "dropout": 0.1}),
        ("lora-sb", {"rank": 4, "dropout": 0.1}),
        ("loldu", {"rank": 4, "train_scale": True}),
        ("hydra", {"bias": True, "dropout": 0.1}),
    ],
)
def test_a_crashed_training_resumes_to_the_same_bits(tmp_path: Path, method: str, chosen: dict[str, Any]) -> None:
    def fresh() -> Any:
        config = get_method(method).config_type(**chosen)
        context = AttachContext(calibration=BACKBONES["llama"].calibration, total_steps=5)
        return get_method(method).attach(tiny_llama(), config, context)

    short = options(steps=5, checkpoint_every=2)
    whole, _ = run(tmp_path / "whole", short, fresh())
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "crashed", short, fresh(), on_event=raise_at(3))
    resumed, outcome = run(tmp_path / "crashed", short, fresh())
    assert outcome.resumed_from == 2
    assert same_bits(resumed.tensors(), whole.tensors())
    assert not same_bits(resumed.tensors(), fresh().tensors())
