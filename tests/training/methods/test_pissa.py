"""PiSSA against its equations, stock peft, and what the paper promises of its speed."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from infra.errors import CorruptArtifact, InvalidInput
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, train
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.injected import InjectedAdapted, matrix
from training.methods.pissa import METHOD, Pissa, PissaConfig
from training.methods.singular import EXACT_UP_TO, leading
from training.methods.started_lora import Pair

BATCH = BACKBONES["llama"].batch()


def attach(model: nn.Module, method: Any = METHOD, **options: Any) -> InjectedAdapted:
    return method.attach(model, PissaConfig(**options), AttachContext(seed=3))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """W [m, n] of every linear layer but the head, as the paper writes it."""
    return {name: matrix(m) for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])
@pytest.mark.parametrize("alpha", [4, 8, 3])
def test_a_fresh_adapter_is_the_base_at_any_scale(build: type, alpha: int) -> None:
    adapted = attach(build(), rank=2, alpha=alpha)
    assert_close(logits(adapted.model, BATCH), logits(build(), BATCH), atol=1e-5, rtol=0)
    slot = next(iter(adapted.slots().values()))
    assert slot.scale == alpha / 2 and slot.B0.abs().max() > 1e-2  # not by starting from nothing


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_start_is_the_principal_part_of_the_spectrum(build: type) -> None:
    rank, scale = 5, 3.0
    adapted, bare = attach(build(), rank=rank, alpha=15), weights(build())
    for name, slot in adapted.slots().items():
        W = bare[name].double()
        A, B = slot.A.detach().double(), slot.B.detach().double()
        S = torch.linalg.svdvals(W)
        assert_close(torch.linalg.svdvals(scale * B @ A)[:rank], S[:rank], atol=1e-4, rtol=1e-4)
        left = torch.linalg.svdvals(W - scale * B @ A)
        assert_close(left[: len(S) - rank], S[rank:], atol=1e-4, rtol=1e-4)
        assert left[len(S) - rank :].max() < 1e-4
        assert_close(A @ A.T, torch.diag(S[:rank] / scale), atol=1e-4, rtol=1e-4)
        assert_close(B.T @ B, torch.diag(S[:rank] / scale), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "targets"), [(tiny_llama, ["q_proj", "down_proj"]), (tiny_gpt2, ["c_attn", "attn.c_proj"])]
)
def test_peft_comes_to_the_same_product_and_residual(build: type, targets: list[str]) -> None:
    adapted = attach(build(), rank=4, alpha=8, targets=tuple(targets))
    transposed = build is tiny_gpt2
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights="pissa", fan_in_fan_out=transposed
    )
    stock, bare = peft.get_peft_model(build(), config), weights(build())
    for name, slot in adapted.slots().items():
        layer = stock.base_model.model.get_submodule(name)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert_close(slot.B0 @ slot.A0, product, atol=1e-5, rtol=1e-4)
        assert_close(bare[name] - slot.scale * slot.B0 @ slot.A0, matrix(layer.base_layer), atol=1e-5, rtol=1e-4)


def test_what_is_stored_is_a_plain_lora_of_twice_the_rank_on_the_original_base(tmp_path: Path) -> None:
    base = tiny_llama()
    original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = attach(base, rank=3, alpha=4)
    train(adapted, BATCH, steps=4)
    adapted.save(tmp_path)
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert (stock.peft_config["default"].r, stock.peft_config["default"].lora_alpha) == (6, 8)
    for name, slot in adapted.slots().items():
        W, scale = original[f"{name}.weight"], 4 / 3
        residual = W - scale * slot.B0 @ slot.A0
        layer = stock.base_model.model.get_submodule(name)
        assert_close(W + layer.get_delta_weight("default"), residual + scale * slot.B @ slot.A, atol=1e-5, rtol=1e-4)
        assert (slot.B @ slot.A - slot.B0 @ slot.A0).abs().max() > 1e-3
        assert torch.equal(layer.base_layer.weight, W)
    assert_close(logits(stock, BATCH), logits(adapted.model, BATCH), atol=1e-6, rtol=1e-6)


def test_the_start_stays_while_the_factors_train() -> None:
    adapted = attach(tiny_llama(), rank=3)
    starts = {name: (slot.A0.clone(), slot.B0.clone()) for name, slot in adapted.slots().items()}
    train(adapted, BATCH, steps=4)
    for name, slot in adapted.slots().items():
        assert torch.equal(slot.A0, starts[name][0]) and torch.equal(slot.B0, starts[name][1])
        assert not torch.equal(slot.A, slot.A0) and not torch.equal(slot.B, slot.B0)
    expected = sum(3 * sum(weights(tiny_llama())[name].shape) for name in starts)
    assert sum(parameter.numel() for parameter in adapted.trainable().values()) == expected


class Smallest(Pissa):
    """The control: what matters least trains."""

    def pairs(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: Any, context: AttachContext
    ) -> dict[str, Pair]:
        pairs = {}
        for name, layer in layers.items():
            U, S, Vh = torch.linalg.svd(matrix(layer), full_matrices=False)
            root = (S[-config.rank :] / config.scale).sqrt()
            pairs[name] = (root[:, None] * Vh[-config.rank :], U[:, -config.rank :] * root)
        return pairs


def fitted(model: nn.Module, parameters: Any, x: Tensor, y: Tensor, steps: int, rate: float) -> float:
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    with torch.no_grad():
        return functional.cross_entropy(model(x), y).item()


def test_it_learns_the_other_digits_faster_than_lora_and_than_the_smallest_components() -> None:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    old = y < 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    assert fitted(base, base.parameters(), x[old], y[old], steps=200, rate=3e-3) < 0.05
    options = {"rank": 8, "targets": ("0", "2", "4")}
    lora = get_method("lora")
    tried = {
        "pissa": attach(copy.deepcopy(base), **options),
        "smallest": attach(copy.deepcopy(base), Smallest(), **options),
        "lora": lora.attach(copy.deepcopy(base), lora.config_type(**options), AttachContext(seed=3)),
    }
    losses = {
        name: fitted(adapted.model, adapted.trainable().values(), x[~old], y[~old], steps=50, rate=1e-3)
        for name, adapted in tried.items()
    }
    assert losses["pissa"] < losses["lora"] and losses["pissa"] < losses["smallest"], losses


def test_dropout_spares_what_is_subtracted() -> None:
    torch.manual_seed(0)
    adapted = attach(tiny_llama(), rank=4, dropout=0.999999, targets=("q_proj",))
    slot = next(iter(adapted.slots().values())).train()
    layer = tiny_llama().model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32)
    residual = layer.weight - slot.scale * slot.B0 @ slot.A0
    assert_close(slot(layer, x), x @ residual.T, atol=1e-5, rtol=1e-4)


def test_the_randomised_decomposition_is_the_exact_one_and_drawn_from_the_seed() -> None:
    size = EXACT_UP_TO + 20
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    S = 0.9 ** torch.arange(float(size))
    W = U * S @ V.T
    torch.manual_seed(1)
    u, s, vh = leading(W, 6, 16)
    torch.manual_seed(1)
    again = leading(W, 6, 16)
    assert all(torch.equal(one, other) for one, other in zip((u, s, vh), again, strict=True))
    assert_close(s, S[:6], atol=1e-4, rtol=1e-4)
    assert_close(u * s @ vh, U[:, :6] * S[:6] @ V[:, :6].T, atol=1e-3, rtol=0)
    assert_close(leading(W, 6, None)[1], S[:6], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("alpha", "rank"), [(None, 3), (4, 3), (5, 7), (1, 16), (0.5, 3)])
def test_the_scale_survives_storing(tmp_path: Path, alpha: float | None, rank: int) -> None:
    adapted = attach(tiny_llama(), rank=rank, alpha=alpha)
    adapted.save(tmp_path)
    loaded = METHOD.load(tiny_llama(), tmp_path)
    assert loaded.config.scale == pytest.approx((alpha or rank) / rank, rel=1e-12)
    assert torch.equal(logits(loaded.model, BATCH), logits(adapted.model, BATCH))
    assert loaded.adapter_config() == adapted.adapter_config()


def test_a_rank_above_a_layers_size_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(InvalidInput, match=r"rank 17 needs layers of 17 .*k_proj is 16 × 32.*\n.*rank to 16"):
        attach(model, rank=17)
    assert not any(hasattr(module, "slots") for module in model.modules())
    assert attach(model, rank=17, exclude=("k_proj", "v_proj")).slots()


def test_a_lora_that_is_no_pair_of_pairs_is_refused(tmp_path: Path) -> None:
    lora = get_method("lora")
    lora.attach(tiny_llama(), lora.config_type(rank=3), AttachContext()).save(tmp_path)
    with pytest.raises(CorruptArtifact, match="no pair"):
        METHOD.load(tiny_llama(), tmp_path)
    patterned = peft.LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"model.layers.0.self_attn.q_proj": 2})
    peft.get_peft_model(tiny_llama(), patterned).save_pretrained(tmp_path / "uneven")
    with pytest.raises(CorruptArtifact, match=r"scale of model\.layers\.0\.self_attn\.q_proj is not"):
        METHOD.load(tiny_llama(), tmp_path / "uneven")
