"""Regraft: move a version to another base model without the data it was trained on (Trans-LoRA, arXiv 2405.17258).

The target base writes inputs like the kit's seeds; of those some are chosen that together look like the real ones, by
the kit's discriminator, on the source base, and by their lengths; the source base with the old adapter answers them; a
fresh adapter on the target learns the answers. Old adapter, bare target and new adapter are then measured on real
held-out items.

Nothing is read of the training data but the seeds that the kit kept.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict
from torch import nn

from flows.attached import attached
from flows.evaluate_adapter import record_result, run_suite
from flows.gpu import gpu_slot
from flows.migration_plan import Plan, generation_of, plan_migration
from flows.mlflow_run import mlflow_run
from flows.progress import Stage
from flows.promote_adapter import Promotion, promote_adapter
from flows.reports import report_table
from flows.run_states import cancel_if_interrupted
from flows.suites import Prepared
from infra.errors import Conflict, InvalidInput
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.attachments import MIGRATION_KIT
from registry.lineage import MIGRATED
from registry.records import DatasetRecord, Parent, VersionRecord
from training.adapter_files import write_adapter
from training.base_models import LoadedBase
from training.checkpoints import exclusive
from training.data.example import Example, fingerprint
from training.data.prompting import PromptFormat
from training.device import base_dtype, best_device
from training.evaluation.result import EvaluationResult
from training.evaluation.suite import Suite
from training.methods.catalog import get_method
from training.migration import second_opinion
from training.migration.gate import LOWER_IS_BETTER, Standing
from training.migration.kit import load_discriminator
from training.migration.labelling import Labelled, label
from training.migration.options import MigrationOptions
from training.migration.soft_labels import require_shared_vocabulary, soft_labels
from training.migration.synthesis import Pool, synthesise
from training.objectives.distillation import Distillation, Distilled
from training.objectives.of_model import is_masked_lm
from training.progress import TrainingEvent
from training.recipe import Recipe
from training.shared_bases import shared_bases
from training.trainer import train_recipe

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


class Link(BaseModel):
    """A version in a chain of migrations, and what it measured: suite → value and 95 % interval, each its newest."""

    model_config = ConfigDict(frozen=True)

    address: str
    base: str
    measured: dict[str, tuple[float, float | None, float | None]]


class Migration(BaseModel):
    """What a migration made, and what was decided about it.

    `chain` leads from the version that was trained to this one, where there is more than one migration between them;
    `existed` says that the very same migration had made it before.
    """

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
    chain: list[Link]
    passed: bool | None
    promotion: Promotion | None
    existed: bool
    seconds: float


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
    pool: Path | None = None,
) -> Migration:
    """Move a version to another base model; a migration that was interrupted goes on where it was.

    One that has been made before, by the same kit and settings, is not made again: its version is returned.

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
        pool: a file of inputs that were written for the same kit and target, or will be; it is left there.

    Raises:
        InvalidInput: the target is the version's own base, there is neither kit nor seeds, or held-out items cannot be
            had without reading the training data.
        Conflict: the alias to promote to has moved meanwhile; the new version is registered.
        RegraftError: the target writes too few inputs of the kind.
    """
    began = time.monotonic()
    plan = plan_migration(address, target, options, seeds, suites, evaluate, name, promote_to)
    with exclusive(plan.workdir), shared_bases():
        version = standing = _standing(plan)
        if version is None:
            if plan.options.distillation.of == "logits":
                _require_shared_vocabulary(plan)
            written = _synthesise(plan, pool or plan.workdir / "work" / "inputs.jsonl")
            if plan.options.answers == "settled":
                labelled, distilled = _settled(plan, written, _label(plan, written.inputs)[0]), None
            else:
                labelled, distilled = _label(plan, plan.chosen(written))
            version = _train_and_judge(plan, written, labelled, distilled, began)
            shutil.rmtree(plan.workdir / "work", ignore_errors=True)
    told = _told_of(plan.source.address, version.address)
    compared = [Compared.model_validate(suite) for suite in told["compared"]]
    passed = all(suite.passed for suite in compared) if compared else None
    promotion = _promoted(plan, version) if passed else None
    rows = [{"suite": c.suite, "teacher": c.teacher[0], "bare": c.bare[0], "student": c.student[0]} for c in compared]
    report_table(version.adapter, "migration", rows)
    return Migration(
        source=plan.source.address,
        address=version.address,
        base=plan.target.name,
        method=version.method,
        inputs=told["inputs"],
        written=told["written"],
        dropped=told.get("dropped", {}),
        acceptance=told["acceptance"],
        discriminator=plan.discriminator,
        compared=compared,
        chain=_chain(version.address, [suite.title for suite in plan.suites]),
        passed=passed,
        promotion=promotion,
        existed=standing is not None,
        seconds=time.monotonic() - began,
    )


def _standing(plan: Plan) -> VersionRecord | None:
    """The version that this very migration has made before, to its end."""
    registry = AdapterRegistry()
    if (plan.workdir / "work").exists():
        return None
    for edge in registry.lineage(plan.source.address).edges:
        same = edge.parent == plan.source.address and edge.details.get("plan") == plan.digest
        if same and (edge.details["compared"] or not plan.suites):
            version = registry.get(edge.child)
            if version.state == "ready":
                return version
    return None


def _told_of(source: str, address: str) -> dict[str, Any]:
    """What the lineage remembers of the migration that made a version."""
    edges = AdapterRegistry().lineage(address).edges
    return dict(next(edge.details for edge in edges if (edge.parent, edge.child) == (source, address)))


def _chain(address: str, suites: Sequence[str]) -> list[Link]:
    registry = AdapterRegistry()
    graph = registry.lineage(address)
    parents = {edge.child: edge.parent for edge in graph.edges if edge.relation == MIGRATED}
    bases = {node.address: node.base for node in graph.nodes}
    chain = [address]
    while chain[0] in parents:
        chain.insert(0, parents[chain[0]])
    return [_link(registry, each, bases[each], suites, chain) for each in chain] if len(chain) > 2 else []


def _link(registry: AdapterRegistry, address: str, base: str, suites: Sequence[str], chain: Sequence[str]) -> Link:
    """Of a recipe's own test file each adapter of a chain has its results under its own name."""
    newest_last = reversed(registry.evaluations(address))
    known = {found.suite: (found.value, found.low, found.high) for found in newest_last}
    own, names = address.partition("@")[0], {each.partition("@")[0] for each in chain}
    measured = {}
    for suite in suites:
        name, _, split = suite.partition("/")
        if found := known.get(suite) or (known.get(f"{own}/{split}") if name in names else None):
            measured[suite] = found
    return Link(address=address, base=base, measured=measured)


def _promoted(plan: Plan, version: VersionRecord) -> Promotion | None:
    """Where the alias is still who it was when the migration was asked for, the gate decides."""
    if plan.promote_to is None:
        return None
    if generation_of(version.adapter, plan.promote_to) != plan.held_at:
        holder = AdapterRegistry().alias(version.adapter, plan.promote_to)
        raise Conflict(
            f"{plan.promote_to} has moved to {holder.address if holder else 'nobody'} while {plan.source.address} was "
            f"being migrated; it stays there. {version.address} is registered.",
            f"Where it is to move all the same: regraft promote {version.address} --to {plan.promote_to}",
        )
    return promote_adapter(version.address, alias=plan.promote_to)


def _require_shared_vocabulary(plan: Plan) -> None:
    with (
        _bare(plan.source.base.reference, plan.recipe) as source,
        _bare(plan.target_folder.reference, plan.student) as target,
    ):
        require_shared_vocabulary(source.tokenizer, target.tokenizer)


@task(task_run_name="synthesise inputs", cache_policy=NO_CACHE)
def _synthesise(plan: Plan, kept_in: Path) -> Pool:
    with ExitStack() as stack:
        target = stack.enter_context(_bare(plan.target_folder.reference, plan.student))
        margins = None
        if plan.filters:
            assert plan.kit is not None and plan.kit_directory is not None
            reference = AdapterRegistry().base_model(plan.kit.base_identity).reference
            source = stack.enter_context(_bare(reference, plan.recipe))
            margins = load_discriminator(plan.kit_directory, plan.kit, source).margins
        stack.enter_context(gpu_slot(best_device()))
        return synthesise(
            target.model,
            target.tokenizer,
            plan.task,
            [seed.prompt for seed in plan.seeds],
            plan.written,
            plan.options.synthesis,
            seed=plan.options.seed,
            longest=plan.longest,
            margins=margins,
            refusing=plan.options.preset == "paper",
            least=plan.least,
            kept_in=kept_in,
            on_progress=Stage(f"migrate {plan.source.address}: inputs that {plan.target.name} writes"),
        )


@task(task_run_name="label inputs", cache_policy=NO_CACHE)
def _label(plan: Plan, inputs: Sequence[str]) -> tuple[Labelled, Distilled | None]:
    chosen, distilled = plan.options.distillation, None
    with _teacher(plan) as (model, tokenizer), gpu_slot(best_device()):
        form = PromptFormat(tokenizer, plan.recipe.data.instruction_text)
        labelled = label(
            model,
            form,
            inputs,
            longest=plan.longest_answer,
            kept_in=plan.workdir / "work" / "answers.jsonl",
            on_progress=Stage(f"migrate {plan.source.address}: answers of the old adapter"),
        )
        if chosen.of == "logits" and labelled.examples:
            labels = soft_labels(
                model,
                form,
                plan.learnt(labelled),
                chosen.top_k,
                kept_in=plan.workdir / "work" / f"logits-{fingerprint(plan.learnt(labelled))[:12]}.safetensors",
                on_progress=Stage(f"migrate {plan.source.address}: logits of the old adapter"),
            )
            distilled = Distilled(Distillation(chosen.temperature, chosen.weight), labels)
    if not labelled.examples:
        raise InvalidInput(
            f"{plan.source.address} answers none of {len(inputs)} synthetic inputs with anything like an answer: "
            f"{labelled.empty} with nothing, {labelled.run_on} with more than {plan.longest_answer} characters.",
            f"Look at it: regraft generate {plan.source.address} 'an input'",
        )
    return labelled, distilled


@task(task_run_name="settle answers", cache_policy=NO_CACHE)
def _settled(plan: Plan, pool: Pool, labelled: Labelled) -> Labelled:
    """The chosen inputs, with the answers that the old adapter and the new base's own agree on best."""
    examples, opinions = labelled.examples, []
    parts = second_opinion.halves(len(examples), plan.options.seed)
    for half, (learnt, asked) in enumerate((parts, parts[::-1])):
        kept = plan.workdir / "work" / f"opinions-{half}.json"
        if learnt and not kept.is_file():
            second_opinion.store(kept, _opinions(plan, labelled, learnt, asked, half))
        opinions += second_opinion.stored(kept) if learnt else []
    with _teacher(plan) as (model, tokenizer), gpu_slot(best_device()):
        form = PromptFormat(tokenizer, plan.recipe.data.instruction_text)
        answered = second_opinion.settled(model, form, examples, opinions)
    changed = sum(new != old for new, old in zip(answered, examples, strict=True))
    chosen = set(plan.chosen(pool))
    return replace(labelled, examples=tuple(each for each in answered if each.prompt in chosen), changed=changed)


def _opinions(
    plan: Plan, labelled: Labelled, learnt: Sequence[int], asked: Sequence[int], half: int
) -> list[second_opinion.Opinion]:
    told = f"migrate {plan.source.address}: second opinions, half {half + 1}"
    training, asking = Stage(f"{told}, training"), Stage(told)
    own = replace(labelled, examples=tuple(labelled.examples[place] for place in learnt))
    with _bare(plan.target_folder.reference, plan.student) as target, gpu_slot(best_device()):
        adapted, _ = train_recipe(
            plan.student,
            target,
            plan.learnt(own),
            (),
            workdir=plan.workdir / "work" / f"half-{half}",
            on_event=lambda event: training(event.step, event.total_steps, f"loss {event.loss:.3f}"),
            on_preparing=lambda what, done, total: None,
        )
        return second_opinion.differing(
            adapted.model.eval(),
            PromptFormat(target.tokenizer, plan.student.data.instruction_text),
            labelled.examples,
            asked,
            longest=plan.longest_answer,
            kept_in=plan.workdir / "work" / f"answers-{half}.jsonl",
            on_progress=asking,
        )


@task(task_run_name="train and judge", cache_policy=NO_CACHE)
def _train_and_judge(
    plan: Plan, pool: Pool, labelled: Labelled, distilled: Distilled | None, began: float
) -> VersionRecord:
    registry, settings, examples = AdapterRegistry(), get_settings(), plan.learnt(labelled)
    tags = {
        "regraft.base_model": plan.target.name,
        "regraft.base_identity": plan.target.identity_sha256,
        "regraft.method": plan.student.method.name,
        "regraft.migrated_from": plan.source.address,
    }
    teacher = _teacher_results(plan)
    with (
        _bare(plan.target_folder.reference, plan.student) as target,
        mlflow_run(plan.student, tags, flow_run.id or "", plan.workdir / "work" / "training") as run,
    ):
        bare = _bare_results(plan, target)
        stage = Stage(f"migrate {plan.source.address}: training on {plan.target.name}")

        def on_event(event: TrainingEvent) -> None:
            stage(event.step, event.total_steps, f"loss {event.loss:.3f}")
            run.log(event)

        with gpu_slot(best_device()):
            adapted, outcome = train_recipe(
                plan.student,
                target,
                examples,
                (),
                workdir=plan.workdir / "work" / "training",
                on_event=on_event,
                on_preparing=lambda what, done, total: None,
                distilled=distilled,
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
                adapted.save,
                method_name=plan.student.method.name,
                base_identity=plan.target.identity_sha256,
                base_reference=plan.target.reference,
                recipe=plan.student.as_stored(),
                metrics=metrics,
            )
            version = _registered(plan.student.adapter, run.id) or registry.register_version(
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
                    fingerprint(examples),
                    len(examples),
                    {"migrated_from": plan.source.address, "written_by": plan.target.name},
                ),
                parents=[Parent(plan.source.address, MIGRATED, _details(plan, pool, labelled, compared, began))],
            )
    for suite, result in zip(plan.suites, student, strict=True):
        record_result(registry, version.address, suite.title, result)
    has_kit = registry.attachment(version.address, MIGRATION_KIT) is not None
    if plan.kit_directory is not None and plan.kit_record is not None and not has_kit:
        registry.attach(version.address, MIGRATION_KIT, plan.kit_directory, plan.kit_record.details)
    return version


def _registered(adapter: str, run_id: str) -> VersionRecord | None:
    """The version that a run of MLflow's made before its process was killed."""
    registry = AdapterRegistry()
    versions = registry.versions(adapter) if registry.has_adapter(adapter) else []
    return next((each for each in versions if each.mlflow_run_id == run_id and each.state == "ready"), None)


@contextmanager
def _bare(reference: str, recipe: Recipe) -> Iterator[LoadedBase]:
    """A base model as the recipe's method needs it, to be attached to within the block."""
    device, changed = best_device(), get_method(recipe.method.name).card.changes_base
    dtype = base_dtype(device, recipe.training.precision, trained=changed)
    settings = get_settings()
    with (
        shared_bases() as bases,
        bases.lend(reference, cache=settings.base_models, dtype=dtype, device=device, own=changed) as base,
    ):
        _require_writer(base, reference)
        yield base


def _require_writer(base: LoadedBase, reference: str) -> None:
    if base.tokenizer is None:
        raise InvalidInput(f"{reference} has no tokenizer.", "Bring its tokenizer's files back beside its weights.")
    if is_masked_lm(base.model):
        raise InvalidInput(f"{reference} is a masked language model: it writes no text.", "Name another base model.")


@contextmanager
def _teacher(plan: Plan) -> Iterator[tuple[nn.Module, Any]]:
    """The source base with the old adapter in force, and its tokenizer; every byte of both is checked."""
    with attached(plan.source) as (adapted, base):
        _require_writer(base, plan.source.base.reference)
        yield adapted.model, base.tokenizer


def _teacher_results(plan: Plan) -> list[EvaluationResult]:
    """The old adapter's answers to the same items, and recorded, since they are of the version."""
    if not plan.suites:
        return []
    results = []
    with _teacher(plan) as (model, tokenizer):
        for suite in plan.suites:
            found = run_suite(f"old adapter: {suite.title}", model, tokenizer, suite)
            record_result(AdapterRegistry(), plan.source.address, suite.title, found)
            results.append(found)
    return results


def _bare_results(plan: Plan, target: LoadedBase) -> list[EvaluationResult]:
    """The bare target's: the better of none and three solved examples in front."""
    results = []
    for suite in plan.suites:
        asked = f"bare target: {suite.title}"
        found = [run_suite(asked, target.model, target.tokenizer, replace(suite, shots=()))]
        if suite.metric not in LOWER_IS_BETTER:
            with suppress(InvalidInput):  # the target reads too little to be shown any
                shown = replace(suite, shots=plan.seeds[:SHOTS])
                found.append(run_suite(asked, target.model, target.tokenizer, shown))
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


def _details(plan: Plan, pool: Pool, labelled: Labelled, compared: Sequence[Compared], began: float) -> dict[str, Any]:
    """What the lineage remembers of a migration."""
    return {
        "plan": plan.digest,
        "kit": plan.kit_record.artifact_sha256 if plan.kit_record else None,
        "seeds": len(plan.seeds),
        "discriminator": plan.discriminator,
        "filtered": plan.filters,
        "acceptance": pool.acceptance,
        "written": pool.written,
        "dropped": {**pool.dropped, "empty answer": labelled.empty, "run-on answer": labelled.run_on},
        "inputs": len(labelled.examples),
        "answers_changed": labelled.changed,
        "synthetic_fingerprint": fingerprint(plan.learnt(labelled)),
        "options": plan.options.model_dump(mode="json", exclude_none=True),
        "seconds": time.monotonic() - began,
        "compared": [suite.model_dump(mode="json") for suite in compared],
    }
