"""What a migration will do, and why it cannot: all that can be known before a model is loaded."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from flows.base_models import find_base
from flows.migration_kit import kit_of, words
from flows.suites import Prepared, default_suites, prepare
from infra.errors import InvalidInput, RegraftError
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.addresses import adapter_name, alias_name
from registry.records import AttachmentRecord, BaseModelRecord, VersionRecord
from serving.loading import recipe_of
from training.base_models import BaseFolder
from training.data.example import Example
from training.evaluation.suite import Suite
from training.migration.choosing import choose
from training.migration.discriminator import better_than_chance
from training.migration.kit import Kit
from training.migration.labelling import Labelled
from training.migration.options import MigrationOptions
from training.migration.synthesis import Pool
from training.objectives.distillation import require_distillable
from training.options import TrainingOptions
from training.recipe import Recipe

MOST_INPUTS = 250  # the paper's N
PER_ROW = 3  # inputs to learn from for each row that there was; the same on paper's terms would be one
LONGER = 2  # times the longest of a few seeds, where nobody knows how long the longest of all were


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
    least: int
    longest: int
    longest_answer: int
    kit: Kit | None
    kit_record: AttachmentRecord | None
    kit_directory: Path | None
    suites: tuple[Prepared, ...]
    options: MigrationOptions
    promote_to: str | None
    held_at: int | None

    @property
    def workdir(self) -> Path:
        """Where what is done so far lies; of these settings alone."""
        return get_settings().runs / f"migrate-{self.source.adapter}-{self.source.number}-{self.digest}"

    @property
    def digest(self) -> str:
        """Names all that decides what comes out."""
        told = [
            self.source.artifact_sha256,
            self.target.identity_sha256,
            self.student.as_stored(),
            self.kit_record.artifact_sha256 if self.kit_record else [[s.prompt, s.completion] for s in self.seeds],
            self.options.model_dump(mode="json"),
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def filters(self) -> bool:
        """Whether a discriminator sorts the inputs; one that tells nothing apart would only waste half of them."""
        judged = self.kit.discriminator if self.kit else None
        return (
            self.options.filtered
            and judged is not None
            and better_than_chance(judged.balanced_accuracy, judged.samples)
        )

    @property
    def written(self) -> int:
        """How many inputs are written: more than are learnt, if that is asked for and there is a way to choose."""
        told = self.kit is not None and (self.filters or self.kit.lengths)
        return ceil(self.options.surplus * self.inputs) if told and self.options.preset == "regraft" else self.inputs

    def chosen(self, pool: Pool) -> Sequence[str]:
        """Those of the written inputs that are learnt from."""
        judged = self.kit.discriminator if self.kit else None
        if self.kit is None or self.options.preset == "paper":
            return pool.inputs
        return choose(
            pool.inputs,
            pool.margins,
            self.inputs,
            temperature=judged.temperature if judged else 1.0,
            bounds=self.kit.lengths,
            seed=self.options.seed,
        )

    def learnt(self, labelled: Labelled) -> tuple[Example, ...]:
        """What the new adapter is trained on: the old one's answers and, of preset regraft, the seeds as they are."""
        seeds = () if self.options.preset == "paper" else tuple(seed for seed in self.seeds if seed.completion)
        return (*labelled.examples, *seeds)

    @property
    def discriminator(self) -> float | None:
        """Balanced accuracy of the kit's discriminator, where it has one."""
        return self.kit.discriminator.balanced_accuracy if self.kit and self.kit.discriminator else None


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
    joined = adapter_name(name or source.adapter)
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
    inputs = inputs_to_learn(options, rows)
    method = options.method or recipe.method
    student = recipe.model_copy(
        update={
            "adapter": joined,
            "base": record.name,
            "method": method,
            "training": _long_enough(_without_validation(options.training or recipe.training), options, inputs),
            "migrated_from": source.address,
            "made_of": None,
        }
    )
    student.method_config("method")
    _require_there(source.base.name, "the old adapter stands on it", "Bring it back.")
    if options.distillation.of == "logits":
        require_distillable(student.training)
        if options.answers == "settled":
            raise InvalidInput(
                "Logits are the old adapter's, answers that are settled are not.",
                "Leave one of them out: --set distillation.of=text, or --set answers=old",
            )
    chosen = (suites or default_suites(recipe)) if evaluate else ()
    plan = Plan(
        source=source,
        recipe=recipe,
        target=record,
        target_folder=folder,
        student=student,
        task=kit.task if kit else words(recipe),
        seeds=shown,
        inputs=inputs,
        least=options.inputs or min(rows, inputs),
        longest=kit.longest if kit else LONGER * max(len(seed.prompt) for seed in seeds),
        longest_answer=kit.longest_answer if kit else LONGER * max(len(seed.completion) for seed in seeds),
        kit=kit,
        kit_record=kit_record,
        kit_directory=kit_directory,
        suites=tuple(_held_out(suite, recipe) for suite in chosen),
        options=options,
        promote_to=promote_to,
        held_at=generation_of(joined, promote_to),
    )
    if plan.filters and kit is not None:
        first = registry.base_model(kit.base_identity).name
        _require_there(first, "the kit's discriminator stands on it", "Bring it back, or do without: --no-filter")
    return plan


def _require_there(base: str, why: str, remedy: str) -> None:
    try:
        find_base(base)
    except RegraftError as error:
        raise InvalidInput(f"{base} is needed, since {why}, and cannot be had: {error.what}", remedy) from None


def generation_of(adapter: str, alias: str | None) -> int | None:
    """How often an alias has moved; None where it was never set."""
    registry = AdapterRegistry()
    record = registry.alias(adapter, alias) if alias and registry.has_adapter(adapter) else None
    return record.generation if record else None


def _held_out(suite: Suite, recipe: Recipe) -> Prepared:
    """A suite's items; of the recipe's own data no more is read than the test part."""
    suite = suite.model_copy(update={"shots": 0})  # solved examples come from the seeds, where any are wanted
    return prepare(suite, recipe, held_out=True)


def inputs_to_learn(options: MigrationOptions, rows: int) -> int:
    """How many inputs the new adapter learns from, of an old one that had so many rows."""
    few = min(rows, MOST_INPUTS)
    return options.inputs or (few if options.preset == "paper" else PER_ROW * few)


def _long_enough(training: TrainingOptions, options: MigrationOptions, inputs: int) -> TrainingOptions:
    """With as many steps as make the `passes`: there are more inputs than rows were, some with wrong answers."""
    if training.steps is None or options.preset == "paper":
        return training
    needed = ceil(options.passes * inputs / (training.batch_size * training.gradient_accumulation))
    return training.model_copy(update={"steps": max(training.steps, needed)})


def _without_validation(training: TrainingOptions) -> TrainingOptions:
    """There are no validation examples: all that is synthetic is trained on."""
    return training.model_copy(update={"validate_every": None, "early_stopping": None})
