"""Leaderboards: every registered version that was measured on a suite, ranked where the items were the same.

One statement finds all of it, whatever the number of versions; no artifact is opened.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, and_, case, func, or_, select
from sqlalchemy.orm import Session

from infra.documents import did_you_mean
from infra.errors import NotFound
from infra.sign_flips import sign_flip_tests
from registry import base_models
from registry.models import Adapter, Alias, BaseModel, Evaluation, Version, VersionState
from registry.policy import LOWER_IS_BETTER

ALPHA = 0.05  # of the family of tests against the best of a table
_HARNESS = "lm-eval"
_Found = Row[*tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Standing:
    """A version's newest number on a table's items.

    Attributes:
        rank: 1 for the best and for all that are not significantly worse; of others, one more than there are versions
            with a better number. None where the items are unknown.
        size_bytes: of the artifact.
        p_value: two-sided test against the best of the table, Holm-corrected for all versions in it: exact McNemar of
            the items' outcomes, else sign flips of their scores, or of their losses; None of the best itself, and where
            nothing was recorded item by item.
        ties_best: it is the best, or equal to it, or not significantly worse.
        pareto: nothing in the table that scores as well or better has a smaller adapter or a smaller base, and no
            larger other one.
        in_production: the alias `production` points at it.
    """

    rank: int | None
    address: str
    method: str
    base: str
    base_parameters: int
    trainable_parameters: int
    size_bytes: int
    value: float
    low: float | None
    high: float | None
    p_value: float | None
    ties_best: bool
    pareto: bool
    in_production: bool
    at: datetime


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """The versions that were measured by one metric on the same items, best first.

    Perplexities count tokens, which other bases cut differently: they share a table on one base only.

    Attributes:
        dataset_fingerprint: of the items; None where it was not recorded, so that nothing can be ranked.
        samples: items.
        versions: in the table, before `limit` cut it.
    """

    suite: str
    metric: str
    dataset_fingerprint: str | None
    samples: int
    versions: int
    standings: tuple[Standing, ...]


def leaderboards(
    session: Session,
    task: str,
    *,
    base: str | None,
    method: str | None,
    metric: str | None,
    limit: int | None,
    all_versions: bool,
) -> list[Leaderboard]:
    """See `AdapterRegistry.leaderboard`."""
    newest = (
        select(func.max(Evaluation.id))
        .where(_of_task(task), *([Evaluation.metric == metric] if metric else []))
        .group_by(Evaluation.version_id, Evaluation.suite, Evaluation.metric, Evaluation.dataset_fingerprint)
    )
    query = (
        select(
            Evaluation.suite,
            Evaluation.metric,
            Evaluation.dataset_fingerprint,
            Evaluation.samples,
            Evaluation.value,
            Evaluation.low,
            Evaluation.high,
            Evaluation.outcomes,
            Evaluation.scores,
            case((Evaluation.metric == "perplexity", Evaluation.components)).label("losses"),
            Evaluation.at,
            Adapter.name.label("adapter"),
            Version.number,
            Version.method,
            Version.trainable_parameters,
            Version.size_bytes,
            BaseModel.name.label("base"),
            BaseModel.parameters.label("base_parameters"),
            Alias.alias,
        )
        .join(Version, Version.id == Evaluation.version_id)
        .join(Adapter, Adapter.id == Version.adapter_id)
        .join(BaseModel, BaseModel.id == Version.base_model_id)
        .outerjoin(Alias, and_(Alias.version_id == Version.id, Alias.alias == "production"))
        .where(Evaluation.id.in_(newest), Version.state == VersionState.READY)
        .order_by(Adapter.name, Version.number.desc())
    )
    if base is not None:
        query = query.where(Version.base_model_id == base_models.find(session, base).id)
    if method is not None:
        query = query.where(Version.method == method)
    tables: dict[tuple[str, ...], list[_Found]] = {}
    for row in session.execute(query):
        one_base = row.base if row.metric in LOWER_IS_BETTER else ""
        tables.setdefault((row.suite, row.metric, row.dataset_fingerprint or "", one_base), []).append(row)
    if not tables:
        _require_measured(session, task)
    shown = [_table(rows if all_versions else _one_each(rows), limit) for _, rows in sorted(tables.items())]
    return sorted(shown, key=lambda table: (table.suite, table.metric, -table.versions))


def _of_task(task: str) -> Any:
    """The suite of that title, or all suites of that task."""
    return or_(
        Evaluation.suite == task,
        Evaluation.suite.startswith(f"{task}/", autoescape=True),
        Evaluation.suite.startswith(f"{_HARNESS}/{task}/", autoescape=True),
    )


def _require_measured(session: Session, task: str) -> None:
    """Raise `NotFound` unless the task was measured at all, which the filters then hide."""
    suites = session.scalars(select(Evaluation.suite).distinct().order_by(Evaluation.suite)).all()
    if any(suite == task or f"/{suite}".startswith((f"/{task}/", f"/{_HARNESS}/{task}/")) for suite in suites):
        return
    if not suites:
        raise NotFound("Nothing was measured yet.", f"regraft evaluate NAME --task {task}")
    tasks = {suite.removeprefix(f"{_HARNESS}/").rpartition("/")[0] or suite for suite in suites}
    hint = did_you_mean(task, sorted({*tasks, *suites}))
    there = f"Measured were: {', '.join(suites)}."
    raise NotFound(f"No version was measured on '{task}'.", f"{hint} {there}" if hint.startswith("Did") else there)


def _one_each(rows: Iterable[_Found]) -> list[_Found]:
    """Of each adapter, base and method the production holder, else the newest; rows come newest first.

    Not the best one: the best of many on the test items looks better than it is.
    """
    chosen: dict[tuple[str, str, str], _Found] = {}
    for row in rows:
        key = (row.adapter, row.base, row.method)
        if key not in chosen or row.alias:
            chosen[key] = row
    return list(chosen.values())


def _table(rows: Sequence[_Found], limit: int | None) -> Leaderboard:
    first = rows[0]
    sign = -1.0 if first.metric in LOWER_IS_BETTER else 1.0
    rows = sorted(rows, key=lambda row: (-sign * row.value, row.size_bytes, row.base_parameters))
    scores = [sign * row.value for row in rows]
    adjusted = holm(against_the_first([row.outcomes for row in rows], [_of_items(row) for row in rows]))
    front = pareto(scores, [(row.size_bytes, row.base_parameters) for row in rows])
    known = first.dataset_fingerprint is not None
    falling = [-score for score in scores]
    ties = [
        known and (score == scores[0] or (p is not None and p > ALPHA))
        for score, p in zip(scores, adjusted, strict=True)
    ]
    standings = [
        Standing(
            rank=(1 if tied else bisect_left(falling, falling[place]) + 1) if known else None,
            address=f"{row.adapter}@{row.number}",
            method=row.method,
            base=row.base,
            base_parameters=row.base_parameters,
            trainable_parameters=row.trainable_parameters,
            size_bytes=row.size_bytes,
            value=row.value,
            low=row.low,
            high=row.high,
            p_value=adjusted[place] if known else None,
            ties_best=tied,
            pareto=known and place in front,
            in_production=row.alias is not None,
            at=row.at,
        )
        for place, (row, tied) in enumerate(zip(rows, ties, strict=True))
    ]
    return Leaderboard(
        first.suite, first.metric, first.dataset_fingerprint, first.samples, len(rows), tuple(standings[:limit])
    )


def _of_items(row: _Found) -> list[float] | None:
    """Each item's score, or of a perplexity its loss."""
    return row.scores or ([nats for nats, _ in row.losses] if row.losses else None)


def against_the_first(
    outcomes: Sequence[Sequence[int] | None], scores: Sequence[Sequence[float] | None]
) -> list[float | None]:
    """Two-sided tests of each version against the first, on the same items.

    Exact McNemar where both have outcomes: p = min(1, 2·P(X ≤ min(b, c))), X ~ Binomial(b + c, ½); else sign flips.

    Args:
        outcomes: 0 or 1 for each item, of each version; None where they are not known.
        scores: numbers for each item, of each version; None where they are not known.

    Returns:
        p-values; None of the first itself, and where there is nothing to compare.
    """
    p_values: list[float | None] = [None] * len(outcomes)
    _put(p_values, scores, _flipped)
    _put(p_values, outcomes, _mcnemar)
    return p_values


def _put(
    p_values: list[float | None],
    known: Sequence[Sequence[float] | None],
    test: Callable[[Sequence[float], list[Sequence[float]]], list[float]],
) -> None:
    """Test what is known of each version against what is known of the first."""
    first = known[0]
    others = {n: found for n, found in enumerate(known) if n and first and found and len(found) == len(first)}
    if first and others:
        for place, p in zip(others, test(first, list(others.values())), strict=True):
            p_values[place] = p


def _flipped(first: Sequence[float], others: list[Sequence[float]]) -> list[float]:
    return sign_flip_tests([[a - b for a, b in zip(first, other, strict=True)] for other in others])


def _mcnemar(first: Sequence[float], others: list[Sequence[float]]) -> list[float]:
    import numpy as np
    from scipy.special import bdtr

    best, rest = np.asarray(first, dtype=bool), np.asarray(others, dtype=bool)  # (items,), (versions, items)
    b, c = (best & ~rest).sum(axis=1), (~best & rest).sum(axis=1)
    return [float(p) for p in np.minimum(1.0, 2 * bdtr(np.minimum(b, c), b + c, 0.5))]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979): p̃₍ᵢ₎ = max over j ≤ i of min(1, (m − j + 1)·p₍ⱼ₎); None stays None."""
    places = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted, highest = list(p_values), 0.0
    for number, (p, place) in enumerate(places):
        highest = max(highest, min(1.0, (len(places) - number) * p))
        adjusted[place] = highest
    return adjusted


def pareto(scores: Sequence[float], costs: Sequence[tuple[int, int]]) -> set[int]:
    """Places that nothing dominates: as good or better at no higher cost in either part, and better in one respect.

    Args:
        scores: more is better.
        costs: two parts, of which less is better.
    """
    front: list[int] = []
    for place in sorted(range(len(scores)), key=lambda place: (-scores[place], costs[place])):
        own = (-scores[place], *costs[place])  # whatever dominates it came before, and so did what dominates that
        if not any(
            costs[other][0] <= own[1] and costs[other][1] <= own[2] and (-scores[other], *costs[other]) != own
            for other in front
        ):
            front.append(place)
    return set(front)
