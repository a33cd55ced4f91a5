import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import InvalidInput
from training.selection.coverage import nearest_neighbours
from training.selection.gotd import calibrated, choose
from training.selection.optimal_transport import solve

DIMENSIONS = 8


def cluster(size: int, centre: float, generator: torch.Generator, spread: float = 1.0) -> torch.Tensor:
    """Points around `centre` in every dimension."""
    return centre + spread * torch.randn(size, DIMENSIONS, generator=generator)


def problem(n: int, m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    pool = 1.5 * torch.randn(m, 3, generator=generator, dtype=torch.float64) + 0.5
    return target, pool, (target[:, None] - pool[None]).square().sum(2).numpy()


def nudged(m: int, j: int, mass: float) -> np.ndarray:
    """The pool's weights once `mass` has moved onto j, evenly from all others."""
    weights = np.full(m, (1 - mass * m / (m - 1)) / m)
    weights[j] = 1 / m + mass
    return weights / weights.sum()


def test_scores_are_what_moving_weight_does_to_the_linear_programmes_cost():
    target, pool, C = problem(7, 16, seed=0)
    scores = choose(target, pool, 1, epsilon=1e-6, tolerance=1e-4).scores
    a, mass = np.full(7, 1 / 7), 1e-5
    cost = ot.emd2(a, np.full(16, 1 / 16), C)
    moved = np.array([(ot.emd2(a, nudged(16, j, mass), C) - cost) / mass for j in range(16)])
    assert np.allclose(scores, moved, atol=1e-3)
    assert np.corrcoef(scores, moved)[0, 1] > 0.99
    assert (np.sign(scores) == np.sign(moved)).all()


def test_scores_are_what_moving_weight_does_to_the_entropic_cost():
    target, pool, C = problem(8, 20, seed=1)
    choice = choose(target, pool, 1, epsilon=0.1, tolerance=1e-9)
    epsilon, a = choice.transport.epsilon, np.full(8, 1 / 8)

    def cost(b: np.ndarray) -> float:
        plan = ot.bregman.sinkhorn_log(a, b, C, epsilon, numItermax=20_000, stopThr=1e-14)
        return float((plan * C).sum() + epsilon * (plan * np.log(plan / np.outer(a, b))).sum())

    mass = 1e-4
    moved = np.array([(cost(nudged(20, j, mass)) - cost(nudged(20, j, -mass))) / (2 * mass) for j in range(20)])
    assert np.allclose(choice.scores, moved, atol=1e-4 * np.abs(moved).max())


@given(st.lists(st.integers(-100, 100), min_size=2, max_size=20), st.integers(-1000, 1000))
def test_calibration_keeps_the_order_and_drops_the_constant(values, constant):
    g = torch.tensor(values, dtype=torch.float64)
    scores = calibrated(g)
    others = [(sum(values) - value) / (len(values) - 1) for value in values]
    assert np.allclose(scores, np.array(values) - others)
    assert np.allclose(calibrated(g + constant), scores)
    assert (np.argsort(scores, kind="stable") == np.argsort(values, kind="stable")).all()


def test_permuting_the_pool_permutes_the_choice():
    target, pool, _ = problem(6, 100, seed=2)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3))
    straight, permuted = (choose(target, rows, 30, tolerance=1e-8) for rows in (pool, pool[order]))
    assert order[permuted.rows].tolist() == straight.rows.tolist()


def test_copies_are_chosen_in_the_order_of_their_rows():
    target, pool, _ = problem(5, 10, seed=4)
    best = choose(target, pool, 1).rows[0]
    copies = torch.cat([pool, pool[[best, best]]])
    assert choose(target, copies, 3).rows.tolist() == [best, 10, 11]


def test_the_domain_of_the_target_is_found_among_pretraining_and_outliers():
    generator = torch.Generator().manual_seed(5)
    pretraining, useful, outliers = (
        cluster(1600, 0, generator),
        cluster(200, 3, generator),
        cluster(200, -20, generator),
    )
    pool = torch.cat([pretraining, useful, outliers])
    target = cluster(150, 3, generator)
    for order in (torch.arange(2000), torch.randperm(2000, generator=generator)):
        kinds = order[choose(target, pool[order], 200).rows] // 200  # 0 to 7 pretraining, 8 useful, 9 outliers
        assert (kinds == 8).float().mean() >= 0.9
        assert (kinds == 9).sum() == 0


def test_the_part_of_the_target_that_the_pool_lacks_is_preferred_where_neighbours_take_what_it_has():
    generator = torch.Generator().manual_seed(6)
    covered, lacking = cluster(1000, 3, generator), cluster(100, -3, generator)
    pool = torch.cat([covered, lacking, cluster(900, 0, generator)])
    target = torch.cat([cluster(100, 3, generator), cluster(100, -3, generator)])
    chosen, nearest = choose(target, pool, 80).rows, nearest_neighbours(target, pool, 80)
    assert ((chosen >= 1000) & (chosen < 1100)).mean() >= 0.95
    assert ((nearest >= 1000) & (nearest < 1100)).mean() <= 0.6


def test_away_chooses_what_toward_would_choose_last():
    target, pool, _ = problem(10, 60, seed=7)
    toward, away = (choose(target, pool, 60, direction=direction) for direction in ("toward", "away"))
    assert toward.rows.tolist() == away.rows.tolist()[::-1]
    assert away.scores[away.rows[0]] == away.scores.max()


@pytest.mark.parametrize(
    ("budget", "message"), [(61, "budget is 61, but the pool holds 60 candidates"), (0, "budget of 0"), (-3, "of -3")]
)
def test_a_budget_that_cannot_be_met_is_refused(budget, message):
    target, pool, _ = problem(10, 60, seed=8)
    with pytest.raises(InvalidInput, match=message):
        choose(target, pool, budget)


def test_what_the_solver_refuses_is_refused():
    target, pool, _ = problem(10, 60, seed=9)
    pool[13, 0] = math.nan
    with pytest.raises(InvalidInput, match="Row 13 of the candidate pool's"):
        choose(target, pool, 5)
    with pytest.raises(InvalidInput, match="no candidates"):
        choose(target, pool[:0], 5)
    with pytest.raises(InvalidInput, match="2 dimensions, the pool's 3"):
        choose(target[:, :2], pool, 5)


def test_a_choice_says_when_its_potentials_are_approximate():
    target, pool, _ = problem(10, 60, seed=10)
    assert "not converged" in choose(target, pool, 5, tolerance=1e-30).transport.warning
    assert choose(target, pool, 5).transport.warning == ""


def test_the_sample_that_the_solution_begins_on_does_not_decide_the_choice():
    target, pool, _ = problem(4, 3001, seed=11)
    chosen = [choose(target, pool, 50, tolerance=1e-8, seed=seed).rows.tolist() for seed in (0, 1)]
    assert chosen[0] == chosen[1]
    assert solve(target, pool, seed=0).passes % 1
