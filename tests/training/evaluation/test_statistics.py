"""Intervals and tests against SciPy and published numbers."""

import math

import numpy as np
import pytest
from scipy import stats

from training.evaluation.statistics import (
    bootstrap_perplexity,
    mcnemar,
    paired_difference_interval,
    sign_flip_test,
    wilson_interval,
)


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
