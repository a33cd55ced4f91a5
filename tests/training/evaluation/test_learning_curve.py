"""Budgets, intervals, and the number of examples that suffices, against curves whose truth is known."""

import math
from functools import cache
from itertools import pairwise
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad

from infra.errors import InvalidInput
from training.data.example import Example
from training.evaluation.learning_curve import (
    Budget,
    Point,
    Score,
    area,
    crossing,
    mean_of_seeds,
    mean_of_tasks,
    nested,
    read_budgets,
    share,
)
from training.evaluation.statistics import wilson_interval

BUDGETS = read_budgets("10,1%,100,200,1000,all")
POOL = [Example(f"{number} + 1", str(number + 1)) for number in range(2000)]
SIZES = {"10": 10, "1%": 20, "100": 100, "200": 200, "1000": 1000, "all": 2000}
ITEMS, SEEDS = 200, 3


@cache
def scored(right: int, items: int = ITEMS) -> Score:
    return share(right / items, items)


def study(truth: dict[str, float], rng: np.random.Generator, between: float = 0.0) -> list[Point]:
    """What a study finds where `truth` is the chance of a right answer; seeds differ by `between`."""
    points = []
    for label, chance in truth.items():
        of_seed = np.clip(chance + between * rng.standard_normal(SEEDS), 0, 1)
        runs = [scored(int(right)) for right in rng.binomial(ITEMS, of_seed)]
        points.append(Point(label, SIZES[label], mean_of_seeds(runs)))
    return points


def logistic(examples: int, middle: float, slope: float = 2.0) -> float:
    return 0.1 + 0.85 / (1 + math.exp(-slope * (math.log(examples) - math.log(middle))))


def test_budgets_are_nested_deterministic_and_of_the_right_sizes() -> None:
    first, again, other = nested(POOL, BUDGETS, 3), nested(list(reversed(POOL)), BUDGETS, 3), nested(POOL, BUDGETS, 4)
    assert {label: len(examples) for label, examples in first.items()} == SIZES
    sets = [set(examples) for examples in first.values()]
    assert all(smaller < larger for smaller, larger in pairwise(sets))
    assert [set(examples) for examples in again.values()] == sets
    assert set(other["100"]) != set(first["100"]) and set(other["all"]) == set(first["all"])


def test_a_task_that_is_smaller_than_a_budget_contributes_all_it_has() -> None:
    few = nested(POOL[:40], BUDGETS, 0)
    assert {label: len(examples) for label, examples in few.items()} == {
        "10": 10, "1%": 1, "100": 40, "200": 40, "1000": 40, "all": 40
    }  # fmt: skip


def test_budgets_are_read_from_a_line() -> None:
    assert read_budgets("10, 2.5%,all") == (Budget("10", examples=10), Budget("2.5%", share=0.025), Budget("all"))


@pytest.mark.parametrize("text", ["", "0", "-3", "101%", "0%", "1.5", "ten", "10,,all", "nan%", "10,10", "%"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="budget"):
        read_budgets(text)


@pytest.mark.parametrize("middle", [8, 60, 110, 500])
def test_the_crossing_of_a_known_logistic_curve_is_found_in_nine_studies_of_ten(middle: float) -> None:
    """The reference lies midway in the curve's longest step, so that the true budget is the one after it."""
    truth = {label: logistic(size, middle) for label, size in SIZES.items()}
    labels = sorted(truth, key=lambda label: SIZES[label])
    gaps = {b: truth[b] - truth[a] for a, b in pairwise(labels)}
    true = max(gaps, key=lambda label: gaps[label])
    reference = truth[true] - gaps[true] / 2
    rng = np.random.default_rng(int(middle))
    found = [crossing(study(truth, rng, between=0.01), reference) for _ in range(400)]
    assert fmean(point is not None and point.label == true for point in found) >= 0.9


def test_with_shuffled_labels_nothing_crosses() -> None:
    """Two classes, guessed: whatever the budget, half of the answers are right."""
    rng = np.random.default_rng(0)
    chance = dict.fromkeys(SIZES, 0.5)
    assert all(crossing(study(chance, rng, between=0.02), 0.7) is None for _ in range(400))


def test_a_reference_that_is_just_missed_is_taken_as_rarely_as_the_bound_promises() -> None:
    rng = np.random.default_rng(1)
    misses = dict.fromkeys(SIZES, 0.7)
    assert fmean(crossing(study(misses, rng), 0.7) is not None for _ in range(400)) <= 0.025 * len(SIZES)


@pytest.mark.parametrize("between", [0.0, 0.02, 0.1])
def test_the_interval_over_seeds_on_shared_items_covers_the_truth(between: float) -> None:
    """Items have difficulties that all seeds share; a seed adds its own luck."""
    rng, covered, studies = np.random.default_rng(2), 0, 600
    for _ in range(studies):
        difficulty = rng.beta(2, 1, ITEMS)  # its mean, 2/3, is the truth
        runs = []
        for _ in range(SEEDS):
            chance = np.clip(difficulty + between * rng.standard_normal(), 0, 1)
            runs.append(scored(int((rng.random(ITEMS) < chance).sum())))
        found = mean_of_seeds(runs)
        covered += found.low <= 2 / 3 <= found.high
    assert covered / studies >= 0.93


@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("alike", [1.0, 0.5])
@pytest.mark.parametrize("truth", [0.02, 0.5, 0.98])
def test_each_bound_holds_as_often_as_it_promises(truth: float, alike: float, seeds: int) -> None:
    """On a share `alike` of the items all seeds say the same, on the others each says its own."""
    rng, above, below, studies = np.random.default_rng(7), 0, 0, 500
    for _ in range(studies):
        common, own = rng.random(50) < truth, rng.random((seeds, 50)) < truth
        said = np.where(rng.random(50) < alike, common, own)
        found = mean_of_seeds([scored(int(each.sum()), 50) for each in said]).clipped(0.0, 1.0)
        above, below = above + (found.low > truth), below + (found.high < truth)
        assert 0 <= found.low <= found.value <= found.high <= 1
    assert max(above, below) / studies <= 0.025 + 3 * 0.007  # three standard errors of 500 studies


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("right", [0, 20])
def test_more_seeds_on_the_same_items_are_not_more_items(right: int, seeds: int) -> None:
    low, high = wilson_interval(right, 20)
    found = mean_of_seeds([share(right / 20, 20)] * seeds).clipped(0.0, 1.0)
    assert found.low <= low + 1e-12 and found.high >= high - 1e-12
    assert (found.low, found.high)[right == 20] == right / 20


@pytest.mark.parametrize(("right", "items"), [(0, 20), (1, 20), (20, 20), (4, 200), (100, 200), (199, 200), (1, 1)])
def test_the_bounds_of_a_share_are_the_wider_of_scipys_exact_ones_and_wilsons(right: int, items: int) -> None:
    of = [stats.binomtest(right, items).proportion_ci(0.95, method=method) for method in ("exact", "wilson")]
    found = share(right / items, items)
    assert found.low == pytest.approx(min(each.low for each in of), abs=1e-9)
    assert found.high == pytest.approx(max(each.high for each in of), abs=1e-9)


def test_one_seed_keeps_its_own_interval_and_equal_seeds_that_of_the_items() -> None:
    one = scored(150)
    for seeds in (1, 3):
        same = mean_of_seeds([one] * seeds)
        assert (same.value, same.low, same.high) == pytest.approx((one.value, one.low, one.high))


def test_two_seeds_that_disagree_leave_much_open() -> None:
    """By hand: v = (0.1/1.95996)² below and (0.2/1.95996)² above, s²/k = 0.01; t of 1·(V/0.01)² degrees of freedom."""
    found = mean_of_seeds([Score(0.4, 0.3, 0.6), Score(0.6, 0.5, 0.8)])
    below, above = ((distance / 1.959964) ** 2 + 0.01 for distance in (0.1, 0.2))
    down, up = (stats.t.ppf(0.975, (total / 0.01) ** 2) * math.sqrt(total) for total in (below, above))
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - down, 0.5 + up))


def test_over_tasks_the_mean_of_means_counts_not_the_mean_of_items() -> None:
    found = mean_of_tasks([Score(1.0, 0.7, 1.0), Score(0.0, 0.0, 0.4)])
    assert (found.low, found.value, found.high) == pytest.approx((0.5 - 0.3 / 2, 0.5, 0.5 + 0.4 / 2))


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 1)), min_size=2, max_size=8, unique_by=lambda p: p[0]))
def test_the_area_is_the_integral_over_the_logarithm(found: list[tuple[int, float]]) -> None:
    points = [Point(str(n), n, Score(value, value, value)) for n, value in found]
    logs = sorted((math.log(n), value) for n, value in found)
    xs, ys = zip(*logs, strict=True)
    whole = sum(
        quad(lambda x, a=a, b=b, ya=ya, yb=yb: ya + (yb - ya) * (x - a) / (b - a), a, b)[0]
        for (a, ya), (b, yb) in pairwise(logs)
    )
    assert area(points) == pytest.approx(whole / (xs[-1] - xs[0]), abs=1e-9)
    assert min(ys) - 1e-12 <= area(points) <= max(ys) + 1e-12


def test_the_area_of_one_budget_is_its_score_and_a_budget_twice_counts_once() -> None:
    one = Point("10", 10, Score(0.3, 0.2, 0.4))
    assert area([one]) == 0.3
    assert area([one, Point("1%", 10, one.score), Point("all", 100, Score(0.7, 0.6, 0.8))]) == pytest.approx(0.5)


def test_the_smallest_budget_that_suffices_is_taken_in_whatever_order_they_come() -> None:
    points = [
        Point("all", 50, Score(0.9, 0.8, 1.0)),
        Point("10", 10, Score(0.8, 0.75, 0.9)),
        Point("1", 1, Score(0, 0, 0)),
    ]
    assert crossing(points, 0.75) == points[1]
    assert crossing(points, 0.81) is None
