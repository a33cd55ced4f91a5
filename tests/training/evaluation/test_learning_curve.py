"""Budgets, intervals, and the number of examples that suffices, against curves whose truth is known."""

import math
from itertools import pairwise
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
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
)
from training.evaluation.statistics import wilson_interval

BUDGETS = read_budgets("10,1%,100,200,1000,all")
POOL = [Example(f"{number} + 1", str(number + 1)) for number in range(2000)]
SIZES = {"10": 10, "1%": 20, "100": 100, "200": 200, "1000": 1000, "all": 2000}
ITEMS, SEEDS = 200, 3


def scored(right: int) -> Score:
    return Score(right / ITEMS, *wilson_interval(right, ITEMS))


def study(truth: dict[str, float], rng: np.random.Generator, between: float = 0.0) -> list[Point]:
    """What a study finds where `truth` is the chance of a right answer; seeds differ by `between`."""
    points = []
    for label, share in truth.items():
        of_seed = np.clip(share + between * rng.standard_normal(SEEDS), 0, 1)
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


def test_one_seed_keeps_its_own_interval_and_equal_seeds_that_of_the_items() -> None:
    one = scored(150)
    assert mean_of_seeds([one]) == one
    same = mean_of_seeds([one, one, one])
    assert same.value == one.value and same.high - same.low == pytest.approx(one.high - one.low)


def test_two_seeds_that_disagree_leave_much_open() -> None:
    """By hand: v = ((0.2)/(2·1.95996))², s²/k = 0.01; t of 1·(V/0.01)² degrees of freedom."""
    from scipy.stats import t

    found = mean_of_seeds([Score(0.4, 0.3, 0.5), Score(0.6, 0.5, 0.7)])
    items = (0.1 / 1.959964) ** 2
    total = items + 0.01
    half = t.ppf(0.975, (total / 0.01) ** 2) * math.sqrt(total)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_over_tasks_the_mean_of_means_counts_not_the_mean_of_items() -> None:
    found = mean_of_tasks([Score(1.0, 0.9, 1.1), Score(0.0, -0.1, 0.1)])
    assert found.value == 0.5 and found.high - found.low == pytest.approx(0.2 / math.sqrt(2))


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
