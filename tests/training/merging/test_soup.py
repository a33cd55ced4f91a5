"""Model soups: the checks of POINTS' sheet, on adapters."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from infra.errors import InvalidInput
from tests.training.merging.adapters import lora, updates, vectors
from training.merging.adapter import Adapter
from training.merging.factors import Factors
from training.merging.linear import Linear
from training.merging.merge import merge
from training.merging.soup import Tasting, greedy_soup
from training.methods.contract import check_fit


def point(name: str, *values: float) -> Adapter:
    return Adapter(name, {"peft_type": "REGRAFT_FULL"}, {"theta": torch.tensor(values)})


def by_table(table: dict[frozenset[str], float], adapters: list[Adapter]) -> Callable[[Adapter], float]:
    """Scores that were made up, of the mean of each subset; subsets are told by bits of a vector."""

    def score(adapter: Adapter) -> float:
        held = frozenset(a.name for place, a in enumerate(adapters) if adapter.tensors["theta"][place] > 0)
        return table[held]

    return score


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_a_soup_of_copies_is_the_identity(copies: int) -> None:
    source = lora("", 0, rank=3, alpha=5)
    merged = merge([Adapter(str(number), source.config, source.tensors) for number in range(copies)], Linear())
    assert_close(updates(merged), updates(source), rtol=0, atol=1e-6)
    full = vectors("", 0, {"layer.weight": (5, 6)}, kind="REGRAFT_FULL")
    merged = merge([Adapter(str(number), full.config, full.tensors) for number in range(copies)], Linear())
    check_fit("merged", full.tensors, merged.tensors)
    assert_close(dict(merged.tensors), dict(full.tensors), rtol=0, atol=1e-6)


def test_loading_needs_equal_keys_and_shapes() -> None:
    full = vectors("a", 0, {"layer.weight": (5, 6)}, kind="REGRAFT_FULL")
    with pytest.raises(InvalidInput, match="'a' has no tensor other"):
        merge([full, vectors("b", 0, {"layer.weight": (5, 6), "other": (2,)}, kind="REGRAFT_FULL")], Linear())
    with pytest.raises(InvalidInput, match=r"layer.weight is \(6, 5\) in adapter 'b', but \(5, 6\) in 'a'"):
        merge([full, vectors("b", 0, {"layer.weight": (6, 5)}, kind="REGRAFT_FULL")], Linear())


@pytest.mark.parametrize("seed", range(40))
def test_greedy_agrees_with_a_slow_reference_on_made_up_scores(seed: int) -> None:
    draw = random.Random(seed)
    names = "abcd"[: draw.randint(2, 4)]
    adapters = [point(name, *(float(name == other) for other in names)) for name in names]
    subsets = [frozenset(n for k, n in enumerate(names) if bits >> k & 1) for bits in range(1, 2 ** len(names))]
    table = {subset: float(draw.randint(0, 4)) for subset in subsets}  # few values: ties abound
    soup = greedy_soup(adapters, by_table(table, adapters))

    order = sorted(names, key=lambda name: (-table[frozenset(name)], names.index(name)))
    chosen = [order[0]]
    for name in order[1:]:
        if table[frozenset([*chosen, name])] >= table[frozenset(chosen)]:
            chosen.append(name)
    assert soup.ingredients == tuple(chosen)
    assert soup.score == table[frozenset(chosen)] >= max(table[frozenset(name)] for name in names)
    assert by_table(table, adapters)(soup.merged) == soup.score
    assert len(soup.tastings) == 2 * len(names) - 1
    assert all(table[frozenset(tasting.ingredients)] == tasting.score for tasting in soup.tastings)
    assert [each.ingredients[-1] for each in soup.tastings[len(names) :] if each.taken] == chosen[1:]


def test_the_planted_quadratic_of_three_domains() -> None:
    def left(adapter: Adapter) -> float:
        """The mean loss over three domains of two parameters each, as a share of that at the start, zero."""
        return float((adapter.tensors["theta"] - 1).square().mean())

    domains = [
        point(name, *(float(place // 2 == k) for place in range(6))) for k, name in enumerate(["one", "two", "three"])
    ]
    assert [left(each) for each in domains] == pytest.approx([2 / 3] * 3)
    assert left(merge(domains[:2], Linear())) == pytest.approx(1 / 2)
    assert left(merge(domains, Linear())) == pytest.approx(4 / 9)
    harmful = point("harmful", *[-1.0] * 6)
    soup = greedy_soup([harmful, *domains], lambda adapter: -left(adapter))
    assert set(soup.ingredients) == {"one", "two", "three"}
    assert soup.score == pytest.approx(-4 / 9)
    assert soup.tastings[-1].ingredients[-1] == "harmful" and not soup.tastings[-1].taken


def test_where_nothing_helps_the_best_adapter_is_the_soup() -> None:
    a, b = lora("a", 0), lora("b", 1)
    soup = greedy_soup([b, a], lambda adapter: {"a": 2.0, "b": 1.0}.get(adapter.name, 0.0))
    assert soup.ingredients == ("a",)
    assert soup.merged.tensors is a.tensors and soup.merged.config is a.config
    assert soup.tastings == (
        Tasting(("b",), 1.0, False),
        Tasting(("a",), 2.0, True),
        Tasting(("a", "b"), 0.0, False),
    )


def test_a_soup_of_loras_is_the_mean_of_their_updates_whatever_the_ranks() -> None:
    adapters = [lora("a", 0, rank=2, alpha=8), lora("b", 1, rank=3, alpha=1), lora("c", 2, rank=1)]
    soup = greedy_soup(adapters, lambda adapter: float(len(next(iter(adapter.tensors.values())))))  # of higher rank
    assert set(soup.ingredients) == {"a", "b", "c"}
    made, parts = updates(soup.merged), [updates(each) for each in adapters]
    for place in made:
        assert_close(made[place], torch.stack([part[place] for part in parts]).mean(0), rtol=0, atol=1e-6)
    alike = [lora(name, seed) for seed, name in enumerate("ab")]
    mean = torch.stack([updates(each)["model.layers.0.q_proj"] for each in alike]).mean(0)
    separate = updates(merge(alike, Factors()))["model.layers.0.q_proj"]
    assert (separate - mean).norm() > 0.1 * mean.norm()


def test_scores_are_of_what_is_kept() -> None:
    adapters = [lora("a", 0), lora("b", 1)]
    seen: list[Tensor] = []

    def score(adapter: Adapter) -> float:
        seen.append(next(iter(adapter.tensors.values())))
        return float(len(seen))

    soup = greedy_soup(adapters, score, Linear(rank=1))
    assert soup.merged.config["r"] == 1
    assert next(iter(soup.merged.tensors.values())) is seen[-1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_named(bad: float) -> None:
    with pytest.raises(InvalidInput, match=r"The score of a \+ b is"):
        greedy_soup([lora("a", 0), lora("b", 1)], lambda adapter: 1.0 if adapter.name in "ab" else bad)
    with pytest.raises(InvalidInput, match="uniform"):
        greedy_soup([lora("a", 0), lora("b", 1)], lambda _: 0.0, Linear(weights=(1, 1)))
