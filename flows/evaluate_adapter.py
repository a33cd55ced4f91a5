"""Measure a version (or a bare base model) on held-out data and record the numbers."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field

from flows.base_models import find_base
from flows.gpu import gpu_slot
from flows.progress import Stage
from flows.reliability import reliability_diagram
from flows.reports import report_picture, report_table
from flows.suites import Prepared, default_suites, in_parts, prepare
from infra.errors import Interrupted, InvalidInput, RegraftError, ServiceUnavailable
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.records import VersionRecord
from serving.loading import LoadedAdapter, load, recipe_of
from training.base_models import BaseFolder, LoadedBase, load_base, load_tokenizer
from training.data.example import fingerprint
from training.data.prompting import PromptFormat
from training.device import base_dtype, best_device
from training.evaluation.evaluate import EvaluationResult
from training.evaluation.evaluate import evaluate as measure
from training.evaluation.result import part
from training.evaluation.suite import Suite
from training.objectives.of_model import is_masked_lm

logger = logging.getLogger(__name__)
Found = TypeVar("Found")


class SuiteResult(BaseModel):
    """A measured number with its interval."""

    model_config = ConfigDict(frozen=True)

    subject: str
    suite: str
    metric: str
    value: float
    low: float | None
    high: float | None
    samples: int
    seconds: float
    dataset_fingerprint: str
    outcomes: tuple[int, ...] | None = Field(None, exclude=True, repr=False)
    components: tuple[tuple[float, ...], ...] = Field((), exclude=True, repr=False)
    beside: list["SuiteResult"] = Field([], description="Other metrics of the same answers.")


class PartlyMeasured(InvalidInput):
    """Some suites could not be measured: those titled `failed`. All others were, and `done` is what was found."""

    def __init__(self, what: str, remedy: str = "", done: Sequence[Any] = (), failed: Sequence[str] = ()) -> None:
        super().__init__(what, remedy)
        self.done = list(done)
        self.failed = tuple(failed)


def as_far_as_possible(
    suites: Iterable[Prepared], measure: Callable[[Prepared], Found]
) -> tuple[list[Found], dict[str, RegraftError]]:
    """What `measure` finds of each suite, and the errors of those that it failed on, by title."""
    done, failed = list[Found](), dict[str, RegraftError]()
    for suite in suites:
        try:
            done.append(measure(suite))
        except Interrupted:
            raise
        except RegraftError as error:
            failed[suite.title] = error
    return done, failed


def tell_failures(failed: Mapping[str, RegraftError], done: Sequence[Any]) -> None:
    """Raise what there is to tell: the error itself where nothing was done, else `PartlyMeasured` of the first."""
    if not failed:
        return
    (title, error), *others = failed.items()
    if not done:
        raise error
    more = f" Nor could be measured: {', '.join(name for name, _ in others)}." if others else ""
    partly = PartlyMeasured(f"{title} could not be measured: {error.what}{more}", error.remedy, done, tuple(failed))
    partly.exit_code = error.exit_code
    raise partly from error


@flow(name="evaluate-adapter", flow_run_name="evaluate {address}")
def evaluate_adapter(address: str, suites: tuple[Suite, ...] = (), items_of: str | None = None) -> list[SuiteResult]:
    """Measure a version on its recipe's suites (or on others) and record each number with its interval.

    Args:
        address: `name@3`, `name@production` or `name`.
        suites: none given: the suites of the version's own recipe.
        items_of: address of another version, whose recipe then supplies suites and items, so that both can be compared.

    Raises:
        PartlyMeasured: a suite failed, after all others were measured and recorded.
    """
    adapter = load(address)
    drawn = items_for(AdapterRegistry().get(items_of) if items_of else adapter.version, suites, adapter)
    found, failed = as_far_as_possible(drawn, lambda suite: _measure_and_record(adapter, suite))
    results = [result for each in found for result in each]
    _report(adapter.version.adapter, results, adapter.version.mlflow_run_id)
    tell_failures(failed, results)
    return results


@flow(name="evaluate-base", flow_run_name="evaluate {base}")
def evaluate_base(base: str, suites: tuple[Suite, ...]) -> list[SuiteResult]:
    """Measure a bare base model: what an adapter on it has to beat.

    Args:
        base: a registered name or a reference.
        suites: each must name a task, or bring data of its own.

    Raises:
        PartlyMeasured: a suite failed, after all others were measured.
    """
    record, folder = find_base(base)
    loaded = bare(folder)

    def measured(suite: Prepared) -> list[SuiteResult]:
        found = run_suite(f"{record.name}: {suite.title}", loaded.model, loaded.tokenizer, suite)
        return [_result(record.name, title, each) for title, each in with_parts(suite, found).items()]

    masked = is_masked_lm(loaded.model)
    drawn = [in_parts(prepare(suite, None, masked), suite, loaded.tokenizer) for suite in suites]
    found, failed = as_far_as_possible(drawn, measured)
    results = [result for each in found for result in each]
    _report(record.name, results)
    tell_failures(failed, results)
    return results


@flow(name="evaluate-with-harness", flow_run_name="harness on {subject}")
def run_harness_tasks(subject: str, tasks: list[str], limit: int | None = None) -> list[SuiteResult]:
    """Run tasks of the EleutherAI harness on a version or a base model; a version's numbers are recorded."""
    from training.evaluation.harness import run_harness

    registry = AdapterRegistry()
    if registry.has_adapter(subject.partition("@")[0]):
        adapter = load(subject)
        model, tokenizer, name = adapter.model, adapter.tokenizer, adapter.version.address
    else:
        record, folder = find_base(subject)
        base = bare(folder)
        model, tokenizer, name, adapter = base.model, base.tokenizer, record.name, None
    if is_masked_lm(model):
        raise InvalidInput(f"{name} is a masked language model; the harness asks causal ones.", "See regraft evaluate.")
    results = []
    for suite, found in run_harness(model, tokenizer, tasks, limit=limit).items():
        results.append(_result(name, suite, found))
        if adapter is not None:
            record_result(registry, name, suite, found)
    _report(name, results)
    return results


def bare(folder: BaseFolder) -> LoadedBase:
    """A base model without any adapter, on the best device there is."""
    device = best_device()
    return load_base(folder.reference, cache=get_settings().base_models, dtype=base_dtype(device), device=device)


def items_for(version: VersionRecord, suites: tuple[Suite, ...], adapter: LoadedAdapter) -> list[Prepared]:
    """The suites with their items as they are drawn for `version`, to measure `adapter` on: itself, or one beside it.

    Buckets are counted in the tokens of the version's own model.

    Raises:
        InvalidInput: no suites are given, and the version has no recipe to have some of its own.
    """
    recipe = recipe_of(version)
    chosen = suites or (default_suites(recipe) if recipe else ())
    if not chosen:
        raise InvalidInput(
            f"{version.address} was imported without a recipe, so it has no suites of its own.",
            f"Say on which task to measure it: regraft evaluate {version.address} --task NAME",
        )
    tokenizer = adapter.tokenizer
    if any(suite.buckets for suite in chosen) and version.base != adapter.version.base:
        tokenizer = load_tokenizer(find_base(version.base.reference)[1])
    masked = is_masked_lm(adapter.model)
    return [in_parts(prepare(suite, recipe, masked), suite, tokenizer) for suite in chosen]


@task(task_run_name="{suite.title}", cache_policy=NO_CACHE)
def _measure_and_record(adapter: LoadedAdapter, suite: Prepared) -> list[SuiteResult]:
    address = adapter.version.address
    return [_result(address, title, found) for title, found in measure_and_record(adapter, suite).items()]


def measure_and_record(adapter: LoadedAdapter, suite: Prepared) -> dict[str, EvaluationResult]:
    """A suite's result and those of its parts, by title; measured once, and kept with the version."""
    address = adapter.version.address
    whole = run_suite(f"{address}: {suite.title}", adapter.model, adapter.tokenizer, suite)
    results = with_parts(suite, whole)
    for title, found in results.items():
        record_result(AdapterRegistry(), address, title, found)
    return results


def with_parts(suite: Prepared, whole: EvaluationResult) -> dict[str, EvaluationResult]:
    """A suite's result and those of its parts, by title."""
    parts = {
        title: part(whole, places, fingerprint([suite.examples[place] for place in places]))
        for title, places in suite.parts.items()
    }
    return {suite.title: whole, **parts}


def run_suite(stage_name: str, model: Any, tokenizer: Any, suite: Prepared) -> EvaluationResult:
    """Measure a suite that is drawn already; `stage_name` is what its progress is called."""
    stage = Stage(stage_name)
    with gpu_slot(next(model.parameters()).device):
        return measure(
            model,
            tokenizer,
            suite.examples,
            metric=suite.metric,
            also=suite.also,
            shots=suite.shots,
            prompt_format=PromptFormat(tokenizer, suite.instruction),
            max_new_tokens=suite.max_new_tokens,
            sampling=suite.sampling,
            on_progress=stage,
        )


def record_result(registry: AdapterRegistry, address: str, suite: str, found: EvaluationResult) -> None:
    """Keep a result with the version that it was measured of, after what was measured beside it.

    So the newest number of a suite is always that of its own metric.
    """
    for other in found.beside:
        record_result(registry, address, suite, other)
    components = found.components or tuple(zip(found.losses, found.tokens, strict=True))
    registry.record_evaluation(
        address,
        suite=suite,
        metric=found.metric,
        value=found.value,
        samples=found.samples,
        low=found.low,
        high=found.high,
        stderr=found.stderr,
        dataset_fingerprint=found.dataset_fingerprint,
        outcomes=found.outcomes,
        scores=found.scores or None,
        components=components or None,
        flow_run_id=flow_run.id,
    )


def _result(subject: str, suite: str, found: EvaluationResult) -> SuiteResult:
    return SuiteResult(
        subject=subject,
        suite=suite,
        metric=found.metric,
        value=found.value,
        low=found.low,
        high=found.high,
        samples=found.samples,
        seconds=found.seconds,
        dataset_fingerprint=found.dataset_fingerprint,
        outcomes=found.outcomes,
        components=found.components,
        beside=[_result(subject, suite, other) for other in found.beside],
    )


def _report(subject: str, results: list[SuiteResult], mlflow_run_id: str | None = None) -> None:
    """What Prefect's UI shows of the results; a version's pictures go to its MLflow run, too."""
    rows = [row.model_dump(exclude={"beside"}) for result in results for row in (result, *result.beside)]
    report_table(subject, "evaluation", rows)
    pictures = {
        result.suite: reliability_diagram(f"{result.subject}: {result.suite}", other.value, other.components)
        for result in results
        for other in result.beside
        if other.metric == "ece"
    }
    for suite, picture in pictures.items():
        report_picture(subject, f"reliability on {suite}", picture)
    if pictures and mlflow_run_id is not None:
        _show_in_mlflow(mlflow_run_id, pictures)


def _show_in_mlflow(run_id: str, pictures: Mapping[str, bytes]) -> None:
    """Add `reliability/SUITE.png` to a run. The numbers are safe in the registry, so MLflow's silence is a warning."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "reliability"
        folder.mkdir()
        for suite, picture in pictures.items():
            (folder / f"{re.sub(r'[^a-zA-Z0-9_.-]', '-', suite)}.png").write_bytes(picture)
        try:
            AdapterRegistry().tracking.log_artifacts(run_id, Path(scratch))
        except ServiceUnavailable as error:
            logger.warning("The reliability diagrams are not shown in MLflow: %s", error.what)
