"""Versions held against each other, and against their bare base, on the same items."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

from pydantic import BaseModel, ConfigDict

from flows.base_models import find_base
from flows.evaluate_adapter import (
    as_far_as_possible,
    bare,
    items_for,
    measure_and_record,
    run_suite,
    tell_failures,
    with_parts,
)
from flows.suites import Prepared
from infra.errors import RegraftError
from registry import AdapterRegistry
from registry.records import EvaluationRecord
from serving.loading import LoadedAdapter, load
from training.data.example import fingerprint
from training.evaluation.result import EvaluationResult, compare
from training.evaluation.statistics import holm
from training.evaluation.suite import Suite


class Comparison(BaseModel):
    """Two models on the same items.

    Attributes:
        against: the second model.
        suite: title of the suite, or of a part of it.
        metric: what is compared.
        test: which test `p_value` is of; it fits the metric.
        difference: value of the first − value of the second, with its 95 % interval.
        p_value: two-sided.
        p_holm: the same, corrected for all the comparisons that were made with it (Holm 1979).
        only_first: items that only the first gets right, or does better on.
        only_second: the same for the second.
        samples: items.
    """

    model_config = ConfigDict(frozen=True)

    against: str
    suite: str
    metric: str
    test: str
    difference: float
    low: float | None
    high: float | None
    p_value: float
    p_holm: float
    only_first: int
    only_second: int
    samples: int


Results = dict[tuple[str, str], EvaluationResult]  # by title and metric


def compare_versions(
    first: str, others: Sequence[str], suites: tuple[Suite, ...] = (), without: Sequence[str] = ()
) -> list[Comparison]:
    """A paired test of a version against each other one, on each suite and metric, and on each bucket.

    What is recorded already is not measured again. A bucket that holds all items of its suite is no test of its own.

    Args:
        first: address of the version.
        others: addresses of the others.
        suites: none given: those of the first's own recipe.
        without: titles of suites that cannot be measured.

    Raises:
        PartlyMeasured: a suite failed on one of them, after all else was compared.
    """
    mine = load(first)
    drawn = [suite for suite in items_for(mine.version, suites, mine) if suite.title not in without]
    own = _merged([_results(first, suite, lambda: mine) for suite in drawn])
    theirs, failed = dict[str, Results](), dict[str, RegraftError]()
    for other in others:
        found, errors = as_far_as_possible(drawn, partial(_results, other, adapter=cache(partial(load, other))))
        theirs[other] = _merged(found)
        failed |= {f"{title} of {other}": error for title, error in errors.items()}
    comparisons = _compared(own, theirs)
    tell_failures(failed, comparisons)
    return comparisons


def forgetting(address: str, suites: tuple[Suite, ...], without: Sequence[str] = ()) -> list[Comparison]:
    """A paired test of a version against its own bare base: below zero is what the adapter has cost.

    Raises:
        PartlyMeasured: a suite failed on the base, after all else was compared.
    """
    adapter = load(address)
    drawn = [suite for suite in items_for(adapter.version, suites, adapter) if suite.title not in without]
    own, base = _merged([_results(address, suite, lambda: adapter) for suite in drawn]), adapter.version.base
    model = bare(find_base(base.reference)[1])

    def measured(suite: Prepared) -> Results:
        whole = run_suite(f"{base.name}: {suite.title}", model.model, model.tokenizer, suite)
        return _by_title_and_metric(with_parts(suite, whole))

    found, failed = as_far_as_possible(drawn, measured)
    comparisons = _compared(own, {base.name: _merged(found)})
    tell_failures({f"{title} of {base.name}": error for title, error in failed.items()}, comparisons)
    return comparisons


def _compared(own: Results, others: dict[str, Results]) -> list[Comparison]:
    pairs = [
        (name, key, compare(own[key], theirs[key])) for name, theirs in others.items() for key in own if key in theirs
    ]
    corrected = holm([found.p_value for _, _, found in pairs])
    return [
        Comparison(
            against=name,
            suite=suite,
            metric=metric,
            test=found.test,
            difference=found.difference,
            low=found.low,
            high=found.high,
            p_value=found.p_value,
            p_holm=p_holm,
            only_first=found.only_a,
            only_second=found.only_b,
            samples=found.samples,
        )
        for (name, (suite, metric), found), p_holm in zip(pairs, corrected, strict=True)
    ]


def _results(address: str, suite: Prepared, adapter: Callable[[], LoadedAdapter]) -> Results:
    """What a version got on the very items of a suite: as the registry holds it, else measured now."""
    titles = (suite.title, *(part for part, places in suite.parts.items() if len(places) < len(suite.examples)))
    wanted = [(title, metric) for title in titles for metric in (suite.metric, *suite.also)]  # calibration is not
    known = _recorded(AdapterRegistry().evaluations(address), suite)
    if not set(wanted) <= set(known):
        known = _by_title_and_metric(measure_and_record(adapter(), suite))
    return {key: known[key] for key in wanted}


def _merged(found: Iterable[Results]) -> Results:
    return {key: result for each in found for key, result in each.items()}


def _by_title_and_metric(results: dict[str, EvaluationResult]) -> Results:
    return {(title, each.metric): each for title, result in results.items() for each in (result, *result.beside)}


def _recorded(evaluations: Sequence[EvaluationRecord], suite: Prepared) -> Results:
    items = {suite.title: fingerprint(suite.examples)} | {
        title: fingerprint([suite.examples[place] for place in places]) for title, places in suite.parts.items()
    }
    return {
        (each.suite, each.metric): _restored(each)
        for each in reversed(evaluations)
        if items.get(each.suite) == each.dataset_fingerprint is not None
        and (each.outcomes is not None or each.scores is not None or each.components is not None)
    }


def _restored(kept: EvaluationRecord) -> EvaluationResult:
    """A recorded number as what was measured, as far as a comparison needs it."""
    components = kept.components or ()
    of_losses = kept.metric == "perplexity"
    return EvaluationResult(
        metric=kept.metric,
        value=kept.value,
        low=kept.low,
        high=kept.high,
        stderr=kept.stderr,
        samples=kept.samples,
        outcomes=kept.outcomes,
        scores=kept.scores or (),
        components=() if of_losses else components,
        losses=tuple(nats for nats, _ in components) if of_losses else (),
        tokens=tuple(int(count) for _, count in components) if of_losses else (),
        seconds=0.0,
        dataset_fingerprint=kept.dataset_fingerprint or "",
    )
