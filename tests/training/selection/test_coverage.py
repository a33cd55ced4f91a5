from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import InvalidInput
from training.selection import coverage
from training.selection.coverage import k_centre, nearest_neighbours


def points(rows: int, seed: int, dimensions: int = 3) -> torch.Tensor:
    return torch.randn(rows, dimensions, generator=torch.Generator().manual_seed(seed))


def radius(pool: torch.Tensor, chosen) -> float:
    """The farthest that any row is from its nearest chosen one."""
    return float(torch.cdist(pool, pool[list(chosen)]).min(1).values.max())


@given(rows=st.integers(2, 9), budget=st.integers(1, 9), seed=st.integers(0, 1000))
def test_k_centres_radius_is_at_most_twice_the_best(rows, budget, seed):
    pool, budget = points(rows, seed), min(budget, rows)
    chosen = k_centre(pool, budget, seed=seed)
    assert len(set(chosen.tolist())) == budget
    best = min(radius(pool, each) for each in combinations(range(rows), budget))
    assert radius(pool, chosen) <= 2 * best + 1e-6


def test_k_centre_takes_the_farthest_each_time():
    pool = points(300, seed=0)
    chosen = k_centre(pool, 12, seed=1).tolist()
    for number in range(1, 12):
        distances = torch.cdist(pool, pool[chosen[:number]]).min(1).values
        assert chosen[number] == int(distances.argmax())
    assert chosen == k_centre(pool.numpy(), 12, seed=1).tolist()
    assert chosen[:5] == k_centre(pool, 5, seed=1).tolist()


def test_k_centre_visits_every_cluster_before_a_second_row_of_one():
    centres = 100 * torch.eye(6)
    pool = (centres[:, None] + 0.1 * points(6 * 20, 2, 6).view(6, 20, 6)).view(-1, 6)
    assert sorted(k_centre(pool, 6) // 20) == list(range(6))


def test_k_centre_of_copies_still_chooses_different_rows():
    assert sorted(k_centre(torch.ones(4, 2), 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("budget", [1, 5, 40, 100])
def test_neighbours_are_those_of_a_plain_round_robin(budget):
    target, pool = points(7, seed=3), points(100, seed=4)
    similarities = torch.nn.functional.cosine_similarity(target[:, None], pool[None], dim=2)
    order = similarities.argsort(dim=1, descending=True).tolist()
    expected: list[int] = []
    for rank in range(100):
        for neighbours in order:
            if neighbours[rank] not in expected:
                expected.append(neighbours[rank])
    assert nearest_neighbours(target, pool, budget).tolist() == expected[:budget]


def test_neighbours_do_not_hang_on_the_blocks(monkeypatch):
    target, pool = points(7, seed=5), points(500, seed=6)
    whole = nearest_neighbours(target, pool, 120).tolist()
    monkeypatch.setattr(coverage, "_BLOCK_NUMBERS", 7 * 13)
    assert nearest_neighbours(target, pool.numpy(), 120).tolist() == whole


def test_k_centre_does_not_hang_on_the_blocks(monkeypatch):
    pool = points(500, seed=7)
    whole = k_centre(pool, 20).tolist()
    monkeypatch.setattr(coverage, "_BLOCK_ROWS", 33)
    assert k_centre(pool, 20).tolist() == whole


def test_targets_that_are_all_alike_still_fill_the_budget():
    pool = points(200, seed=8)
    assert len(set(nearest_neighbours(torch.ones(50, 3), pool, 150).tolist())) == 150


def test_chance_is_seeded_and_a_smaller_budget_is_part_of_a_larger():
    one, same, other = (coverage.random(1000, 100, seed).tolist() for seed in (1, 1, 2))
    assert one == same != other
    assert len(set(one)) == 100 and min(one) >= 0 and max(one) < 1000
    assert coverage.random(1000, 10, 1).tolist() == one[:10]
    counts = np.bincount(np.concatenate([coverage.random(5, 2, seed) for seed in range(2000)]), minlength=5)
    assert np.allclose(counts / 4000, 0.2, atol=0.03)


@pytest.mark.parametrize("budget", [0, 21])
def test_a_budget_that_cannot_be_met_is_refused(budget):
    pool = points(20, seed=9)
    for choose in (
        lambda: k_centre(pool, budget),
        lambda: nearest_neighbours(pool[:3], pool, budget),
        lambda: coverage.random(20, budget, 0),
    ):
        with pytest.raises(InvalidInput, match=f"udget .*{budget}"):
            choose()


def test_rows_that_are_not_finite_are_named():
    pool = points(20, seed=10)
    pool[17, 2] = float("nan")
    with pytest.raises(InvalidInput, match="Row 17 of the candidate pool's"):
        k_centre(pool, 3)
    with pytest.raises(InvalidInput, match="Row 17 of the candidate pool's"):
        nearest_neighbours(pool[:3], pool, 3)
    with pytest.raises(InvalidInput, match="Row 1 of the target's"):
        nearest_neighbours(pool[16:18], pool[:10], 3)
    with pytest.raises(InvalidInput, match="2 dimensions, the pool's 3"):
        nearest_neighbours(pool[:3, :2], pool, 3)
