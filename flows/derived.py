"""Versions that are made of others without any training: proven to load, registered with their parents, measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel, ConfigDict

from flows.attached import attached, base_of, lent
from flows.evaluate_adapter import record_result, run_suite
from flows.suites import Prepared, default_suites, prepare
from infra.errors import Interrupted, NotFound
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.records import BaseModelRecord, DatasetRecord, Parent, VersionRecord
from serving.loading import recipe_of
from training.adapter_files import attach_stored, read_adapter, verify, write_adapter
from training.base_models import LoadedBase
from training.data.example import fingerprint
from training.evaluation.suite import Suite
from training.merging.adapter import Adapter
from training.methods.contract import stored_config, stored_tensors
from training.migration.gate import LOWER_IS_BETTER
from training.objectives.of_model import is_masked_lm


class Number(BaseModel):
    """A measured value with its 95 % interval."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float | None
    high: float | None


class Measured(BaseModel):
    """One suite, answered by the new version and by those that it is made of, in their order."""

    model_config = ConfigDict(frozen=True)

    suite: str
    metric: str
    samples: int
    parents: list[Number]
    child: Number


@dataclass(frozen=True)
class Asked:
    """A suite; where it names no task, the data of the version's recipe are meant."""

    suite: Suite
    version: VersionRecord


def suites_of(versions: Sequence[VersionRecord], chosen: Sequence[Suite]) -> tuple[Asked, ...]:
    """What versions made of these are measured on: `chosen`, else the suites of each one's recipe."""
    found: list[Asked] = []
    for version in versions:
        recipe = recipe_of(version)
        for suite in chosen or (default_suites(recipe) if recipe else ()):
            task = recipe.data.task if recipe and suite.data is None else None
            named = suite.model_copy(update={"task": suite.task or task})
            of_its_own = named.task is None and named.data is None
            if of_its_own or named not in [each.suite for each in found]:
                found.append(Asked(named, version))
    return tuple(found)


def drawn(asked: Sequence[Asked], **changes: Any) -> list[Prepared]:
    """The suites with their items, each kind of them once; what differs under one title and metric says whose.

    Args:
        asked: of versions of one base.
        changes: to all the suites.

    Raises:
        NotFound: the data of a version's recipe are no longer there.
    """
    with base_of(asked[0].version) as base:
        masked = is_masked_lm(base.model)
    found: list[Prepared] = []
    for each in asked:
        try:
            suite = prepare(each.suite.model_copy(update=changes), recipe_of(each.version), masked)
        except NotFound as error:
            raise NotFound(
                f"{each.version.address} was to be measured on its own data. {error.what}",
                "Bring them back, or measure on a built-in task: --task NAME",
            ) from None
        if any(replace(suite, title=other.title) == other for other in found):
            continue
        if any((suite.title, suite.metric) == (other.title, other.metric) for other in found):
            suite = replace(suite, title=f"{suite.title} ({each.version.address})")
        found.append(suite)
    return found


def stored_adapter(version: VersionRecord, base: LoadedBase) -> Adapter:
    """A version as it is stored, every byte checked; decoded where it is compressed."""
    directory = AdapterRegistry().materialise(version.address)
    verify(directory, read_adapter(directory))
    return Adapter(version.address, stored_config(directory), stored_tensors(directory, dict(base.model.state_dict())))


def register_derived(
    name: str,
    first: VersionRecord,
    save: Callable[[Path], None],
    parents: Sequence[Parent],
    metrics: Mapping[str, float],
) -> VersionRecord:
    """Register what `save` writes as the next version of an adapter, once it is seen to load on its base.

    Args:
        name: of the adapter.
        first: the version whose base, recipe and task it takes over.
        save: writes adapter_config.json and adapter_model.safetensors into a folder.
        parents: what it is made of, and how.
        metrics: of the making.
    """
    recipe = recipe_of(first)
    made_of = tuple(parent.address for parent in parents)
    if recipe is None:
        stored: dict[str, Any] = {"origin": {"made_of": list(made_of)}}
    else:
        stored = recipe.model_copy(update={"adapter": name, "migrated_from": None, "made_of": made_of}).as_stored()
    return register_made(name, first.base, stored, first.task, first.description, save, parents, metrics)


def register_made(
    name: str,
    base: BaseModelRecord,
    recipe: dict[str, Any],
    task: str | None,
    description: str | None,
    save: Callable[[Path], None],
    parents: Sequence[Parent],
    metrics: Mapping[str, float],
    dataset: DatasetRecord | None = None,
) -> VersionRecord:
    """Register what `save` writes for a base model, once it is seen to load on it. See `register_derived`.

    `dataset` is what it was trained on, where it was.
    """
    settings = get_settings()
    settings.runs.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=settings.runs, prefix="adapter-") as scratch:
        directory = Path(scratch) / "adapter"
        method = write_adapter(
            directory,
            save,
            method_name=None,
            base_identity=base.identity_sha256,
            base_reference=base.reference,
            recipe=recipe,
            metrics=dict(metrics),
        ).method
        with lent(base, method, recipe.get("training", {}).get("precision", "auto")) as loaded:
            adapted = attach_stored(loaded.model, directory, base_identity=loaded.identity.sha256)
            parameters = sum(tensor.numel() for tensor in adapted.tensors().values())
        return AdapterRegistry().register_version(
            name,
            directory,
            base_identity=base.identity_sha256,
            method=method,
            recipe=recipe,
            trainable_parameters=parameters,
            task=task,
            description=description,
            metrics=metrics,
            parents=parents,
            dataset=dataset,
        )


@contextmanager
def registered(version: VersionRecord) -> Iterator[None]:
    """Ctrl-C within it says that the version is there already.

    Raises:
        Interrupted: it was stopped.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"Stopped after {version.address} was registered.",
            f"What may be left: regraft evaluate {version.address}, regraft promote {version.address}",
        ) from None


def measured(version: VersionRecord, parents: Sequence[VersionRecord], suites: Sequence[Prepared]) -> list[Measured]:
    """Both sides on every suite; what the registry holds already of the very same items is not measured again."""
    by_parent = [_results(parent, suites) for parent in parents]
    return [
        Measured(
            suite=suite.title,
            metric=suite.metric,
            samples=len(suite.examples),
            parents=[results[place] for results in by_parent],
            child=child,
        )
        for place, (suite, child) in enumerate(zip(suites, _results(version, suites), strict=True))
    ]


def better(metric: str, value: float) -> float:
    """The value as a score of which more is better."""
    return -value if metric in LOWER_IS_BETTER else value


def _results(version: VersionRecord, suites: Sequence[Prepared]) -> list[Number]:
    registry = AdapterRegistry()
    known = {
        (e.suite, e.metric, e.dataset_fingerprint): Number(value=e.value, low=e.low, high=e.high)
        for e in reversed(registry.evaluations(version.address))
    }
    keys = [(suite.title, suite.metric, fingerprint(suite.examples)) for suite in suites]
    if any(key not in known for key in keys):
        with attached(version) as (adapted, base):
            for key, suite in zip(keys, suites, strict=True):
                if key not in known:
                    found = run_suite(f"{version.address}: {suite.title}", adapted.model, base.tokenizer, suite)
                    record_result(registry, version.address, suite.title, found)
                    known[key] = Number(value=found.value, low=found.low, high=found.high)
    return [known[key] for key in keys]
