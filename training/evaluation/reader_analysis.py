"""What a reader study found: means, wins, paired tests with correction, agreement of the readers, and what it can see.

Items are the units of every interval and test: ratings of one item by several readers are not independent, so they are
first averaged. Tests are two-sided; all of a study's (every pair of arms by every criterion, and by preference) are
corrected together.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from infra.documents import Section
from infra.errors import InvalidInput
from training.evaluation.reader_ratings import Ratings
from training.evaluation.reader_study import Key, Study, require_intact
from training.evaluation.statistics import bootstrap_mean, holm

Table = np.ndarray  # [readers, items, arms] of float64, NaN where nothing was said

ALPHA = 0.05  # chance of any false finding in the whole study
POWER = 0.8
LARGE = 0.8  # standard deviations: Cohen's word for an effect of that size (1988)
PREFERENCE = "preferred"


class Mean(Section):
    """An arm's mean over items by one criterion, with its 95 % bootstrap interval; or its share of preferences."""

    measure: str
    arm: str
    value: float
    low: float
    high: float
    items: int


class Difference(Section):
    """Two arms by one measure.

    Attributes:
        difference: mean over items of `first` − `second`; of preferences, of their shares.
        low: lower end of its 95 % bootstrap interval over items.
        high: its upper end.
        wins: items that `first` has the better of.
        losses: items that `second` has the better of.
        ties: items without a better one.
        p_value: Wilcoxon's signed-rank test of the differences by criterion; the sign test of wins and losses by
            preference.
        corrected: p-value after Holm's correction over all tests of the study.
        detectable: the least true difference that the study finds in four cases of five, in the measure's own unit.
            None of preferences.
    """

    measure: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    p_value: float
    corrected: float
    detectable: float | None


class Agreement(Section):
    """How far readers say the same; None where it is not defined (one reader, or all ratings equal).

    Attributes:
        measure: a criterion, or `preferred`.
        alpha: Krippendorff's, ordinal for criteria, nominal for the preferred answer: 1 is full agreement, 0 chance.
        same: share of pairs of readers who said exactly the same of an answer (or preferred the same one).
    """

    measure: str
    alpha: float | None
    same: float | None


class Findings(Section):
    """A study's outcome.

    Attributes:
        arms: their names, unblinded.
        items: how many were rated.
        readers: how many returned their packets.
        missing: ratings and marks that are not there.
        smallest_effect: the least standardised difference (in standard deviations of the paired differences) that is
            found with a power of 80 % after correction.
        warnings: what a reader of these numbers has to know first.
    """

    arms: tuple[str, ...]
    items: int
    readers: int
    missing: int
    means: tuple[Mean, ...]
    differences: tuple[Difference, ...]
    agreement: tuple[Agreement, ...]
    smallest_effect: float
    warnings: tuple[str, ...]


def analyse(study: Study, key: Key, ratings: Ratings) -> Findings:
    """Unblind and compare.

    Raises:
        CorruptArtifact: study and key are not as they were made.
        InvalidInput: the ratings are another study's, or too few to compare anything.
    """
    require_intact(study, key)
    if ratings.asked != study.asked:
        raise InvalidInput("The ratings are another study's.", "Collect the packets of this one.")
    names = [criterion.name for criterion in study.design.criteria]
    tables = {name: _table(study, key, ratings, name) for name in (*names, PREFERENCE)}
    tables[PREFERENCE] = _shares(tables[PREFERENCE])
    rated = [_of_items(table) for table in tables.values()]
    items = int(np.any([np.isfinite(table).any(axis=-1) for table in rated], axis=0).sum())
    if items < 2:
        raise InvalidInput(f"{items} items are rated; nothing can be told from them.", "Collect more.")
    means = [
        _mean(name, arm, _of_items(table)[:, number])
        for name, table in tables.items()
        for number, arm in enumerate(key.arms)
    ]
    tests = len(tables) * math.comb(len(key.arms), 2)
    found = [
        _difference(name, key.arms, pair, table, tests)
        for name, table in tables.items()
        for pair in itertools.combinations(range(len(key.arms)), 2)
    ]
    corrected = holm([each.p_value for each in found])
    effect = smallest_effect(items, tests)
    missing = sum(ratings.missing.values())
    return Findings(
        arms=key.arms,
        items=items,
        readers=len(ratings.missing),
        missing=missing,
        means=tuple(mean for mean in means if mean is not None),
        differences=tuple(each.model_copy(update={"corrected": p}) for each, p in zip(found, corrected, strict=True)),
        agreement=tuple(_agreement(name, table) for name, table in tables.items()),
        smallest_effect=effect,
        warnings=tuple(_warnings(ratings, items, tests, effect, missing)),
    )


def _table(study: Study, key: Key, ratings: Ratings, measure: str) -> Table:
    table = np.full((study.design.readers, key.items, len(key.arms)), np.nan)
    for name, rating in ratings.by_id.items():
        place = key.answers[name]
        value = rating.preferred if measure == PREFERENCE else rating.scores[measure]
        if value is not None:
            table[place.reader, place.item, place.arm] = value
    return table


def _shares(marks: Table) -> Table:
    """A reader's preference for an item is one vote, shared by the answers marked; none where nothing was marked."""
    votes = np.nansum(marks, axis=-1, keepdims=True)
    return np.where(votes > 0, marks / np.maximum(votes, 1), np.nan)


def _of_items(table: Table) -> np.ndarray:
    """[items, arms]: means over the readers who said something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nobody said anything
        means: np.ndarray = np.nanmean(table, axis=0)
    return means


def _mean(measure: str, arm: str, values: np.ndarray) -> Mean | None:
    told = values[np.isfinite(values)]
    if not len(told):
        return None
    interval = bootstrap_mean(told, seed=0)
    return Mean(
        measure=measure, arm=arm, value=float(told.mean()), low=interval.low, high=interval.high, items=len(told)
    )


def _difference(measure: str, arms: Sequence[str], pair: tuple[int, int], table: Table, tests: int) -> Difference:
    """Readers count for an item where they rated both of its answers; `corrected` is filled in later."""
    gaps = _of_items(table[..., pair[0] : pair[0] + 1] - table[..., pair[1] : pair[1] + 1])[:, 0]
    gaps = gaps[np.isfinite(gaps)]
    wins, losses = int((gaps > 1e-9).sum()), int((gaps < -1e-9).sum())
    interval = bootstrap_mean(gaps, seed=0) if len(gaps) else None
    p_value = sign_test(wins, losses) if measure == PREFERENCE else signed_rank_test(gaps)
    detectable = None
    if measure != PREFERENCE and len(gaps) > 1:
        detectable = smallest_effect(len(gaps), tests) * float(gaps.std(ddof=1))
    return Difference(
        measure=measure,
        first=arms[pair[0]],
        second=arms[pair[1]],
        difference=float(gaps.mean()) if len(gaps) else 0.0,
        low=interval.low if interval else 0.0,
        high=interval.high if interval else 0.0,
        wins=wins,
        losses=losses,
        ties=len(gaps) - wins - losses,
        p_value=p_value,
        corrected=p_value,
        detectable=detectable,
    )


def signed_rank_test(differences: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test, zeros ranked but not counted (Pratt 1959).

    Exact for any number of items, ties and all, which SciPy's is not without permutations that take seconds: the
    distribution of W⁺, the sum of the ranks with a positive sign, where each sign is as likely, is built up rank by
    rank. Ranks are doubled, so that those of ties are whole.
    """
    from scipy.stats import rankdata

    d = np.round(np.asarray(differences, dtype=np.float64), 9)  # equal means of readers differ in rounding
    doubled = np.rint(2 * rankdata(np.abs(d))).astype(int)
    chances = np.ones(1)
    for rank in doubled[d != 0]:
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    positive = int(doubled[d > 0].sum())
    return float(min(1.0, 2 * min(chances[: positive + 1].sum(), chances[positive:].sum())))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the exact sign test; ties say nothing."""
    from scipy import stats

    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def smallest_effect(items: int, tests: int) -> float:
    """The standardised paired difference that Wilcoxon's test finds with a power of 80 % at 5 % / tests.

    (z_{1 − α/2m} + z_{0.8}) / √(n · 3/π): the t test's, at Wilcoxon's asymptotic efficiency of 3/π for normal
    differences (Hodges and Lehmann 1956).
    """
    quantile = NormalDist().inv_cdf
    return (quantile(1 - ALPHA / (2 * tests)) + quantile(POWER)) / math.sqrt(items * 3 / math.pi)


def _agreement(measure: str, table: Table) -> Agreement:
    """Of criteria each answer is a unit; of preferences each item, whose value is the preferred arm or a tie."""
    if measure == PREFERENCE:
        told = np.isfinite(table).any(axis=-1)
        best = np.nanmax(np.where(np.isfinite(table), table, -1), axis=-1)
        choice = np.where(best > 0.999, np.argmax(np.where(np.isfinite(table), table, -1), axis=-1), table.shape[-1])
        units = np.where(told, choice, np.nan)
    else:
        units = table.reshape(len(table), -1)
    return Agreement(
        measure=measure,
        alpha=krippendorff_alpha(units, "nominal" if measure == PREFERENCE else "ordinal"),
        same=_percent_agreement(units),
    )


def krippendorff_alpha(units: np.ndarray, level: str) -> float | None:
    """Krippendorff's alpha of [readers, units], NaN where a reader said nothing; None where it is not defined."""
    import krippendorff

    several = units[:, np.isfinite(units).sum(axis=0) > 1]
    if len(np.unique(several[np.isfinite(several)])) < 2:
        return None
    return float(krippendorff.alpha(several, level_of_measurement=level))


def _percent_agreement(units: np.ndarray) -> float | None:
    pairs = [
        one[both] == other[both]
        for one, other in itertools.combinations(units, 2)
        if (both := np.isfinite(one) & np.isfinite(other)).any()
    ]
    return float(np.concatenate(pairs).mean()) if pairs else None


def _warnings(ratings: Ratings, items: int, tests: int, effect: float, missing: int) -> list[str]:
    told = []
    if effect > LARGE:
        told.append(
            f"{items} items and {tests} tests find only differences of {effect:.1f} standard deviations or more "
            f"reliably, which is very large ({LARGE} is called large): no difference found is no sign of equality."
        )
    elif effect > LARGE / 2:
        told.append(
            f"Differences below {effect:.1f} standard deviations are missed more often than once in five: "
            "no difference found is no sign of equality."
        )
    if 2.0 ** (1 - items) * tests > ALPHA:
        told.append(f"With {items} items no test can come out significant after correction, whatever the readers say.")
    if len(ratings.missing) < 2:
        told.append("One reader only: there is no telling whether others would agree.")
    if ratings.absent:
        told.append(f"Readers {', '.join(map(str, ratings.absent))} have not returned their packets.")
    if missing:
        told.append(f"{missing} ratings or marks are missing; what is there counts.")
    return told
