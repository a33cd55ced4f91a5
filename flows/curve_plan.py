"""What a learning-curve study trains and measures: tasks, nested budgets, one adapter for each task or for all."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flows.suites import Prepared, default_suites
from infra.errors import InvalidInput, NotFound
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.records import BaseModelRecord, VersionRecord
from training.data.example import Example, fingerprint
from training.evaluation.learning_curve import Budget, nested, read_budgets
from training.evaluation.suite import Suite
from training.migration.gate import LOWER_IS_BETTER
from training.recipe import Recipe
from training.trainer import total_steps

EACH, JOINT = "one each", "joint"
_EXAMPLES = {"method": "lora", "training": "{steps: 100}", "base": "smollm2-135m-instruct"}


@dataclass(frozen=True)
class CurvePlan:
    """What is known before a model is loaded.

    Attributes:
        bases: to start from, each in turn; None for the recipes' own.
        steps: of every training, for each of its tasks; None for those that the recipe takes on all of its data.
        epochs: of every training, in place of a number of steps.
        reference: the number to reach, or the version to match; None for the score on all data.
        allowed_loss: how much less than the score on all data is enough.
        workdir: of this study.
    """

    recipes: tuple[Recipe, ...]
    budgets: tuple[Budget, ...]
    seeds: int
    joint: bool
    bases: tuple[str | None, ...]
    steps: int | None
    epochs: float | None
    reference: float | VersionRecord | None
    allowed_loss: float
    workdir: Path


@dataclass(frozen=True)
class StudiedTask:
    """A recipe on one base model, its data selected and its suite drawn: the same for every budget and seed."""

    recipe: Recipe
    base: BaseModelRecord
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    suite: Prepared

    @property
    def title(self) -> str:
        """What it is called: the recipe's adapter."""
        return self.recipe.adapter

    @property
    def in_prompt(self) -> "StudiedTask":
        """The same task with its instruction in every prompt, so that one adapter can tell several apart."""
        said = self.recipe.data.instruction_text
        data = self.recipe.data.model_copy(update={"instruction": ""})
        return replace(
            self,
            recipe=self.recipe.model_copy(update={"data": data}),
            train=_prefixed(self.train, said),
            validation=_prefixed(self.validation, said),
            suite=replace(self.suite, examples=_prefixed(self.suite.examples, said), instruction=""),
        )


@dataclass(frozen=True)
class Training:
    """One adapter of the study: trained on one budget of its tasks under one seed, judged on each of them.

    Attributes:
        recipe: the first task's, with the seed and the length of this training.
        examples: of all its tasks, one after the other.
        sizes: how many are each task's.
    """

    tasks: tuple[StudiedTask, ...]
    budget: str
    seed: int
    recipe: Recipe
    examples: tuple[Example, ...]
    sizes: tuple[int, ...]

    @property
    def arm(self) -> str:
        """Whether it is one adapter for all tasks."""
        return JOINT if len(self.tasks) > 1 else EACH

    @property
    def base(self) -> BaseModelRecord:
        """The base model that it starts from."""
        return self.tasks[0].base

    @property
    def validation(self) -> tuple[Example, ...]:
        """Of all its tasks."""
        return tuple(example for task in self.tasks for example in task.validation)

    @property
    def told(self) -> str:
        """Which one it is, for people."""
        names = " + ".join(task.title for task in self.tasks)
        return f"{names} on {self.base.name}, {len(self.examples):,} examples, seed {self.recipe.seed}"

    @property
    def key(self) -> str:
        """Names all that decides what it measures."""
        judged = [f"{fingerprint(t.suite.examples)} {t.suite.metric} {t.suite.max_new_tokens}" for t in self.tasks]
        trained = [self.base.identity_sha256, fingerprint(self.examples), fingerprint(self.validation)]
        return hashlib.sha256(json.dumps([self.recipe.digest, *trained, *judged]).encode()).hexdigest()[:16]


def plan_curves(
    recipes: Sequence[Recipe],
    budgets: str,
    seeds: int,
    joint: bool,
    bases: Sequence[str],
    steps: int | None,
    epochs: float | None,
    reference: str | None,
    allowed_loss: float,
) -> CurvePlan:
    """All that can be refused before a model is loaded. See `flows.learning_curve.learning_curve`."""
    names = [recipe.adapter for recipe in recipes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidInput(f"Two of the recipes are called {twice}.", "Give each its own adapter: NAME.")
    if steps is not None and epochs is not None:
        raise InvalidInput("A training has a number of steps or of epochs, not both.", "Leave out --steps or --epochs.")
    if seeds < 1:
        raise InvalidInput(f"A curve of {seeds} seeds has no points.", "Ask for one seed or more.")
    for recipe in recipes:
        if recipe.migrated_from is not None or recipe.made_of is not None:
            raise InvalidInput(f"The recipe of {recipe.adapter} tells of no training on data.", "Take its first one.")
        own_suite(recipe)
    if joint:
        _require_alike(recipes, bases)
    digest = hashlib.sha256(" ".join(sorted(recipe.digest for recipe in recipes)).encode()).hexdigest()[:12]
    return CurvePlan(
        recipes=tuple(recipes),
        budgets=read_budgets(budgets),
        seeds=seeds,
        joint=joint,
        bases=tuple(dict.fromkeys(bases)) or (None,),
        steps=steps,
        epochs=epochs,
        reference=None if reference is None else _reference(reference),
        allowed_loss=allowed_loss,
        workdir=get_settings().runs / f"curve-{recipes[0].adapter}-{digest}",
    )


def own_suite(recipe: Recipe) -> Suite:
    """What a curve's score is: the recipe's first suite on its own data, without solved examples in front.

    Raises:
        InvalidInput: it has none. Solved examples come from the training data, beyond the budget.
    """
    for suite in default_suites(recipe):
        if not suite.shots and suite.task in (None, recipe.data.task):
            return suite
    raise InvalidInput(
        f"{recipe.adapter} has no suite on its own data without shots, so there is no score to draw.",
        "Add one: evaluation: [{samples: 200}]",
    )


def require_possible(reference: float, metric: str) -> None:
    """Raise `InvalidInput` if no score of the metric can be that."""
    if metric in LOWER_IS_BETTER and reference < 1:
        raise InvalidInput(f"--reference {reference:g}: no perplexity is below 1.", "Name one that can be reached.")
    if metric not in LOWER_IS_BETTER and not 0 <= reference <= 1:
        remedy = f"For {reference:g} % write --reference {reference / 100:g}." if 1 < reference <= 100 else ""
        raise InvalidInput(f"--reference {reference:g}: scores of {metric} are shares, 0 to 1.", remedy)


def trainings(plan: CurvePlan, tasks: Sequence[StudiedTask]) -> Iterator[Training]:
    """All of one base model, so that the first seed's curve is whole first."""
    arms = [(task,) for task in tasks] + ([tuple(tasks)] if plan.joint else [])
    for seed in range(plan.seeds):
        for arm in arms:
            own = [nested(task.train, plan.budgets, task.recipe.seed + seed) for task in arm]
            for budget in plan.budgets:
                chosen = [examples[budget.label] for examples in own]
                yield Training(
                    tasks=arm,
                    budget=budget.label,
                    seed=seed,
                    recipe=_recipe(plan, arm, seed),
                    examples=tuple(example for examples in chosen for example in examples),
                    sizes=tuple(map(len, chosen)),
                )


def _recipe(plan: CurvePlan, arm: Sequence[StudiedTask], seed: int) -> Recipe:
    """Of a training: as many steps whatever the budget, unless epochs are asked for; a joint one takes the sum."""
    first = arm[0].recipe
    if plan.epochs is not None:
        length: dict[str, float | None] = {"epochs": plan.epochs, "steps": None}
    else:
        steps = sum(plan.steps or total_steps(task.recipe.training, len(task.train)) for task in arm)
        length = {"epochs": None, "steps": steps}
    changes = {
        "adapter": "+".join(task.title for task in arm),
        "evaluation": (),
        "training": first.training.model_copy(update=length),
        "seed": (first.seed + seed) % 2**32,
    }
    return first.model_copy(update=changes)


def _require_alike(recipes: Sequence[Recipe], bases: Sequence[str]) -> None:
    first, *others = recipes
    if not others:
        raise InvalidInput("--joint trains one adapter for many tasks, and there is one recipe.", "Name more recipes.")
    for other in others:
        for part in ("method", "training", *(() if bases else ("base",))):
            if getattr(first, part) != getattr(other, part):
                raise InvalidInput(
                    f"{first.adapter} and {other.adapter} cannot share an adapter: their {part} differs.",
                    f"Set it for all of them, e.g. --set '{part}={_EXAMPLES[part]}'",
                )


def _reference(text: str) -> float | VersionRecord:
    try:
        number = float(text)
    except ValueError:
        pass
    else:
        if not math.isfinite(number):
            raise InvalidInput(f"--reference {text}: that is no score.", "A number, or NAME@VERSION.")
        return number
    try:
        return AdapterRegistry().get(text)
    except (InvalidInput, NotFound) as error:
        raise type(error)(f"--reference {text}: {error.what}", error.remedy or "A number, or NAME@VERSION.") from None


def _prefixed(examples: Sequence[Example], instruction: str) -> tuple[Example, ...]:
    if not instruction:
        return tuple(examples)
    return tuple(replace(example, prompt=f"{instruction}\n\n{example.prompt}") for example in examples)
