"""The same merges by peft's `add_weighted_adapter` where it implements the same, and how it differs where it does not.

peft's "ties", "dare_linear", "dare_ties" and "magnitude_prune" without "_svd" work on A and on B each by itself, which
is no merge of updates; there is nothing here to compare them with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.merge_utils import magnitude_prune, prune, ties
from torch import Tensor
from torch.testing import assert_close

from tests.tiny_models import tiny_llama
from tests.training.merging.adapters import trained, updates, write
from training.merging.adapter import Adapter
from training.merging.dare import Dare
from training.merging.factors import Factors
from training.merging.linear import Linear
from training.merging.merge import merge
from training.merging.method import MergeMethod
from training.merging.ties import Ties, elected, trimmed

EQUAL = [trained(seed, rank=4, alpha=6, targets=["q_proj", "down_proj"]) for seed in range(3)]
MIXED = [
    trained(0, rank=3, alpha=5, targets=["q_proj", "down_proj"]),
    trained(1, rank=2, targets=["q_proj", "v_proj"]),
]
FULL = 32  # the rank of every update on the tiny Llama


def by_peft(
    adapters: Sequence[Adapter], weights: Sequence[float], directory: Path, **options: Any
) -> dict[str, Tensor]:
    """ΔW of each layer as peft merges them."""
    folders = [write(adapter, directory / str(number)) for number, adapter in enumerate(adapters)]
    model = PeftModel.from_pretrained(tiny_llama(), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=str(number))
    model.add_weighted_adapter([str(number) for number in range(len(folders))], list(weights), "made", **options)
    layers = {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    return {name: layer.get_delta_weight("made").detach() for name, layer in layers.items() if "made" in layer.lora_A}


def compare(adapters: Sequence[Adapter], method: MergeMethod, theirs: dict[str, Tensor], times: float = 1.0) -> None:
    ours = updates(merge(adapters, method))
    assert ours.keys() == theirs.keys()
    for place, update in theirs.items():
        assert_close(times * ours[place], update.double(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5), (0.7, -0.4)])
def test_cat_is_the_weighted_sum(weights: tuple[float, float], tmp_path: Path) -> None:
    compare(MIXED, Linear(weights=weights), by_peft(MIXED, weights, tmp_path, combination_type="cat"))


@pytest.mark.parametrize("rank", [1, 4, 16])  # peft fails above the least of m and n
def test_svd_is_the_weighted_sum_cut_to_a_rank(rank: int, tmp_path: Path) -> None:
    weights = (0.7, -0.4)
    theirs = by_peft(MIXED, weights, tmp_path, combination_type="svd", svd_rank=rank)
    compare(MIXED, Linear(weights=weights, rank=rank), theirs)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.2, -0.3)])
def test_what_peft_calls_linear_is_the_mean_of_factors(weights: tuple[float, ...], tmp_path: Path) -> None:
    theirs = by_peft(EQUAL, weights, tmp_path, combination_type="linear")
    compare(EQUAL, Factors(weights=weights), theirs)
    exact = updates(merge(EQUAL, Linear(weights=weights)))
    assert all((theirs[place] - exact[place]).norm() > 0.3 * exact[place].norm() for place in exact)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_svd_elects_by_mass_as_here(density: float, tmp_path: Path) -> None:
    theirs = by_peft(EQUAL, (1, 1, 1), tmp_path, combination_type="ties_svd", density=density, svd_rank=FULL)
    compare(EQUAL, Ties(density=density, rank=FULL), theirs)


def test_ties_svd_elects_by_frequency_as_here_where_it_is_decided(tmp_path: Path) -> None:
    options = {"combination_type": "ties_svd", "density": 1.0, "svd_rank": FULL, "majority_sign_method": "frequency"}
    theirs = by_peft(EQUAL, (1, 1, 1), tmp_path, **options)
    compare(EQUAL, Ties(density=1, rank=FULL, vote="frequency"), theirs)


def test_where_the_number_decides_nothing_peft_takes_the_positive_sign_and_this_the_larger_mass() -> None:
    a, b = torch.tensor([1.0, 3.0, -2.0]), torch.tensor([-3.0, -1.0, 2.0])
    assert ties([a, b], torch.ones(2), 1.0, "frequency").tolist() == [1, 3, 2]
    assert elected([a, b], [1, 1], "frequency").tolist() == [-3, 3, 0]


def test_weights_scale_pefts_ties_and_only_weigh_in_this(tmp_path: Path) -> None:
    theirs = by_peft(EQUAL, (2, 2, 2), tmp_path, combination_type="ties_svd", density=0.5, svd_rank=FULL)
    compare(EQUAL, Ties(density=0.5, rank=FULL, weights=(2, 2, 2)), theirs, times=2.0)
    compare(EQUAL, Ties(density=0.5, rank=FULL, weights=(2, 2, 2), scale=2.0), theirs)


def test_dare_keeps_everything_at_density_one_as_pefts(tmp_path: Path) -> None:
    weights = (0.5, 0.3, -0.2)
    options = {"density": 1.0, "svd_rank": FULL}
    theirs = by_peft(EQUAL, weights, tmp_path / "a", combination_type="dare_linear_svd", **options)
    compare(EQUAL, Dare(weights=weights, density=1, rank=FULL), theirs)
    theirs = by_peft(EQUAL, (1, 1, 1), tmp_path / "b", combination_type="dare_ties_svd", **options)
    compare(EQUAL, Dare(vote="mass", density=1, rank=FULL), theirs)


def test_dropped_entries_are_rescaled_as_pefts() -> None:
    update = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.manual_seed(0)
        theirs = prune(update, 0.3, "random", rescale=True)
    kept = theirs != 0
    assert_close(theirs[kept], update[kept] / 0.3)
    assert abs(float(kept.float().mean()) - 0.3) < 0.05


@pytest.mark.parametrize("density", [0.1, 0.33, 0.9])
def test_trimming_is_pefts_magnitude_prune(density: float, tmp_path: Path) -> None:
    parts = [torch.randn(13, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for part in parts:
        assert torch.equal(trimmed(part, density), prune(part, density, "magnitude"))
    theirs = magnitude_prune(parts, torch.tensor([0.5, -2.0]), density)
    assert_close(0.5 * trimmed(parts[0], density) - 2 * trimmed(parts[1], density), theirs)
    few = torch.tensor([3.0, 1.0])
    assert prune(few, 0.4, "magnitude").tolist() == [0, 0]  # int(0.8); here one entry stays
    assert trimmed(few, 0.4).tolist() == [3, 0]
