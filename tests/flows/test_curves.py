"""Curves drawn from measurements: no model is trained here."""

from statistics import fmean

import pytest

from cli.curve import statement
from flows.curve_plan import require_possible
from flows.curve_report import curve_picture
from flows.curves import Measurement, draw_curves
from infra.errors import InvalidInput
from training.evaluation.statistics import wilson_interval

SIZES = {"10": 10, "100": 100, "all": 1000}
BARE = {(base, task): 0.1 for base in ("old", "tuned") for task in ("a", "b")}


def measured(
    base: str, arm: str, task: str, right: dict[str, int], seeds: int = 3, metric: str = "exact_match"
) -> list[Measurement]:
    """`right` of 200 items at each budget; each further seed gets one more."""
    return [
        Measurement(
            base=base, arm=arm, task=task, budget=budget, examples=SIZES[budget], seed=seed, metric=metric,
            value=(number + seed) / 200, low=wilson_interval(number + seed, 200)[0],
            high=wilson_interval(number + seed, 200)[1], samples=200,
        )
        for seed in range(seeds)
        for budget, number in right.items()
    ]  # fmt: skip


STEEP = {"10": 100, "100": 180, "all": 190}
SLOW = {"10": 20, "100": 60, "all": 170}


def test_an_instruction_tuned_start_that_needs_less_is_seen_to() -> None:
    found = measured("old", "one each", "a", SLOW) + measured("tuned", "one each", "a", STEEP)
    slow, steep = draw_curves(found, BARE, {"a": 0.7}, 0.05)
    assert slow.enough is not None and steep.enough is not None
    assert (slow.enough.budget, steep.enough.budget) == ("all", "100")
    assert steep.area > slow.area
    assert steep.points[0].seeds == [0.5, 0.505, 0.51]


def test_without_a_reference_the_first_curves_largest_budget_sets_it_for_all() -> None:
    found = measured("old", "one each", "a", SLOW) + measured("tuned", "one each", "a", STEEP)
    slow, steep = draw_curves(found, BARE, None, 0.05)
    assert slow.reference == steep.reference == pytest.approx(fmean((170, 171, 172)) / 200 - 0.05)


def test_the_mean_over_tasks_is_the_mean_of_their_means_whatever_their_items() -> None:
    few = [
        m.model_copy(update={"samples": 20, "examples": m.examples // 2}) for m in measured("old", "joint", "b", SLOW)
    ]
    a, b, mean = draw_curves(measured("old", "joint", "a", STEEP) + few, BARE, None, 0.05)
    assert (a.task, b.task, mean.task) == ("a", "b", "mean of 2 tasks")
    assert [p.value for p in mean.points] == pytest.approx(
        [(x.value + y.value) / 2 for x, y in zip(a.points, b.points, strict=True)]
    )
    assert [p.examples for p in mean.points] == [7.5, 75, 750]
    assert (a.samples, b.samples, mean.samples) == (200, 20, 220)


def test_where_nothing_reaches_the_reference_nothing_is_enough() -> None:
    (curve,) = draw_curves(measured("old", "one each", "a", dict.fromkeys(SIZES, 100)), BARE, {"a": 0.7}, 0.05)
    assert curve.enough is None


def test_of_perplexity_the_upper_bound_has_to_be_below_the_reference() -> None:
    found = [
        m.model_copy(
            update={"metric": "perplexity", "value": 9 - 8 * m.value, "low": 9 - 8 * m.high, "high": 9 - 8 * m.low}
        )
        for m in measured("old", "one each", "a", STEEP)
    ]
    (curve,) = draw_curves(found, {("old", "a"): 9.0}, {"a": 3.0}, 0.05)
    assert curve.enough is not None and curve.enough.budget == "100"
    assert curve.enough.low < curve.enough.value < curve.enough.high <= 3.0
    assert 1 < curve.area < 9
    (own,) = draw_curves(found, {("old", "a"): 9.0}, None, 0.05)
    assert own.reference == pytest.approx(1.05 * own.points[-1].value)


def test_no_budget_is_judged_where_the_bare_base_reaches_the_reference_or_nothing_was_learnt() -> None:
    steep = measured("old", "one each", "a", STEEP)
    flat = measured("old", "one each", "a", dict.fromkeys(SIZES, 0), seeds=1)
    verdicts = []
    for found, bare, references in (
        (steep, 0.1, {"a": 0.7}),
        (steep, 0.1, {"a": 0.99}),
        (steep, 0.7, {"a": 0.7}),
        (flat, 0.0, None),
        (flat, 0.3, {"a": 0.2}),
    ):
        (curve,) = draw_curves(found, {("old", "a"): bare}, references, 0.05)
        assert (curve.enough is not None) == (curve.verdict == "enough")
        verdicts.append((curve.verdict, curve.reference))
    assert verdicts == [
        ("enough", 0.7),
        ("short", 0.99),
        ("bare", 0.7),
        ("nothing learnt", 0.0),
        ("nothing learnt", 0.2),
    ]


def test_a_statement_says_why_no_budget_is_judged() -> None:
    steep = measured("old", "one each", "a", STEEP)
    flat = measured("old", "one each", "a", dict.fromkeys(SIZES, 0), seeds=1)
    for found, bare, said in (
        (steep, 0.7, "zero examples are enough: the bare base has 70.0 % and reaches 70.0 %"),
        (flat, 0.0, "nothing was learnt: 1,000 examples lead to 0.0 %, and the bare base has 0.0 %"),
        (steep, 0.1, "100 examples (10% of the largest budget) are enough to reach 70.0 %"),
    ):
        (curve,) = draw_curves(found, {("old", "a"): bare}, {"a": 0.7}, 0.05)
        assert said in statement(curve)


def test_of_perplexity_a_bare_base_below_the_reference_needs_no_examples() -> None:
    found = [
        m.model_copy(update={"metric": "perplexity", "value": 9 - 8 * m.value})
        for m in measured("old", "one each", "a", STEEP)
    ]
    for bare, verdict in ((2.0, "bare"), (1.0, "nothing learnt")):
        (curve,) = draw_curves(found, {("old", "a"): bare}, {"a": 3.0}, 0.05)
        assert (curve.verdict, curve.enough) == (verdict, None)


@pytest.mark.parametrize(
    ("reference", "metric", "told"),
    [
        (70.0, "exact_match", "write --reference 0.7"),
        (-0.05, "rougeL", "0 to 1"),
        (1.01, "pass@1", "0 to 1"),
        (0.0, "perplexity", "below 1"),
    ],
)
def test_a_reference_that_no_score_can_be_is_refused(reference: float, metric: str, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        require_possible(reference, metric)


def test_references_that_a_score_can_be_are_taken() -> None:
    for reference, metric in ((0.0, "exact_match"), (1.0, "bleu"), (1.0, "perplexity"), (300.0, "perplexity")):
        require_possible(reference, metric)


def test_a_picture_is_a_png() -> None:
    found = measured("old", "one each", "a", SLOW) + measured("tuned", "joint", "a", STEEP)
    assert curve_picture("a", draw_curves(found, BARE, None, 0.05)).startswith(b"\x89PNG")
