"""The paired permutation test against SciPy's, and how often it is fooled by few items."""

import numpy as np
import pytest
from scipy import stats

from infra.sign_flips import sign_flip_test, sign_flip_tests


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
@pytest.mark.parametrize("pairs", [2, 5, 11, 12])
def test_few_differences_are_flipped_in_all_ways_as_scipy_does(pairs: int, alternative: str) -> None:
    gaps = np.random.default_rng(pairs).normal(0.35, 1.0, pairs)
    asked = {"permutation_type": "samples", "n_resamples": np.inf, "vectorized": True, "alternative": alternative}
    exact = stats.permutation_test((gaps,), lambda x, axis: x.sum(axis=axis), **asked).pvalue
    assert sign_flip_test(gaps.tolist(), one_sided=alternative == "greater") == pytest.approx(exact)


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
def test_many_differences_are_flipped_by_lot_and_agree_with_the_t_test(alternative: str) -> None:
    gaps = np.random.default_rng(4).normal(0.05, 1.0, 400)
    for margin in (-0.05, 0.0, 0.1):
        wanted = stats.ttest_1samp(gaps, margin, alternative=alternative).pvalue
        found = sign_flip_test((gaps - margin).tolist(), one_sided=alternative == "greater")
        assert found == pytest.approx(wanted, abs=0.02)


def test_of_right_and_wrong_it_is_mcnemars_test() -> None:
    gaps = [1.0] * 7 + [-1.0] * 1 + [0.0] * 4
    assert sign_flip_test(gaps) == pytest.approx(stats.binomtest(7, 8).pvalue)
    assert sign_flip_test(gaps, one_sided=True) == pytest.approx(stats.binomtest(7, 8, alternative="greater").pvalue)


def test_one_item_is_never_significant_and_no_p_value_is_0() -> None:
    assert sign_flip_test([0.05]) == 1.0
    assert sign_flip_test([0.05], one_sided=True) == 0.5
    assert sign_flip_test([0.1] * 5) == 2 / 32
    assert sign_flip_test([1.0] * 60) == 1e-4
    assert sign_flip_test([0.0] * 5) == sign_flip_test([0.0] * 50) == 1.0


@pytest.mark.parametrize("pairs", [2, 3, 5, 8, 20])
def test_equal_versions_are_found_to_differ_as_rarely_as_the_level_says(pairs: int) -> None:
    generator = np.random.default_rng(pairs)
    found = sign_flip_tests(generator.standard_t(3, (1000, pairs)).tolist())
    assert np.mean(np.array(found) <= 0.05) <= 0.07  # of 1,000 at 5 %: 0.05 ± 0.007


def test_a_real_difference_is_found() -> None:
    generator = np.random.default_rng(1)
    found = sign_flip_tests((0.6 + generator.normal(0, 2**0.5, (100, 60))).tolist())
    assert np.mean(np.array(found) <= 0.05) > 0.8


def test_several_rows_are_each_tested_as_if_alone() -> None:
    rows = np.random.default_rng(2).normal(0.2, 1.0, (4, 30)).tolist()
    assert sign_flip_tests(rows) == [sign_flip_test(row) for row in rows]
