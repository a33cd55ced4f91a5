"""EVA against a full PCA, its rule for ranks, and stock peft."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import EvaConfig as StockEva
from peft.tuners.lora.eva import get_eva_state_dict
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn
from torch.testing import assert_close

from infra.errors import InvalidInput
from tests.tiny_models import tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, train
from tests.training.methods.regression import Regression
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.eva import METHOD, Components, EvaConfig, shares
from training.methods.injected import InjectedAdapted
from training.methods.targets import linear_modules, select, shape

BATCH = BACKBONES["llama"].batch()


def attach(model: nn.Module, *batches: dict[str, Tensor], **options: Any) -> InjectedAdapted:
    return METHOD.attach(model, EvaConfig(**options), AttachContext(calibration=lambda: iter(batches)))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(batches: int, rows: int = 6, length: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 259, (rows, length), generator=generator) for _ in range(batches)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def ranks(adapted: InjectedAdapted) -> dict[str, int]:
    return {name: len(slot.A) for name, slot in adapted.slots().items()}


@pytest.mark.parametrize("rho", [1, 1.5, 3])
def test_the_ranks_keep_the_budget_and_the_start_changes_nothing(rho: float) -> None:
    adapted = attach(tiny_llama(), *tokens(3), rank=4, rho=rho)
    found, layers = ranks(adapted), linear_modules(tiny_llama())
    names = select(tiny_llama(), "all-linear")
    assert sum(found.values()) == 4 * len(names)
    assert max(found.values()) <= round(4 * rho)
    if rho == 1:
        assert found == dict.fromkeys(names, 4)
    else:
        assert len(set(found.values())) > 1
    assert torch.equal(logits(adapted.model, BATCH), logits(tiny_llama(), BATCH))
    counted = sum(parameter.numel() for parameter in adapted.trainable().values())
    assert counted == sum(rank * sum(shape(layers[name])) for name, rank in found.items())
    assert counted <= METHOD.count(tiny_llama(), adapted.config)


def test_the_bound_is_reached_where_the_largest_layers_get_all_they_may() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 10), nn.Linear(10, 20))
    # A budget of 6; the last layer may have 4 of it, the second the other 2.
    assert METHOD.count(model, EvaConfig(rank=2)) == 4 * 30 + 2 * 14


def test_the_rows_are_the_leading_principal_directions_of_all_inputs() -> None:
    batches = [{"inputs": drawn(4, 12, 9, seed=seed) * 0.7 ** torch.arange(9.0) + 5} for seed in range(6)]
    (slot,) = attach(Regression(6, 9), *batches, rank=3, rho=1, tau=1.0, batches=6).slots().values()
    X = torch.cat([batch["inputs"].reshape(-1, 9) for batch in batches])
    V = torch.linalg.svd(X - X.mean(0), full_matrices=False)[2][:3]
    assert_close(slot.A @ slot.A.T, torch.eye(3), atol=1e-4, rtol=0)
    assert (slot.A * V).sum(1).abs().min() > 0.99
    uncentred = torch.linalg.svd(X, full_matrices=False)[2][:3]
    assert (slot.A * uncentred).sum(1).abs().min() < 0.9  # which is another thing here


def test_incremental_pca_of_all_directions_is_the_pca_of_everything() -> None:
    X = drawn(60, 7) @ drawn(7, 7, seed=1) + drawn(7, seed=2)
    components = Components(7, tau=0.99)
    for part in X.split([20, 3, 17, 20]):  # three rows wait for the next
        components.add(part)
    _, S, V = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    assert_close(components.S, S, atol=1e-3, rtol=1e-4)
    assert_close((components.V * V).sum(1).abs(), torch.ones(7), atol=1e-4, rtol=0)
    assert_close(components.ratios(), (S**2 / (S**2).sum()).double(), atol=1e-5, rtol=1e-4)


def test_a_direction_settles_when_it_stays_where_it_is_and_where_nothing_varies() -> None:
    flat = Components(4, tau=0.99)
    flat.add(drawn(40, 2) @ torch.eye(6)[:2] * torch.tensor([9.0, 3.0, 1, 1, 1, 1]))
    assert not flat.settled(1) and flat.settled(0)
    flat.add(torch.zeros(4, 6))
    assert flat.settled(4)  # the last two explain nothing
    turned = Components(2, tau=0.99)
    turned.add(drawn(20, 3) * torch.tensor([2.0, 1.0, 0.0]))
    turned.add(drawn(20, 3, seed=1) * torch.tensor([0.0, 1.0, 50.0]))
    assert not turned.settled(1)
    still = Components(1, tau=0.99)
    still.add(torch.ones(3, 4))
    still.add(torch.ones(3, 4))
    assert still.settled(1) and still.ratios().tolist() == [0.0]


def test_ranks_go_to_the_largest_ratios() -> None:
    ratios = {"a": torch.tensor([0.5, 0.3, 0.1]), "b": torch.tensor([0.9, 0.05, 0.01]), "c": torch.tensor([0.04, 0.0])}
    assert shares(ratios, 4) == {"a": 3, "b": 1, "c": 0}
    assert shares({"a": torch.tensor([0.5]), "b": torch.tensor([0.5])}, 1) == {"a": 1, "b": 0}


class Two(nn.Module):
    """Two layers with an input each: the first's lives in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, narrow: Tensor, wide: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.narrow(narrow) + self.wide(wide))


def test_variance_that_was_planted_is_found_and_a_layer_may_be_left_without() -> None:
    basis = torch.linalg.qr(drawn(32, 32))[0][:2]
    batches = [{"narrow": drawn(4, 32, 2, seed=s) @ basis, "wide": drawn(4, 32, 32, seed=9 + s)} for s in range(3)]
    adapted = attach(Two(), *batches, rank=2, rho=2, batches=4)
    found = ranks(adapted)
    assert found["narrow"] == 2 and found["wide"] == 2
    A = adapted.slots()["narrow"].A
    X = torch.cat([batch["narrow"].reshape(-1, 32) for batch in batches])
    X = X - X.mean(0)
    assert (X - X @ A.T @ A).norm() < 1e-4 * X.norm()
    alone = attach(Two(), *batches, rank=1, rho=2, batches=4)
    assert ranks(alone) == {"narrow": 2}  # with a budget of two, nothing is left for the other
    assert type(alone.model.wide) is nn.Linear


def test_an_adapter_of_uneven_ranks_is_stored_with_one_scale(tmp_path: Path) -> None:
    adapted = attach(tiny_llama(), *tokens(3), rank=3, alpha=1, rho=3)
    train(adapted, BATCH)
    adapted.save(tmp_path)
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    scales = {layer.scaling["default"] for layer in stock.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
    assert all(scale == pytest.approx(1 / 3, rel=1e-12) for scale in scales)
    assert len(stock.peft_config["default"].rank_pattern) > 0
    loaded = METHOD.load(tiny_llama(), tmp_path)
    assert ranks(loaded) == ranks(adapted)
    assert loaded.adapter_config() == adapted.adapter_config()


def test_what_is_masked_does_not_count() -> None:
    (first, second) = tokens(2)
    mask, labels = torch.ones_like(first["input_ids"]), first["labels"].clone()
    mask[:, 12:] = 0  # padded on the right
    labels[:, 12:] = -100
    batch = first | {"attention_mask": mask, "labels": labels}
    garbled = batch | {"input_ids": torch.where(mask == 1, first["input_ids"], second["input_ids"])}
    clean, other = attach(tiny_llama(), batch, rank=4), attach(tiny_llama(), garbled, rank=4)
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in clean.tensors().items())
    labels[:, :6] = -100
    without = attach(tiny_llama(), batch | {"labels": labels}, rank=4, use_label_mask=False)
    assert all(torch.equal(tensor, without.tensors()[name]) for name, tensor in clean.tensors().items())
    masked = attach(tiny_llama(), batch | {"labels": labels}, rank=4)
    assert any(
        not torch.equal(slot.A, clean.slots()[name].A) for name, slot in masked.slots().items() if name in clean.slots()
    )


@pytest.mark.parametrize("count", [4, 9])
def test_every_step_is_that_of_pefts_incremental_pca(count: int) -> None:
    mine, stock = Components(count, tau=0.99), IncrementalPCA(n_components=count)
    for seed in range(5):
        X = drawn(20, 12, seed=seed) * 0.8 ** torch.arange(12.0) + seed
        mine.add(X)
        stock.partial_fit(X)
        assert_close(mine.S, stock.singular_values_.float(), atol=1e-4, rtol=1e-4)
        assert_close((mine.V * stock.components_.float()).sum(1).abs(), torch.ones(count), atol=1e-4, rtol=0)
        assert_close(mine.ratios(), stock.explained_variance_ratio_.double(), atol=1e-5, rtol=1e-4)


def directed(build: Any) -> nn.Module:
    """A model in whose inputs some directions stand out: where none does, chance decides which come first."""
    model = build()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(0.7 ** torch.arange(32.0))
    return model


@pytest.mark.parametrize(
    ("build", "targets"),
    [(tiny_llama, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]), (tiny_gpt2, ["c_attn", "c_fc"])],
)
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_peft_comes_to_the_same_directions_and_ranks(build: type, targets: list[str], rho: float) -> None:
    rank = 16 if rho == 1 else 8  # 16 components: peft's randomised SVD then takes all 32 directions, and is exact
    batches = tokens(6)
    adapted = attach(directed(build), *batches, rank=rank, rho=rho, targets=tuple(targets))
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=1,
        target_modules=targets,
        init_lora_weights="eva",
        eva_config=StockEva(rho=rho),
        fan_in_fan_out=build is tiny_gpt2,
    )
    found = get_eva_state_dict(directed(build), batches, config, show_progress_bar=False)
    stock = {name: A.float() for name, A in found.items()}
    mine = {name: adapted.slots()[name].A if name in adapted.slots() else torch.empty(0, 32) for name in stock}

    def by_input(name: str) -> str:  # layers that share an input share its components, and may swap their ranks
        return name if "q_proj" not in name and "k_proj" not in name and "v_proj" not in name else name[:-6]

    for ranks_of in (mine, stock):
        assert sum(map(len, ranks_of.values())) == rank * len(stock)
    groups = {by_input(name) for name in stock}
    for group in groups:
        ours = sorted(len(A) for name, A in mine.items() if by_input(name) == group)
        theirs = sorted(len(A) for name, A in stock.items() if by_input(name) == group)
        assert ours == theirs
    compared = Counter()
    for name, A in mine.items():
        shared = min(len(A), len(stock[name]))
        # Not closer: peft counts a direction whose sign flips as unsettled, and so takes some batches more.
        assert (A[:shared] * stock[name][:shared]).sum(1).abs().min() > 0.9
        compared[by_input(name)] += shared
    assert all(compared.values())


def test_whitening_divides_each_row_once_even_where_an_input_is_shared() -> None:
    batches = tokens(4)
    plain = attach(tiny_llama(), *batches, rank=4, rho=1)
    white = attach(tiny_llama(), *batches, rank=4, rho=1, whiten=True)
    for name, slot in plain.slots().items():
        ratio = white.slots()[name].A.norm(dim=1)
        assert_close(white.slots()[name].A, ratio[:, None] * slot.A, atol=1e-5, rtol=1e-4)
        assert (ratio.diff() > 0).all()  # a smaller singular value makes a longer row
    attention = [white.slots()[f"model.layers.0.self_attn.{part}_proj"].A for part in "qkv"]
    assert torch.equal(attention[0], attention[1]) and torch.equal(attention[0], attention[2])
    assert len({A.data_ptr() for A in attention}) == 3


def test_whitening_is_by_the_root_of_the_singular_values() -> None:
    batch = {"inputs": drawn(4, 12, 9) * 0.5 ** torch.arange(9.0)}
    (slot,) = attach(Regression(6, 9), batch, rank=3, rho=1, whiten=True, batches=1).slots().values()
    X = batch["inputs"].reshape(-1, 9)
    S = torch.linalg.svdvals(X - X.mean(0))[:3]
    assert_close(slot.A.norm(dim=1), 1 / S.sqrt(), atol=1e-5, rtol=1e-4)


def test_small_batches_are_collected_and_too_few_tokens_are_an_error() -> None:
    few = [{"inputs": drawn(1, 2, 9, seed=seed)} for seed in range(4)]
    assert attach(Regression(6, 9), *few, rank=3, rho=2).slots()  # six rows of three batches make a step
    with pytest.raises(InvalidInput, match=r"fewer than 6 tokens for layer\.\n.*use_label_mask"):
        attach(Regression(6, 9), *few, rank=3, rho=2, batches=2)


def test_data_that_never_settle_end_with_the_batches() -> None:
    drawn_batches = 0

    def calibration() -> Any:
        nonlocal drawn_batches
        for seed in range(1000):
            drawn_batches += 1
            yield {"inputs": drawn(2, 4, 9, seed=seed)}

    METHOD.attach(Regression(6, 9), EvaConfig(rank=3, tau=1.0, batches=7), AttachContext(calibration=calibration))
    assert drawn_batches <= 7 + 1  # and one to find shared inputs


def test_it_learns_what_the_leading_directions_carry_faster_than_lora() -> None:
    basis = torch.linalg.qr(drawn(16, 16))[0]
    x = drawn(8, 40, 16, seed=1) * torch.tensor([6.0, 5.0, 4.0] + [0.3] * 13) @ basis.T
    W = Regression(8, 16).layer.weight.detach()
    y = x @ (W + drawn(8, 3, seed=2) @ basis[:, :3].T / 4).T
    losses = {}
    for method, options in (("eva", {"rho": 1}), ("lora", {})):
        chosen = get_method(method)
        context = AttachContext(calibration=lambda: iter([{"inputs": x}]))
        adapted = chosen.attach(
            Regression(8, 16), chosen.config_type(rank=3, alpha=3, targets=("layer",), **options), context
        )
        optimiser = torch.optim.Adam(adapted.trainable().values(), lr=1e-2)
        for _ in range(10):
            optimiser.zero_grad()
            adapted.model(x, y).loss.backward()
            optimiser.step()
        losses[method] = adapted.model(x, y).loss.item()
    assert losses["eva"] < 0.8 * losses["lora"], losses


def test_a_rank_above_the_size_and_a_rho_below_one_are_refused() -> None:
    with pytest.raises(InvalidInput, match="rank 7 needs layers of 7"):
        attach(Regression(6, 9), {"inputs": drawn(2, 9, 9)}, rank=7)
    with pytest.raises(ValueError, match="rho"):
        EvaConfig(rho=0.5)
    with pytest.raises(InvalidInput, match="inputs of layer are not finite"):
        attach(Regression(6, 9), {"inputs": torch.full((2, 9, 9), torch.nan)}, rank=2)
