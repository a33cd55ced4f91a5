"""Regraft: move a version to another base model without the data it was trained on (Trans-LoRA, arXiv 2405.17258).

The target base writes inputs like the kit's seeds; the kit's discriminator, on the source base, keeps those that look
real; the source base with the old adapter answers them; a fresh adapter on the target learns the answers. Old adapter,
bare target and new adapter are then measured on real held-out items.

Nothing is read of the training data but the seeds that the kit kept.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict

from flows.base_models import find_base
from flows.evaluate_adapter import record_result, run_suite
from flows.gpu import gpu_slot
from flows.migration_kit import kit_of, words
from flows.mlflow_run import mlflow_run
from flows.progress import Stage
from flows.promote_adapter import Promotion, promote_adapter
from flows.reports import report_table
from flows.run_states import cancel_if_interrupted
from flows.suites import Prepared, default_suites, prepare, title
from infra.errors import InvalidInput
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.addresses import adapter_name, alias_name
from registry.attachments import MIGRATION_KIT
from registry.records import AttachmentRecord, BaseModelRecord, DatasetRecord, Parent, VersionRecord
from serving.loading import load, recipe_of
from training.adapter_files import write_adapter
from training.base_models import BaseFolder, LoadedBase, load_base
from training.checkpoints import exclusive
from training.data.example import Example, fingerprint
from training.data.sampling import sample
from training.data.sources import load_held_out
from training.device import base_dtype, best_device
from training.evaluation.result import EvaluationResult
from training.evaluation.suite import Suite
from training.methods.catalog import get_method
from training.migration.gate import LOWER_IS_BETTER, Standing
from training.migration.kit import Kit, load_discriminator
from training.migration.labelling import Labelled, label
from training.migration.options import MigrationOptions
from training.migration.synthesis import Pool, synthesise
from training.objectives.of_model import is_masked_lm
from training.options import TrainingOptions
from training.progress import TrainingEvent
from training.recipe import Recipe
from training.trainer import train_recipe

MOST_INPUTS = 250  # the paper's N
LONGER = 2  # times the longest of a few seeds, where nobody knows how long the longest of all were
SHOTS = 3  # solved examples before the bare target's questions, the other time none


class Compared(BaseModel):
    """One suite, answered by the old adapter, the bare target and the new adapter; each with its 95 % interval."""

    model_config = ConfigDict(frozen=True)

    suite: str
    metric: str
    samples: int
    teacher: tuple[float, float | None, float | None]
    bare: tuple[float, float | None, float | None]
    student: tuple[float, float | None, float | None]
    passed: bool


class Migration(BaseModel):
    """What a migration made, and what was decided about it."""

    model_config = ConfigDict(frozen=True)

    source: str
    address: str
    base: str
    method: str
    inputs: int
    written: int
    dropped: dict[str, int]
    acceptance: float | None
    discriminator: float | None
    compared: list[Compared]
    passed: bool | None
    promotion: Promotion | None
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Everything that is known before anything is loaded."""

    source: VersionRecord
    recipe: Recipe
    target: BaseModelRecord
    target_folder: BaseFolder
    student: Recipe
    task: str
    seeds: tuple[Example, ...]
    inputs: int
    longest: int
    longest_answer: int
    kit: Kit | None
    kit_record: AttachmentRecord | None
    kit_directory: Path | None
    suites: tuple[Prepared, ...]
    options: MigrationOptions

    @property
    def workdir(self) -> Path:
        """Where what is done so far lies; of these settings alone."""
        told = [
            self.source.artifact_sha256,
            self.target.identity_sha256,
            self.student.as_stored(),
            self.kit_record.artifact_sha256 if self.kit_record else [[s.prompt, s.completion] for s in self.seeds],
            self.options.model_dump(mode="json"),
        ]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        return get_settings().runs / f"migrate-{self.source.adapter}-{self.source.number}-{digest}"


@flow(name="migrate-adapter", flow_run_name="migrate {address} to {target}", on_failure=[cancel_if_interrupted])
def migrate_adapter(
    address: str,
    target: str,
    options: MigrationOptions = MigrationOptions(),
    seeds: tuple[Example, ...] = (),
    suites: tuple[Suite, ...] = (),
    evaluate: bool = True,
    name: str | None = None,
    promote_to: str | None = None,
) -> Migration:
    """Move a version to another base model; a migration that was interrupted goes on where it was.

    The new version is registered whatever it is worth; `passed` says whether it may take the old one's place.

    Args:
        address: the version to move.
        target: the base model to move it to, by registered name or reference.
        options: how.
        seeds: instead of a kit: nothing then filters what the target writes.
        suites: to measure on. None given: those of the version's recipe.
        evaluate: measure old adapter, bare target and new adapter.
        name: of the adapter that the new version belongs to. Default: the old one's.
        promote_to: an alias, moved if the version passes and its policy allows it.

    Raises:
        InvalidInput: the target is the version's own base, there is neither kit nor seeds, or held-out items cannot be
            had without reading the training data.
        RegraftError: the target writes too few inputs of the kind.
    """
    began = time.monotonic()
    plan = plan_migration(address, target, options, seeds, suites, evaluate, name, promote_to)
    with exclusive(plan.workdir):
        pool = _synthesise(plan)
        labelled = _label(plan, pool)
        version, compared = _train_and_judge(plan, pool, labelled)
        shutil.rmtree(plan.workdir / "work", ignore_errors=True)
    passed = all(suite.passed for suite in compared) if compared else None
    promotion = promote_adapter(version.address, alias=promote_to) if promote_to and passed else None
    rows = [{"suite": c.suite, "teacher": c.teacher[0], "bare": c.bare[0], "student": c.student[0]} for c in compared]
    report_table(version.adapter, "migration", rows)
    return Migration(
        source=plan.source.address,
        address=version.address,
        base=plan.target.name,
        method=version.method,
        inputs=len(labelled.examples),
        written=pool.written,
        dropped={**pool.dropped, "empty answer": labelled.empty, "run-on answer": labelled.run_on},
        acceptance=pool.acceptance if _filters(plan) else None,
        discriminator=_accuracy(plan),
        compared=compared,
        passed=passed,
        promotion=promotion,
        seconds=time.monotonic() - began,
    )


def plan_migration(
    address: str,
    target: str,
    options: MigrationOptions,
    seeds: tuple[Example, ...],
    suites: tuple[Suite, ...],
    evaluate: bool,
    name: str | None,
    promote_to: str | None,
) -> Plan:
    """All that can be decided, and refused, before a model is loaded. See `migrate_adapter`."""
    registry = AdapterRegistry()
    source = registry.get(address)
    recipe = recipe_of(source)
    if recipe is None:
        raise InvalidInput(
            f"{source.address} was imported without a recipe, so how it was asked in training is not known.",
            "Migrate a version that was trained here.",
        )
    adapter_name(name or source.adapter)
    if promote_to is not None:
        alias_name(promote_to)
        if not evaluate:
            raise InvalidInput(
                f"'{promote_to}' cannot move to a version that is not measured.",
                "Leave out --no-evaluate, or --promote.",
            )
    record, folder = find_base(target)
    if record.identity_sha256 == source.base.identity_sha256:
        raise InvalidInput(f"{source.address} stands on {record.name} already.", "Name another base model.")
    found = None if seeds else kit_of(source.address)
    if found is None and not seeds:
        raise InvalidInput(
            f"{source.address} has no migration kit.",
            f"While its data are at hand: regraft kit build {source.address}. Else give some examples: --seeds FILE "
            "(weaker: nothing then tells good synthetic inputs from bad ones).",
        )
    kit_record, kit, kit_directory = found or (None, None, None)
    shown = tuple(Example(seed.prompt, seed.completion) for seed in kit.seeds) if kit else seeds
    rows = kit.rows if kit else MOST_INPUTS
    method = options.method or recipe.method
    student = recipe.model_copy(
        update={
            "adapter": name or source.adapter,
            "base": record.name,
            "method": method,
            "training": _without_validation(options.training or recipe.training),
            "migrated_from": source.address,
        }
    )
    student.method_config("method")
    chosen = (suites or default_suites(recipe)) if evaluate else ()
    return Plan(
        source=source,
        recipe=recipe,
        target=record,
        target_folder=folder,
        student=student,
        task=kit.task if kit else words(recipe),
        seeds=shown,
        inputs=options.inputs or min(rows, MOST_INPUTS),
        longest=kit.longest if kit else LONGER * max(len(seed.prompt) for seed in seeds),
        longest_answer=kit.longest_answer if kit else LONGER * max(len(seed.completion) for seed in seeds),
        kit=kit,
        kit_record=kit_record,
        kit_directory=kit_directory,
        suites=tuple(_held_out(suite, recipe) for suite in chosen),
        options=options,
    )


@task(task_run_name="synthesise inputs", cache_policy=NO_CACHE)
def _synthesise(plan: Plan) -> Pool:
    target = _bare(plan.target_folder, plan.student)
    margins = None
    if _filters(plan):
        assert plan.kit is not None and plan.kit_directory is not None
        _, folder = find_base(AdapterRegistry().base_model(plan.kit.base_identity).name)
        margins = load_discriminator(plan.kit_directory, plan.kit, _bare(folder, plan.recipe)).margins
    with gpu_slot(best_device()):
        return synthesise(
            target.model,
            target.tokenizer,
            plan.task,
            [seed.prompt for seed in plan.seeds],
            plan.inputs,
            plan.options.synthesis,
            seed=plan.options.seed,
            longest=plan.longest,
            margins=margins,
            kept_in=plan.workdir / "work" / "inputs.jsonl",
            on_progress=Stage(f"migrate {plan.source.address}: inputs that {plan.target.name} writes"),
        )


@task(task_run_name="label inputs", cache_policy=NO_CACHE)
def _label(plan: Plan, pool: Pool) -> Labelled:
    teacher = load(plan.source.address)
    with gpu_slot(best_device()):
        labelled = label(
            teacher.model,
            teacher.prompt_format,
            pool.inputs,
            longest=plan.longest_answer,
            kept_in=plan.workdir / "work" / "answers.jsonl",
            on_progress=Stage(f"migrate {plan.source.address}: answers of the old adapter"),
        )
    if not labelled.examples:
        raise InvalidInput(
            f"{plan.source.address} answers none of {len(pool.inputs)} synthetic inputs with anything like an answer: "
            f"{labelled.empty} with nothing, {labelled.run_on} with more than {plan.longest_answer} characters.",
            f"Look at it: regraft generate {plan.source.address} 'an input'",
        )
    return labelled


@task(task_run_name="train and judge", cache_policy=NO_CACHE)
def _train_and_judge(plan: Plan, pool: Pool, labelled: Labelled) -> tuple[VersionRecord, list[Compared]]:
    registry, settings = AdapterRegistry(), get_settings()
    target = _bare(plan.target_folder, plan.student)
    tags = {
        "regraft.base_model": plan.target.name,
        "regraft.base_identity": plan.target.identity_sha256,
        "regraft.method": plan.student.method.name,
        "regraft.migrated_from": plan.source.address,
    }
    bare = _bare_results(plan, target)
    teacher = _teacher_results(plan)
    with mlflow_run(plan.student, tags, flow_run.id or "", plan.workdir / "work" / "training") as run:
        stage = Stage(f"migrate {plan.source.address}: training on {plan.target.name}")

        def on_event(event: TrainingEvent) -> None:
            stage(event.step, event.total_steps, f"loss {event.loss:.3f}")
            run.log(event)

        with gpu_slot(best_device()):
            adapted, outcome = train_recipe(
                plan.student,
                target,
                labelled.examples,
                (),
                workdir=plan.workdir / "work" / "training",
                on_event=on_event,
                on_preparing=lambda what, done, total: None,
            )
        adapted.model.eval()
        student = [
            run_suite(f"new adapter: {suite.title}", adapted.model, target.tokenizer, suite) for suite in plan.suites
        ]
        compared = [
            _compared(plan, suite, *results)
            for suite, *results in zip(plan.suites, teacher, bare, student, strict=True)
        ]
        with TemporaryDirectory(dir=settings.runs, prefix="adapter-") as scratch:
            directory = Path(scratch) / "adapter"
            metrics = {"final_loss": outcome.losses[-1][1], "steps": float(outcome.steps)}
            write_adapter(
                directory,
                adapted,
                method_name=plan.student.method.name,
                base_identity=plan.target.identity_sha256,
                base_reference=plan.target.reference,
                recipe=plan.student.as_stored(),
                metrics=metrics,
            )
            version = registry.register_version(
                plan.student.adapter,
                directory,
                base_identity=plan.target.identity_sha256,
                method=plan.student.method.name,
                recipe=plan.student.as_stored(),
                trainable_parameters=sum(parameter.numel() for parameter in adapted.trainable().values()),
                task=plan.recipe.data.task,
                description=plan.recipe.description or None,
                mlflow_run_id=run.id,
                metrics={**metrics, "seconds": outcome.seconds},
                dataset=DatasetRecord(
                    f"synthetic for {plan.source.address}",
                    fingerprint(labelled.examples),
                    len(labelled.examples),
                    {"migrated_from": plan.source.address, "written_by": plan.target.name},
                ),
                parents=[Parent(plan.source.address, "migrated_from", _details(plan, pool, labelled, compared))],
            )
    for suite, result in zip(plan.suites, student, strict=True):
        record_result(registry, version.address, suite.title, result)
    if plan.kit_directory is not None and plan.kit_record is not None:
        registry.attach(version.address, MIGRATION_KIT, plan.kit_directory, plan.kit_record.details)
    return version, compared


def _bare(folder: BaseFolder, recipe: Recipe) -> LoadedBase:
    device = best_device()
    base = load_base(
        folder.reference,
        cache=get_settings().base_models,
        dtype=base_dtype(device, recipe.training.precision, trained=get_method(recipe.method.name).card.changes_base),
        device=device,
    )
    if base.tokenizer is None or is_masked_lm(base.model):
        raise InvalidInput(f"{folder.reference} writes no text, which a migration needs of both base models.")
    return base


def _held_out(suite: Suite, recipe: Recipe) -> Prepared:
    """A suite's items; of the recipe's own data no more is read than the test part."""
    suite = suite.model_copy(update={"shots": 0})  # solved examples come from the seeds, where any are wanted
    if suite.task is not None or recipe.data.task is not None:
        return prepare(suite, recipe)
    examples = load_held_out(recipe.data, suite.split, recipe.seed)
    return Prepared(
        title(suite, recipe),
        suite.metric or "exact_match",
        tuple(sample(examples, suite.samples, suite.seed)),
        (),
        recipe.data.instruction_text,
        suite.max_new_tokens,
    )


def _teacher_results(plan: Plan) -> list[EvaluationResult]:
    """The old adapter's answers to the same items, and recorded, since they are of the version."""
    if not plan.suites:
        return []
    teacher = load(plan.source.address)
    results = []
    for suite in plan.suites:
        found = run_suite(f"old adapter: {suite.title}", teacher.model, teacher.tokenizer, suite)
        record_result(AdapterRegistry(), plan.source.address, suite.title, found)
        results.append(found)
    return results


def _bare_results(plan: Plan, target: LoadedBase) -> list[EvaluationResult]:
    """The bare target's: the better of none and three solved examples in front."""
    results = []
    for suite in plan.suites:
        shots = [(), plan.seeds[:SHOTS]] if suite.metric not in LOWER_IS_BETTER else [()]
        found = [
            run_suite(f"bare target: {suite.title}", target.model, target.tokenizer, replace(suite, shots=tuple(some)))
            for some in shots
        ]
        results.append(max(found, key=lambda result: result.value))
    return results


def _compared(
    plan: Plan, suite: Prepared, teacher: EvaluationResult, bare: EvaluationResult, student: EvaluationResult
) -> Compared:
    standing = Standing(suite.title, suite.metric, teacher.value, bare.value, student.value)
    return Compared(
        suite=suite.title,
        metric=suite.metric,
        samples=student.samples,
        teacher=(teacher.value, teacher.low, teacher.high),
        bare=(bare.value, bare.low, bare.high),
        student=(student.value, student.low, student.high),
        passed=standing.passes(plan.options.allowed_loss),
    )


def _details(plan: Plan, pool: Pool, labelled: Labelled, compared: Sequence[Compared]) -> dict[str, Any]:
    """What the lineage remembers of a migration."""
    return {
        "kit": plan.kit_record.artifact_sha256 if plan.kit_record else None,
        "seeds": len(plan.seeds),
        "discriminator": _accuracy(plan),
        "filtered": _filters(plan),
        "acceptance": pool.acceptance if _filters(plan) else None,
        "written": pool.written,
        "inputs": len(labelled.examples),
        "synthetic_fingerprint": fingerprint(labelled.examples),
        "options": plan.options.model_dump(mode="json", exclude_none=True),
        "compared": [suite.model_dump(mode="json") for suite in compared],
    }


def _filters(plan: Plan) -> bool:
    return plan.options.filtered and plan.kit is not None and plan.kit.discriminator is not None


def _accuracy(plan: Plan) -> float | None:
    return plan.kit.discriminator.balanced_accuracy if plan.kit and plan.kit.discriminator else None


def _without_validation(training: TrainingOptions) -> TrainingOptions:
    """There are no validation examples: all that is synthetic is trained on."""
    return training.model_copy(update={"validate_every": None, "early_stopping": None})
