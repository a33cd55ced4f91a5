"""Planted differences are found, chance ones are not, and every statistic is held against another source."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from infra.errors import CorruptArtifact, InvalidInput
from training.evaluation.reader_analysis import (
    Difference,
    Findings,
    analyse,
    krippendorff_alpha,
    sign_test,
    signed_rank_test,
    smallest_effect,
)
from training.evaluation.reader_ratings import Rating, Ratings
from training.evaluation.reader_study import Criterion, Design, Key, Study, blind

SCALE = (Criterion(name="quality"),)
NOTHING = float("nan")


def rated(scores: np.ndarray, preferred: np.ndarray | None = None) -> tuple[Study, Key, Ratings]:
    """A study in which reader r gives arm a's answer to item i `scores[r, i, a]`; NaN is no rating.

    Preferred are, unless told, the answers with an item's highest score.
    """
    readers, items, arms = scores.shape
    answers = {f"arm-{arm}": [f"{item}-{arm}" for item in range(items)] for arm in range(arms)}
    study, key = blind(
        Design(readers=readers, criteria=SCALE), [str(item) for item in range(items)], answers, "secret", "s"
    )
    marks = scores == np.nanmax(scores, axis=-1, keepdims=True) if preferred is None else preferred
    by_id = {
        name: Rating(
            scores={"quality": int(scores[p.reader, p.item, p.arm])}, preferred=bool(marks[p.reader, p.item, p.arm])
        )
        for name, p in key.answers.items()
        if np.isfinite(scores[p.reader, p.item, p.arm])
    }
    missing = {reader + 1: int(np.isnan(scores[reader]).sum()) for reader in range(readers)}
    return study, key, Ratings(asked="s", by_id=by_id, missing=missing, absent=())


def difference(found: Findings, measure: str = "quality", pair: tuple[str, str] = ("arm-0", "arm-1")) -> Difference:
    return next(d for d in found.differences if (d.measure, d.first, d.second) == (measure, *pair))


def noisy(seed: int, shift: tuple[float, ...], items: int = 40, readers: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    quality = rng.normal(5.5, 1.0, (1, items, 1)) + rng.normal(0, 1.0, (1, items, len(shift))) + np.array(shift)
    return np.clip(np.round(quality + rng.normal(0, 0.7, (readers, items, len(shift)))), 1, 10)


def test_a_planted_preference_is_found_and_the_right_way_round() -> None:
    found = analyse(*rated(noisy(0, (1.5, 0.0, 0.0))))
    for pair in (("arm-0", "arm-1"), ("arm-0", "arm-2")):
        for measure in ("quality", "preferred"):
            seen = difference(found, measure, pair)
            assert seen.corrected < 0.01
            assert seen.low > 0
            assert seen.wins > seen.losses
    assert difference(found, "quality", ("arm-1", "arm-2")).corrected > 0.05
    best = {mean.arm: mean for mean in found.means if mean.measure == "preferred"}
    assert best["arm-0"].low > best["arm-1"].high


def test_where_nothing_differs_hardly_a_study_finds_anything() -> None:
    """Family-wise error at 5 %: of 60 null studies at most 8 (P < 0.01 at 5 %) report a difference."""
    false = sum(
        any(d.corrected < 0.05 for d in analyse(*rated(noisy(seed, (0.0, 0.0, 0.0), items=12))).differences)
        for seed in range(60)
    )
    assert stats.binom.sf(8, 60, 0.05) < 0.01
    assert false <= 8


def test_means_and_shares_are_those_of_plain_loops() -> None:
    scores = noisy(3, (0.5, 0.0), items=9, readers=2)
    scores[1, 4, 0] = NOTHING
    study, key, ratings = rated(scores)
    found = analyse(study, key, ratings)
    of_items = [[v for v in scores[:, item, 0] if v == v] for item in range(9)]
    expected = sum(sum(each) / len(each) for each in of_items) / 9
    (mean,) = (m for m in found.means if (m.measure, m.arm) == ("quality", "arm-0"))
    assert mean.value == pytest.approx(expected)
    assert mean.low <= mean.value <= mean.high
    gaps = [np.mean([a - b for a, b in scores[:, item] if a == a]) for item in range(9)]
    seen = difference(found)
    assert seen.difference == pytest.approx(np.mean(gaps))
    assert (seen.wins, seen.losses, seen.ties) == (
        sum(g > 0 for g in gaps),
        sum(g < 0 for g in gaps),
        sum(g == 0 for g in gaps),
    )
    assert found.missing == 1


def test_a_preference_for_several_is_a_vote_shared_among_them() -> None:
    scores = np.full((1, 4, 3), 5.0)
    marks = np.array([[[1, 1, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1]]], dtype=bool)
    found = analyse(*rated(scores, marks))
    shares = {mean.arm: mean.value for mean in found.means if mean.measure == "preferred"}
    assert shares == pytest.approx(
        {"arm-0": (1 / 2 + 1 + 1 / 3) / 4, "arm-1": (1 / 2 + 1 / 3) / 4, "arm-2": (1 + 1 / 3) / 4}
    )
    seen = difference(found, "preferred")
    assert (seen.wins, seen.losses, seen.ties) == (1, 0, 3)
    assert seen.p_value == 1.0


def test_readers_of_one_item_count_as_one() -> None:
    """Ten readers who all say the same are no more evidence on 6 items than one: the least p is 2 / 2⁶."""
    scores = np.tile(np.array([6.0, 5.0]), (10, 6, 1))
    seen = difference(analyse(*rated(scores)))
    assert seen.p_value == pytest.approx(2 / 2**6)
    assert difference(analyse(*rated(scores)), "preferred").p_value == pytest.approx(2 / 2**6)


def test_the_signed_rank_test_is_that_of_all_assignments_of_signs() -> None:
    d = np.array([1.5, -0.5, 2.0, 0.0, 1.0, 1.0, -1.0, 3.0])
    ranks = stats.rankdata(np.abs(d)) * (d != 0)
    observed = abs((ranks * np.sign(d)).sum())
    sums = [abs((ranks * signs).sum()) for signs in itertools.product((-1, 1), repeat=len(d))]
    assert signed_rank_test(d) == pytest.approx(np.mean([s >= observed - 1e-9 for s in sums]))
    for items in (12, 50, 300):
        smooth = np.random.default_rng(items).normal(0.1, 1.0, items)
        assert signed_rank_test(smooth) == pytest.approx(stats.wilcoxon(smooth, method="exact").pvalue, rel=1e-9)
    assert signed_rank_test(np.zeros(5)) == 1.0
    assert signed_rank_test(np.array([])) == 1.0


def test_the_sign_test_is_exact() -> None:
    assert sign_test(8, 1) == pytest.approx(2 * (1 + 9) / 2**9)
    assert sign_test(0, 0) == 1.0


def test_alpha_is_that_of_krippendorffs_own_example() -> None:
    """Krippendorff, 'Computing Krippendorff's alpha-reliability' (2011), section E: four observers, twelve units."""
    observers = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, NOTHING, NOTHING, NOTHING],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NOTHING, 3],
            [NOTHING, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NOTHING],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NOTHING],
        ]
    )
    assert krippendorff_alpha(observers, "ordinal") == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(observers, "nominal") == pytest.approx(0.743, abs=5e-4)


def test_alpha_by_hand() -> None:
    """Two readers, nominal, four units: observed disagreement 2/8, expected (3·5 + 5·3)/(8·7), so 1 − 0.25/(30/56)."""
    units = np.array([[0.0, 0, 1, 1], [0.0, 1, 1, 1]])
    assert krippendorff_alpha(units, "nominal") == pytest.approx(1 - (2 / 8) / (30 / 56))


def test_agreement_is_one_of_readers_of_one_mind_and_undefined_where_there_is_nothing_to_agree_on() -> None:
    same = np.repeat(noisy(1, (1.0, 0.0), readers=1), 3, axis=0)
    for agreement in analyse(*rated(same)).agreement:
        assert (agreement.alpha, agreement.same) == (pytest.approx(1.0), 1.0)
    alone = analyse(*rated(noisy(1, (1.0, 0.0), readers=1)))
    assert {(a.alpha, a.same) for a in alone.agreement} == {(None, None)}
    assert any("One reader only" in warning for warning in alone.warnings)
    flat = analyse(*rated(np.full((2, 5, 2), 5.0)))
    assert [(a.alpha, a.same) for a in flat.agreement] == [(None, 1.0), (None, 1.0)]


def test_readers_at_random_agree_by_chance_alone() -> None:
    scores = np.random.default_rng(5).integers(1, 11, (4, 300, 2)).astype(float)
    for agreement in analyse(*rated(scores)).agreement:
        assert abs(agreement.alpha) < 0.06


@pytest.mark.parametrize("items", [20, 60])
def test_the_smallest_effect_is_found_in_four_studies_of_five(items: int) -> None:
    rng = np.random.default_rng(0)
    effect = smallest_effect(items, tests=1)
    p_values = [stats.wilcoxon(rng.normal(effect, 1.0, items)).pvalue for _ in range(1_500)]
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("items", "told"),
    [(4, "no test can come out significant"), (12, "no sign of equality"), (60, "missed more often than once in five")],
)
def test_a_small_study_says_so(items: int, told: str) -> None:
    found = analyse(*rated(noisy(0, (0.0, 0.0, 0.0), items=items)))
    assert any(told in warning for warning in found.warnings), found.warnings


def test_a_large_study_with_nothing_missing_warns_of_nothing() -> None:
    assert analyse(*rated(noisy(0, (0.0, 0.0), items=200))).warnings == ()


def test_what_does_not_belong_together_is_refused() -> None:
    study, key, ratings = rated(noisy(0, (0.0, 0.0)))
    swapped = {arm: 1 - place.arm for arm, place in key.answers.items()}
    forged = {name: place.model_copy(update={"arm": swapped[name]}) for name, place in key.answers.items()}
    with pytest.raises(CorruptArtifact, match="key"):
        analyse(study, key.model_copy(update={"answers": forged}), ratings)
    first = study.packets[0][0].model_copy(update={"text": "better"})
    edited = study.model_copy(update={"packets": ((first, *study.packets[0][1:]), *study.packets[1:])})
    with pytest.raises(CorruptArtifact, match=r"study\.json was changed"):
        analyse(edited, key, ratings)
    with pytest.raises(InvalidInput, match="another study's"):
        analyse(study, key, ratings.model_copy(update={"asked": "other"}))
    with pytest.raises(InvalidInput, match="0 items are rated"):
        analyse(study, key, ratings.model_copy(update={"by_id": {}}))


def test_an_arm_that_nobody_rated_is_left_out_not_counted_as_zero() -> None:
    scores = noisy(0, (0.0, 0.0, 0.0))
    scores[..., 2] = NOTHING
    found = analyse(*rated(scores))
    assert {m.arm for m in found.means if m.measure == "quality"} == {"arm-0", "arm-1"}
    unseen = difference(found, "quality", ("arm-0", "arm-2"))
    assert (unseen.wins, unseen.losses, unseen.ties, unseen.p_value) == (0, 0, 0, 1.0)


def test_findings_go_through_json_unchanged(build: Callable[..., Findings] = analyse) -> None:
    found = build(*rated(noisy(0, (1.0, 0.0))))
    assert Findings.model_validate_json(found.model_dump_json()) == found
