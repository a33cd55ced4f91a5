"""Regraft: one adapter out of several of the same base model, registered with all of them as parents, and measured."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from flows.attached import attached, base_of
from flows.derived import (
    Asked,
    Measured,
    better,
    drawn,
    measured,
    register_derived,
    registered,
    stored_adapter,
    suites_of,
)
from flows.evaluate_adapter import run_suite
from flows.progress import Stage
from flows.promote_adapter import Promotion, promote_adapter
from flows.reports import report_table
from flows.run_states import cancel_if_interrupted
from flows.suites import Prepared
from infra.errors import InvalidInput
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.addresses import adapter_name, alias_name
from registry.records import Parent, VersionRecord
from training.evaluation.suite import Suite
from training.merging.adapter import Adapter, Merged, check, check_bases
from training.merging.linear import Linear
from training.merging.merge import merge, merge_method
from training.merging.method import MergeMethod
from training.merging.soup import Tasting, greedy_soup
from training.methods.contract import write_stored
from training.shared_bases import shared_bases

MERGED = "merged_from"


class Tasted(BaseModel):
    """A mean that a greedy soup has scored."""

    model_config = ConfigDict(frozen=True)

    ingredients: list[str]
    score: float
    taken: bool


class Merging(BaseModel):
    """What a merge made. `deviation` is how far it is from what the method asks for, ‖made − meant‖ / ‖meant‖."""

    model_config = ConfigDict(frozen=True)

    address: str
    base: str
    method: str
    merged_by: str
    of: list[str]
    deviation: float
    parameters: int
    size_bytes: int
    tasted: list[Tasted]
    measured: list[Measured]
    promotion: Promotion | None
    seconds: float


@flow(name="merge-adapters", flow_run_name="merge into {name}", on_failure=[cancel_if_interrupted])
def merge_adapters(
    addresses: tuple[str, ...],
    name: str,
    method: str = "linear",
    options: dict[str, Any] | None = None,
    greedy: bool = False,
    suites: tuple[Suite, ...] = (),
    evaluate: bool = True,
    promote_to: str | None = None,
) -> Merging:
    """Merge versions of one base model into the next version of `name`.

    Args:
        addresses: the versions, in the order of the method's weights.
        name: the adapter that the result is a version of.
        method: how, by its name in `training.merging.merge.METHODS`.
        options: of the method.
        greedy: keep only those adapters whose mean with the better ones helps, judged on the suites' validation split,
            all suites alike; with method `linear`, without weights.
        suites: to measure on. None given: those of all the versions' recipes.
        evaluate: measure the result and the versions that it is made of.
        promote_to: an alias, moved if its policy allows it.

    Raises:
        BaseModelMismatch: the versions are of several base models.
        InvalidInput: they, or the options, do not go together.
    """
    began = time.monotonic()
    versions, rule = plan_merge(addresses, name, method, options or {}, greedy, suites, evaluate, promote_to)
    with shared_bases():
        adapters = _read(versions)
        asked = suites_of(versions, suites)
        prepared = drawn(asked) if evaluate and asked else []
        tasted: tuple[Tasting, ...] = ()
        if greedy:
            merged, chosen, tasted = _soup(versions, adapters, rule, asked)
        else:
            merged, chosen = _merge(versions[0], adapters, rule, name), tuple(adapter.name for adapter in adapters)
        parents = [version for version in versions if version.address in chosen]
        version = _register(name, parents, merged, method, rule, tasted)
        with registered(version):
            found = measured(version, parents, prepared)
    with registered(version):
        promotion = promote_adapter(version.address, alias=promote_to) if promote_to else None
    report_table(name, "merge", _rows(found, parents, version))
    return Merging(
        address=version.address,
        base=version.base.name,
        method=version.method,
        merged_by="soup" if greedy else method,
        of=[parent.address for parent in parents],
        deviation=merged.deviation.overall,
        parameters=version.trainable_parameters,
        size_bytes=version.size_bytes,
        tasted=[Tasted(ingredients=list(t.ingredients), score=t.score, taken=t.taken) for t in tasted],
        measured=found,
        promotion=promotion,
        seconds=time.monotonic() - began,
    )


def plan_merge(
    addresses: Sequence[str],
    name: str,
    method: str,
    options: Mapping[str, Any],
    greedy: bool,
    suites: Sequence[Suite],
    evaluate: bool,
    promote_to: str | None,
) -> tuple[list[VersionRecord], MergeMethod]:
    """The versions and the rule, after every check that needs no model. See `merge_adapters`."""
    adapter_name(name)
    rule = merge_method(method, options)
    registry = AdapterRegistry()
    versions = [registry.get(address) for address in addresses]
    if len(versions) < 2:
        raise InvalidInput("A merge takes two versions or more.", "E.g. regraft merge counting@1 counting@2")
    check_bases({version.address: version.base.identity_sha256 for version in versions})
    rule.coefficients(len(versions))
    asked = suites_of(versions, suites)
    if promote_to is not None:
        alias_name(promote_to)
        if not evaluate:
            raise InvalidInput(
                f"'{promote_to}' cannot move to a version that is not measured.",
                "Leave out --no-evaluate, or --promote.",
            )
    if greedy and not isinstance(rule, Linear):
        raise InvalidInput(f"A greedy soup is a mean; '{method}' is none.", "Leave out --method, or --greedy.")
    if greedy and not asked:
        raise InvalidInput(
            "A greedy soup needs something to be judged by, and none of the versions has a suite.",
            "Name a built-in task: --task NAME",
        )
    return versions, rule


def _read(versions: Sequence[VersionRecord]) -> list[Adapter]:
    """The versions as they are stored, every byte checked."""
    with base_of(versions[0]) as base:
        adapters = [stored_adapter(version, base) for version in versions]
    check(adapters)
    return adapters


@task(task_run_name="merge into {name}", cache_policy=NO_CACHE)
def _merge(first: VersionRecord, adapters: Sequence[Adapter], rule: MergeMethod, name: str) -> Merged:
    with base_of(first) as base:
        stage = Stage(f"merge into {name}: layers")
        return merge(adapters, rule, dict(base.model.state_dict()), stage)


@task(task_run_name="greedy soup", cache_policy=NO_CACHE)
def _soup(
    versions: Sequence[VersionRecord], adapters: Sequence[Adapter], rule: MergeMethod, asked: Sequence[Asked]
) -> tuple[Merged, tuple[str, ...], tuple[Tasting, ...]]:
    """Judged on validation items, so that the test items, which decide afterwards, have chosen nothing."""
    assert isinstance(rule, Linear)
    first, count = versions[0], 0
    validation = drawn(asked, split="validation", name=None)

    def score(adapter: Adapter) -> float:
        nonlocal count
        count += 1
        title = adapter.name if adapter in adapters else f"mean {count - len(adapters)}"
        with TemporaryDirectory(dir=get_settings().runs, prefix="soup-") as scratch:
            write_stored(Path(scratch), adapter.config, adapter.tensors)
            with attached(first, Path(scratch)) as (adapted, base):
                return fmean(_score(title, adapted.model, base.tokenizer, suite) for suite in validation)

    get_settings().runs.mkdir(parents=True, exist_ok=True)
    with base_of(first) as base:
        tensors = dict(base.model.state_dict())
    soup = greedy_soup(adapters, score, rule, tensors)
    return soup.merged, soup.ingredients, soup.tastings


def _score(title: str, model: Any, tokenizer: Any, suite: Prepared) -> float:
    return better(suite.metric, run_suite(f"{title}: {suite.title}", model, tokenizer, suite).value)


@task(task_run_name="register {name}", cache_policy=NO_CACHE)
def _register(
    name: str,
    parents: Sequence[VersionRecord],
    merged: Merged,
    method: str,
    rule: MergeMethod,
    tasted: Sequence[Tasting],
) -> VersionRecord:
    coefficients = rule.coefficients(len(parents))
    told = {
        "method": "soup" if tasted else method,
        "options": rule.model_dump(mode="json", exclude_none=True),
        "deviation": merged.deviation.overall,
        **({"tasted": [[list(t.ingredients), t.score, t.taken] for t in tasted]} if tasted else {}),
    }
    edges = [
        Parent(
            parent.address,
            MERGED,
            {**told, "place": place, **({"coefficient": coefficients[place]} if coefficients else {})},
        )
        for place, parent in enumerate(parents)
    ]
    return register_derived(
        name,
        parents[0],
        lambda directory: write_stored(directory, merged.config, merged.tensors),
        edges,
        {"deviation": merged.deviation.overall},
    )


def _rows(found: Sequence[Measured], parents: Sequence[VersionRecord], version: VersionRecord) -> list[dict[str, Any]]:
    return [
        {
            "suite": each.suite,
            **{parent.address: value.value for parent, value in zip(parents, each.parents, strict=True)},
            version.address: each.child.value,
        }
        for each in found
    ]
