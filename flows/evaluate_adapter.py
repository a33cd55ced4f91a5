"""Measure a version (or a bare base model) on held-out data and record the numbers."""

from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field

from flows.base_models import find_base
from flows.gpu import gpu_slot
from flows.progress import Stage
from flows.reports import report_table
from flows.suites import Prepared, default_suites, prepare
from infra.errors import InvalidInput
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.records import VersionRecord
from serving.loading import LoadedAdapter, load, recipe_of
from training.base_models import BaseFolder, LoadedBase, load_base
from training.data.example import fingerprint
from training.data.prompting import PromptFormat
from training.device import base_dtype, best_device
from training.evaluation.evaluate import EvaluationResult
from training.evaluation.evaluate import evaluate as measure
from training.evaluation.statistics import paired_test
from training.evaluation.suite import Suite
from training.objectives.of_model import is_masked_lm


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


class Comparison(BaseModel):
    """Two versions on the same items; `p_value` by an exact McNemar test."""

    model_config = ConfigDict(frozen=True)

    suite: str
    difference: float
    p_value: float
    only_first: int
    only_second: int


@flow(name="evaluate-adapter", flow_run_name="evaluate {address}")
def evaluate_adapter(address: str, suites: tuple[Suite, ...] = (), items_of: str | None = None) -> list[SuiteResult]:
    """Measure a version on its recipe's suites (or on others) and record each number with its interval.

    Args:
        address: `name@3`, `name@production` or `name`.
        suites: none given: the suites of the version's own recipe.
        items_of: address of another version, whose recipe then supplies suites and items, so that both can be compared.
    """
    adapter = load(address)
    prepared = _prepared(AdapterRegistry().get(items_of) if items_of else adapter.version, suites, adapter.model)
    results = [_measure_and_record(adapter, suite) for suite in prepared]
    _report(adapter.version.adapter, results)
    return results


@flow(name="evaluate-base", flow_run_name="evaluate {base}")
def evaluate_base(base: str, suites: tuple[Suite, ...]) -> list[SuiteResult]:
    """Measure a bare base model: what an adapter on it has to beat.

    Args:
        base: a registered name or a reference.
        suites: each must name a task.
    """
    record, folder = find_base(base)
    loaded = _bare(folder)
    results = []
    for suite in suites:
        drawn = prepare(suite, None, is_masked_lm(loaded.model))
        found = run_suite(f"{record.name}: {drawn.title}", loaded.model, loaded.tokenizer, drawn)
        results.append(_result(record.name, drawn.title, found))
    _report(record.name, results)
    return results


def compare_versions(first: str, second: str, suites: tuple[Suite, ...] = ()) -> list[Comparison]:
    """A paired test of two versions on each suite. What is recorded already is not measured again."""
    a, b = load(first), load(second)
    comparisons = []
    for drawn in _prepared(a.version, suites, a.model):
        found = paired_test(_outcomes(a, drawn), _outcomes(b, drawn))
        comparisons.append(
            Comparison(
                suite=drawn.title,
                difference=found.difference,
                p_value=found.p_value,
                only_first=found.only_a,
                only_second=found.only_b,
            )
        )
    return comparisons


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
        base = _bare(folder)
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


def _bare(folder: BaseFolder) -> LoadedBase:
    device = best_device()
    return load_base(folder.reference, cache=get_settings().base_models, dtype=base_dtype(device), device=device)


def _prepared(version: VersionRecord, suites: tuple[Suite, ...], model: Any) -> list[Prepared]:
    recipe = recipe_of(version)
    chosen = suites or (default_suites(recipe) if recipe else ())
    if not chosen:
        raise InvalidInput(
            f"{version.address} was imported without a recipe, so it has no suites of its own.",
            f"Say on which task to measure it: regraft evaluate {version.address} --task NAME",
        )
    return [prepare(suite, recipe, is_masked_lm(model)) for suite in chosen]


@task(task_run_name="{suite.title}", cache_policy=NO_CACHE)
def _measure_and_record(adapter: LoadedAdapter, suite: Prepared) -> SuiteResult:
    return _result(adapter.version.address, suite.title, _measure_and_record_now(adapter, suite))


def _measure_and_record_now(adapter: LoadedAdapter, suite: Prepared) -> EvaluationResult:
    address = adapter.version.address
    found = run_suite(f"{address}: {suite.title}", adapter.model, adapter.tokenizer, suite)
    record_result(AdapterRegistry(), address, suite.title, found)
    return found


def run_suite(stage_name: str, model: Any, tokenizer: Any, suite: Prepared) -> EvaluationResult:
    """Measure a suite that is drawn already; `stage_name` is what its progress is called."""
    stage = Stage(stage_name)
    with gpu_slot(next(model.parameters()).device):
        return measure(
            model,
            tokenizer,
            suite.examples,
            metric=suite.metric,
            shots=suite.shots,
            prompt_format=PromptFormat(tokenizer, suite.instruction),
            max_new_tokens=suite.max_new_tokens,
            on_progress=stage,
        )


def record_result(registry: AdapterRegistry, address: str, suite: str, found: EvaluationResult) -> None:
    """Keep a result with the version that it was measured of."""
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
        flow_run_id=flow_run.id,
    )


def _outcomes(adapter: LoadedAdapter, suite: Prepared) -> tuple[int, ...]:
    """Right or wrong on each item of the suite: as the registry holds it, else measured now.

    Raises:
        InvalidInput: the suite's metric has no right and wrong.
    """
    items = fingerprint(suite.examples)
    for recorded in AdapterRegistry().evaluations(adapter.version.address):
        if (recorded.suite, recorded.metric, recorded.dataset_fingerprint) == (suite.title, suite.metric, items):
            outcomes = recorded.outcomes
            break
    else:
        outcomes = _measure_and_record_now(adapter, suite).outcomes
    if outcomes is None:
        raise InvalidInput(
            f"{suite.metric} has no right and wrong item by item, so there is no paired test.",
            "Compare on a suite of exact_match or multiple_choice.",
        )
    return outcomes


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
    )


def _report(subject: str, results: list[SuiteResult]) -> None:
    report_table(subject, "evaluation", [result.model_dump() for result in results])
