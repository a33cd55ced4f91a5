"""Intervals and tests against SciPy and published numbers."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest
from scipy import stats

from infra.sign_flips import sign_flip_test
from tests.training.evaluation.test_text_metrics import near, sentences
from training.evaluation.aggregate import statistic_of
from training.evaluation.statistics import (
    bootstrap_perplexity,
    difference_interval,
    holm,
    mcnemar,
    mean_interval,
    paired_difference_interval,
    paired_means,
    paired_swaps,
    spread,
    wilson_interval,
)
from training.evaluation.text_metrics import TextScores, corpus_score, text_scores


@pytest.mark.parametrize(("right", "samples"), [(0, 200), (200, 200), (1, 1), (0, 1), (43, 200), (148, 200), (7, 9)])
def test_wilson_interval_is_scipys(right: int, samples: int) -> None:
    wanted = stats.binomtest(right, samples).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(right, samples) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_wilson_interval_of_newcombes_example() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3)."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (5, 1), (1, 5), (12, 12), (120, 15), (3, 0), (400, 380)])
def test_mcnemar_is_scipys_exact_binomial_test(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    wanted = stats.binomtest(only_a, n, 0.5).pvalue if n else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(wanted, rel=1e-9)


def test_paired_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    """Exact coverage, summed over all outcomes of 30 pairs with P(only a) = 0.3, P(only b) = 0.1."""
    n, p, q = 30, 0.3, 0.1
    covered = sum(
        stats.multinomial.pmf([a, b, n - a - b], n, [p, q, 1 - p - q])
        for a in range(n + 1)
        for b in range(n + 1 - a)
        if (interval := paired_difference_interval(a, b, n))[0] <= p - q <= interval[1]
    )
    assert 0.93 < covered < 0.98


def test_bootstrap_interval_is_near_the_delta_method() -> None:
    generator = np.random.default_rng(5)
    tokens = generator.integers(1, 6, 400)
    losses = tokens * generator.gamma(4.0, 0.25, 400)
    rate = losses.sum() / tokens.sum()
    residual = losses - rate * tokens
    error = math.exp(rate) * math.sqrt((residual**2).sum()) / tokens.sum()
    found = bootstrap_perplexity(losses.tolist(), tokens.tolist(), seed=0)
    assert found.stderr == pytest.approx(error, rel=0.1)
    assert found.low == pytest.approx(math.exp(rate) - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(math.exp(rate) + 1.96 * error, abs=0.3 * error)


def test_bootstrap_depends_on_its_seed_alone() -> None:
    losses, tokens = [1.0, 2.5, 0.3, 4.0], [1, 2, 1, 3]
    np.random.seed(1)
    first = bootstrap_perplexity(losses, tokens, seed=7)
    assert bootstrap_perplexity(losses, tokens, seed=7) == first
    assert bootstrap_perplexity(losses, tokens, seed=8) != first


def test_bootstrap_of_a_hopeless_model_stays_finite() -> None:
    assert math.isfinite(bootstrap_perplexity([900.0, 950.0], [1, 1], seed=0).high)


def test_holm_is_the_table_by_hand() -> None:
    """0.01 × 4; 0.02 × 3 = 0.06; 0.03 × 2 = 0.06, no less than the one before; 0.5 × 1."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.02, 0.04, 0.03]) == pytest.approx([0.06, 0.06, 0.06])  # 0.04 × 1 is held up by those before it
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_plain_values_and_bonferronis_and_keeps_their_order(values: list[float]) -> None:
    corrected = holm(values)
    assert all(p <= q <= min(1.0, len(values) * p) for p, q in zip(values, corrected, strict=True))
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(np.asarray(corrected)[order]) >= 0)


@pytest.mark.parametrize(("right", "samples"), [(0, 20), (20, 20), (1, 1), (3, 10), (150, 200)])
def test_the_interval_of_a_mean_of_zeros_and_ones_is_clopper_and_pearsons(right: int, samples: int) -> None:
    wanted = stats.binomtest(right, samples).proportion_ci(confidence_level=0.95, method="exact")
    found = mean_interval([1.0] * right + [0.0] * (samples - right))
    assert found == pytest.approx((wanted.low, wanted.high), abs=0.012)  # of 10,000 draws


def test_the_interval_of_a_mean_is_students_where_there_are_many_and_no_point_where_they_are_equal() -> None:
    values = np.random.default_rng(1).beta(2, 5, 2000)
    wanted = stats.t.interval(0.95, 1999, values.mean(), stats.sem(values))
    assert mean_interval(values.tolist()) == pytest.approx(wanted, abs=0.001)
    low, high = mean_interval([0.0] * 10)
    assert low == 0 and high == pytest.approx(1 - 0.025**0.1, abs=0.012)
    for few in ([0.4], [0.4] * 20):
        low, high = mean_interval(few)
        assert low < 0.4 < high
        assert mean_interval([2 * value for value in few], most=2.0) == pytest.approx((2 * low, 2 * high))


@pytest.mark.parametrize("samples", [3, 10, 40])
@pytest.mark.parametrize(("a", "b"), [(0.2, 2.0), (20.0, 4.0), (1.0, 1.0)])
def test_the_interval_of_a_mean_covers_it_whatever_the_scores_look_like(a: float, b: float, samples: int) -> None:
    generator, below, above = np.random.default_rng(3), 0, 0
    for _ in range(120):
        low, high = mean_interval(generator.beta(a, b, samples).tolist())
        below, above = below + (high < a / (a + b)), above + (low > a / (a + b))
    assert max(below, above) <= 8  # each of 120 at 2.5 %: 3 ± 1.7


def test_a_resampled_interval_is_wider_where_the_items_are_few() -> None:
    """The percentiles by hand: of five items Φ(−√(5/4)·2.776) = 0.095 %, of many 2.5 %."""
    values = np.arange(100_001) / 1000.0
    assert spread(values, 5).low == pytest.approx(0.0955, abs=0.001)
    assert spread(values, 100_000).low == pytest.approx(2.5, abs=0.001)


@pytest.mark.parametrize("items", [6, 9, 30])
def test_the_interval_of_a_difference_holds_what_the_sign_flip_test_does_not_reject(items: int) -> None:
    d = np.random.default_rng(items).normal(0.3, 1.0, items)
    low, high = difference_interval(d.tolist())
    assert low < d.mean() < high
    for end, inside, outside in ((low, 1e-6, -1e-6), (high, -1e-6, 1e-6)):
        assert sign_flip_test((d - end - inside).tolist()) > 0.05 - 4e-3
        assert sign_flip_test((d - end - outside).tolist()) <= 0.05 + 4e-3


def test_the_interval_of_a_difference_is_students_where_there_are_many() -> None:
    d = np.random.default_rng(3).normal(0.12, 1.0, 300)
    assert difference_interval(d.tolist()) == pytest.approx(
        stats.t.interval(0.95, 299, d.mean(), stats.sem(d)), abs=0.01
    )


def test_few_items_or_equal_differences_give_no_interval() -> None:
    assert difference_interval([0.052]) is None
    assert difference_interval([0.1, 0.2, 0.3, 0.4, 0.5]) is None
    assert difference_interval([0.1] * 30) is None
    found = paired_means([0.052])
    assert (found.difference, found.p_value) == (0.052, 1.0)


def corpus_bleus(items: int) -> tuple[TextScores, TextScores, list[str], dict[str, list[str]]]:
    references = sentences(items, seed=8)
    answers = {"a": near(references, seed=9), "b": near(near(references, seed=10), seed=11)}
    a, b = (text_scores("bleu", answers[name], [[r] for r in references]) for name in "ab")
    return a, b, references, answers


def test_corpus_bleus_are_compared_as_sacrebleu_compares_them() -> None:
    """Its own approximate randomization swaps the same sufficient statistics; only the draws differ."""
    a, b, references, answers = corpus_bleus(60)
    _, told = PairedTest(list(answers.items()), {"BLEU": BLEU()}, [references], test_type="ar", n_samples=5000)()
    theirs = told["BLEU"][1]
    found = paired_swaps(statistic_of("bleu", a.of_items + b.of_items, a.components + b.components), 60)
    assert 100 * found.difference == pytest.approx(told["BLEU"][0].score - theirs.score, abs=1e-9)
    assert found.p_value == pytest.approx(theirs.p_value, abs=0.02)
    assert found.low < found.difference < found.high


def test_two_corpora_of_few_items_are_swapped_in_all_ways() -> None:
    a, b, _, _ = corpus_bleus(5)
    rows = np.array([a.components, b.components])
    gaps = [
        corpus_score("bleu", rows[list(ways), range(5)].sum(axis=0))
        - corpus_score("bleu", rows[[1 - way for way in ways], range(5)].sum(axis=0))
        for ways in product((0, 1), repeat=5)
    ]
    found = paired_swaps(statistic_of("bleu", (), a.components + b.components), 5)
    assert found.p_value == np.mean([abs(gap) >= abs(gaps[0]) - 1e-12 for gap in gaps]) >= 2 / 32
    assert (found.low, found.high) == (None, None)
