"""Train an adapter by a recipe and register it as the adapter's next version."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict

from flows.base_models import find_base
from flows.data_sets import pinned
from flows.evaluate_adapter import SuiteResult, evaluate_adapter
from flows.gpu import gpu_slot
from flows.migration_kit import keep_kit
from flows.mlflow_run import mlflow_run
from flows.progress import Stage
from flows.reports import report_curve, report_recipe
from flows.run_states import cancel_if_interrupted
from flows.select_data import SelectedData, select_data
from flows.suites import default_suites
from infra.errors import InvalidInput, RegraftError, ServiceUnavailable
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.addresses import adapter_name
from registry.records import AttachmentRecord, BaseModelRecord, DatasetRecord, VersionRecord
from training.adapter_files import write_adapter
from training.base_models import load_base
from training.checkpoints import discard, exclusive
from training.device import base_dtype, best_device
from training.evaluation.evaluate import check_metric
from training.methods.catalog import get_method
from training.methods.contract import Adapted
from training.migration.kit import redaction
from training.progress import TrainingEvent, TrainingOutcome
from training.recipe import Recipe, recipe_from
from training.trainer import train_recipe

logger = logging.getLogger(__name__)


class TrainedVersion(BaseModel):
    """What a training made. `unchanged` says that nothing was trained, since the data were those of `address`."""

    model_config = ConfigDict(frozen=True)

    address: str
    method: str
    base: str
    trainable_parameters: int
    trainable_share: float
    size_bytes: int
    artifact_sha256: str
    final_loss: float
    seconds: float
    steps: int
    mlflow_run_id: str | None
    evaluations: list[SuiteResult]
    migration_kit: dict[str, Any] | None = None
    unchanged: bool = False


@flow(name="train-adapter", flow_run_name="train {recipe.adapter}", on_failure=[cancel_if_interrupted])
def train_adapter(
    recipe: Recipe, fresh: bool = False, evaluate: bool = True, only_if_data_changed: bool = False
) -> TrainedVersion:
    """Select data, train, register, measure the new version on the recipe's suites, and keep its migration kit.

    A run that was interrupted goes on from its last checkpoint, to the same tensors.

    Args:
        recipe: what to train, on what, how.
        fresh: ignore the checkpoint of an interrupted run of this recipe.
        evaluate: measure the new version.
        only_if_data_changed: do nothing where the selected data are those of the adapter's newest version.

    Raises:
        InvalidInput: the adapter cannot be called that, or the recipe is of a version that was not trained on its
            data.
    """
    adapter_name(recipe.adapter)  # now, not when hours of training are to be registered
    if recipe.migrated_from is not None:
        raise InvalidInput(
            f"This recipe tells how {recipe.migrated_from} was migrated to {recipe.base}: on synthetic inputs.",
            f"regraft migrate {recipe.migrated_from} --to {recipe.base}",
        )
    if recipe.made_of is not None:
        raise InvalidInput(
            f"This version was made of {', '.join(recipe.made_of)}, without a training that could be repeated.",
            f"See: regraft lineage {recipe.adapter}",
        )
    if recipe.migration_kit is not None:
        redaction(recipe.migration_kit.redact)
    recipe = recipe.model_copy(update={"data": pinned(recipe.data)})
    report_recipe(recipe)
    data = select_data(recipe)
    newest = _newest(recipe.adapter)
    if only_if_data_changed and newest and newest.dataset and newest.dataset.fingerprint == data.fingerprint:
        return _trained(newest, [], None, unchanged=True)
    version = _train_and_register(recipe, data, fresh)
    try:
        results = evaluate_adapter(version.address) if evaluate else []
    except (RegraftError, httpx.HTTPError) as error:
        lost = f"The Prefect server stopped answering: {error}"
        cause = error if isinstance(error, RegraftError) else ServiceUnavailable(lost, "regraft status")
        what = f"{version.address} is trained and registered, but could not be measured: {cause.what}"
        raise type(cause)(what, cause.remedy) from None
    return _trained(version, results, keep_kit(version, recipe))


def stored_recipe(address: str, overrides: dict[str, Any]) -> Recipe:
    """The recipe that made a version, to train by it again.

    Raises:
        InvalidInput: the version was imported and has none.
    """
    version = AdapterRegistry().get(address)
    if "data" not in version.recipe:
        raise InvalidInput(f"{version.address} was imported; there is no recipe to train by.", "Write one.")
    return recipe_from(version.recipe, version.address, overrides)


@task(task_run_name="train and register {recipe.adapter}", cache_policy=NO_CACHE)
def _train_and_register(recipe: Recipe, data: SelectedData, fresh: bool) -> VersionRecord:
    settings = get_settings()
    record, folder = find_base(recipe.base)
    if record.deprecated_at is not None:
        instead = f"; its successor is {record.successor}" if record.successor else ""
        logger.warning("%s is deprecated%s. The adapter will have to move sooner or later.", record.name, instead)
    base = load_base(
        folder.reference,
        cache=settings.base_models,
        dtype=base_dtype(
            best_device(), recipe.training.precision, trained=get_method(recipe.method.name).card.changes_base
        ),
        device="cpu" if recipe.training.shard_base else best_device(),
    )
    for suite in default_suites(recipe):
        check_metric(base.model, suite.metric, suite.shots)  # now, not when it is trained
    workdir = settings.runs / f"{recipe.adapter}-{recipe.digest}"
    with exclusive(workdir):
        pass  # refuse here what is being trained elsewhere, before its MLflow run is touched
    if fresh:
        discard(workdir)
    tags = {
        "regraft.base_model": record.name,
        "regraft.base_identity": record.identity_sha256,
        "regraft.method": recipe.method.name,
    }
    with mlflow_run(recipe, tags, flow_run.id or "", workdir) as run:
        stage = Stage(f"train {recipe.adapter}")
        preparing: dict[str, Stage] = {}

        def on_event(event: TrainingEvent) -> None:
            stage(event.step, event.total_steps, f"loss {event.loss:.3f}")
            run.log(event)

        def on_preparing(what: str, done: int, total: int) -> None:
            preparing.setdefault(what, Stage(f"prepare {recipe.adapter}: {what}"))(done, total)

        with gpu_slot(best_device()):
            adapted, outcome = train_recipe(
                recipe,
                base,
                data.train,
                data.validation,
                workdir=workdir,
                on_event=on_event,
                on_preparing=on_preparing,
            )
        with TemporaryDirectory(dir=settings.runs, prefix="adapter-") as scratch:
            report = Path(scratch) / "report"
            report.mkdir()
            (report / "training-curve.png").write_bytes(report_curve(recipe.adapter, outcome))
            run.attach(report)
            version = _register(recipe, data, record, adapted, outcome, Path(scratch) / "adapter", run.id)
    discard(workdir)  # registered: the checkpoints have done their duty
    return version


def _register(
    recipe: Recipe,
    data: SelectedData,
    base: BaseModelRecord,
    adapted: Adapted,
    outcome: TrainingOutcome,
    directory: Path,
    run_id: str,
) -> VersionRecord:
    metrics = {"final_loss": outcome.losses[-1][1], "steps": float(outcome.steps)}
    write_adapter(
        directory,
        adapted.save,
        method_name=recipe.method.name,
        base_identity=base.identity_sha256,
        base_reference=base.reference,
        recipe=recipe.as_stored(),
        metrics=metrics,
    )
    origin = recipe.data.model_dump(mode="json", exclude_none=True)
    return AdapterRegistry().register_version(
        recipe.adapter,
        directory,
        base_identity=base.identity_sha256,
        method=recipe.method.name,
        recipe=recipe.as_stored(),
        trainable_parameters=sum(parameter.numel() for parameter in adapted.trainable().values()),
        task=recipe.data.task,
        description=recipe.description or None,
        mlflow_run_id=run_id,
        metrics={**metrics, "seconds": outcome.seconds},  # not in the files: the same tensors, the same artifact
        dataset=DatasetRecord(recipe.data.name, data.fingerprint, len(data.train), origin, recipe.data.selected),
    )


def _newest(adapter: str) -> VersionRecord | None:
    registry = AdapterRegistry()
    if not registry.has_adapter(adapter):
        return None
    ready = [version for version in registry.versions(adapter) if version.state == "ready"]
    return max(ready, key=lambda version: version.number, default=None)


def _trained(
    version: VersionRecord, results: list[SuiteResult], kit: AttachmentRecord | None, unchanged: bool = False
) -> TrainedVersion:
    return TrainedVersion(
        address=version.address,
        method=version.method,
        base=version.base.name,
        trainable_parameters=version.trainable_parameters,
        trainable_share=version.trainable_parameters / version.base.parameters,
        size_bytes=version.size_bytes,
        artifact_sha256=version.artifact_sha256,
        final_loss=version.metrics["final_loss"],
        seconds=version.metrics["seconds"],
        steps=int(version.metrics["steps"]),
        mlflow_run_id=version.mlflow_run_id,
        evaluations=results,
        migration_kit=kit.details if kit else None,
        unchanged=unchanged,
    )
