"""Intervals and tests against SciPy and published numbers."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest
from scipy import stats

from tests.training.evaluation.test_text_metrics import near, sentences
from training.evaluation.aggregate import statistic_of
from training.evaluation.statistics import (
    bootstrap_perplexity,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_difference_interval,
    sign_flip_test,
    wilson_interval,
)
from training.evaluation.text_metrics import text_scores


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


def test_sign_flip_test_is_scipys_permutation_test() -> None:
    gaps = np.random.default_rng(2).normal(0.35, 1.0, 11)
    exact = stats.permutation_test(
        (gaps,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    ).pvalue
    assert sign_flip_test(gaps.tolist(), seed=0) == pytest.approx(exact, abs=0.015)


def test_sign_flip_test_never_reports_zero() -> None:
    assert 0 < sign_flip_test([1.0] * 60, seed=0) <= 1e-3
    assert sign_flip_test([0.0] * 5, seed=0) == 1.0


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


def means(scores: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda places: float(scores[places].mean())


def test_equal_systems_are_rarely_found_to_differ_and_unequal_ones_often() -> None:
    """Noise of both on the same items: at α = 0.05 about 5 % of 300 pairs; half a standard deviation apart, most."""
    generator = np.random.default_rng(1)
    equal, unequal = 0, 0
    for trial in range(300):
        hardness = generator.normal(size=60)
        a, b = hardness + generator.normal(size=60), hardness + generator.normal(size=60)
        equal += paired_bootstrap(means(a), means(b), 60, seed=trial, resamples=200).p_value <= 0.05
        unequal += paired_bootstrap(means(a + 0.6), means(b), 60, seed=trial, resamples=200).p_value <= 0.05
    assert equal <= 25  # of 300 at 5 %: 15 ± 3.8
    assert unequal > 200


def test_the_paired_bootstrap_agrees_with_the_t_test_and_its_interval() -> None:
    generator = np.random.default_rng(3)
    a = generator.normal(size=300)
    b = a + generator.normal(0.12, 1.0, size=300)
    found = paired_bootstrap(means(a), means(b), 300, seed=0)
    exact = stats.ttest_rel(a, b)
    interval = exact.confidence_interval(0.95)
    assert found.difference == pytest.approx((a - b).mean())
    assert found.p_value == pytest.approx(exact.pvalue, abs=0.02)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.02)


def test_a_system_does_not_differ_from_itself() -> None:
    scores = np.random.default_rng(0).random(30)
    found = paired_bootstrap(means(scores), means(scores), 30, seed=0)
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_corpus_bleus_are_compared_as_sacrebleu_compares_them() -> None:
    """Its own paired bootstrap resamples the same sufficient statistics; only the draws differ."""
    references = sentences(60, seed=8)
    answers = {"a": near(references, seed=9), "b": near(near(references, seed=10), seed=11)}
    _, told = PairedTest(list(answers.items()), {"BLEU": BLEU()}, [references], test_type="bs", n_samples=1000)()
    theirs = told["BLEU"][1]
    a, b = (text_scores("bleu", answers[name], [[r] for r in references]) for name in "ab")
    found = paired_bootstrap(
        statistic_of("bleu", a.of_items, a.components), statistic_of("bleu", b.of_items, b.components), 60, seed=0
    )
    assert 100 * found.difference == pytest.approx(told["BLEU"][0].score - theirs.score, abs=1e-9)
    assert found.p_value == pytest.approx(theirs.p_value, abs=0.02)
    assert found.low < found.difference < found.high
