"""How many examples does an adapter need? Trained on nested budgets of its data under several seeds, and judged.

Nothing is registered: a study trains dozens of adapters, of which only the numbers are kept.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.attached import lent
from flows.base_models import find_base
from flows.curve_plan import CurvePlan, StudiedTask, Training, own_suite, plan_curves, require_possible, trainings
from flows.curve_report import report_curves
from flows.curves import LearningCurves, Measurement, draw_curves, mean_of
from flows.derived import measured
from flows.evaluate_adapter import run_suite
from flows.gpu import gpu_slot
from flows.progress import Stage
from flows.run_states import cancel_if_interrupted
from flows.select_data import select_data
from flows.suites import prepare
from infra.errors import InvalidInput
from infra.files import write_whole
from registry.records import VersionRecord
from training.checkpoints import exclusive
from training.data.example import fingerprint
from training.device import best_device
from training.evaluation.evaluate import EvaluationResult, check_metric
from training.evaluation.statistics import FEWEST
from training.migration.gate import LOWER_IS_BETTER
from training.objectives.of_model import is_masked_lm
from training.progress import TrainingEvent
from training.recipe import Recipe
from training.shared_bases import shared_bases
from training.trainer import train_recipe

BUDGETS = "10,1%,100,200,1000,all"


@flow(name="learning-curve", flow_run_name="learning curve of {recipes[0].adapter}", on_failure=[cancel_if_interrupted])
def learning_curve(
    recipes: tuple[Recipe, ...],
    budgets: str = BUDGETS,
    seeds: int = 3,
    joint: bool = False,
    bases: tuple[str, ...] = (),
    steps: int | None = None,
    epochs: float | None = None,
    reference: str | None = None,
    allowed_loss: float = 0.05,
) -> LearningCurves:
    """Train on nested budgets of each recipe's data and measure each adapter on the recipe's first suite.

    What was trained and measured already is not done again, also when budgets, seeds, bases or a reference are added.

    Args:
        recipes: one for each task; a smaller budget's examples are part of a larger one's, validation and test fixed.
        budgets: numbers, shares and `all`, of what each recipe selects to train on.
        seeds: trainings on each budget; each draws its examples and its initialisation anew.
        joint: also train one adapter for all tasks, on the same budget of each. Instructions then go into the prompts,
            in both arms.
        bases: to start from, in place of the recipes' own.
        steps: of every training, for each of its tasks. Default: those that the recipe takes on all of its data.
        epochs: passes over the budget, in place of a fixed number of steps. Small budgets then get few steps.
        reference: a number, or a version whose score is to be reached. Default: the score on the largest budget, less
            `allowed_loss`, and no less than 0.
        allowed_loss: points, or of perplexity a share.

    Raises:
        InvalidInput: budgets, recipes or a reference that cannot be used.
        Interrupted: Ctrl-C or SIGTERM; the same study goes on where it was.
    """
    began = time.monotonic()
    plan = plan_curves(recipes, budgets, seeds, joint, bases, steps, epochs, reference, allowed_loss)
    with exclusive(plan.workdir), shared_bases():
        of_base = [_tasks(plan, base) for base in plan.bases]
        if isinstance(plan.reference, float):
            require_possible(plan.reference, of_base[0][0].suite.metric)
        kept = _Kept(plan.workdir)
        done = [_measurements(plan, tasks, kept) for tasks in of_base]
        bare = {pair: value for tasks in of_base for pair, value in _bare(tasks, kept).items()}
        references, told = _references(plan, of_base[0])
        measurements = [each for found in done for each in found]
        curves = draw_curves(measurements, bare, references, plan.allowed_loss)
        tags = {"regraft.study": "learning curve", "regraft.flow_run": flow_run.id or ""}
        report_curves(recipes[0].adapter, curves, measurements, plan.workdir, tags)
    return LearningCurves(
        curves=curves,
        reference=told,
        notes=_notes(plan, of_base[0]),
        trainings=kept.asked,
        trained=kept.trained,
        folder=plan.workdir,
        seconds=time.monotonic() - began,
    )


def _tasks(plan: CurvePlan, base: str | None) -> list[StudiedTask]:
    """Every recipe's data and suite on a base model."""
    tasks = []
    for recipe in plan.recipes:
        on_base = recipe.model_copy(update={"base": base or recipe.base})
        record, _ = find_base(on_base.base)
        on_base = on_base.model_copy(update={"base": record.reference})  # the same study, whatever the base is called
        data = select_data(on_base)
        with lent(record, recipe.method.name, recipe.training.precision) as loaded:
            suite = prepare(own_suite(recipe), on_base, is_masked_lm(loaded.model))
            check_metric(loaded.model, suite.metric, 0)
        if suite.metric in LOWER_IS_BETTER and len(suite.examples) < FEWEST:
            raise InvalidInput(
                f"{recipe.adapter}: the perplexity of {len(suite.examples)} items has no interval to judge by.",
                f"Ask at least {FEWEST} items of its suite (samples), better 200.",
            )
        tasks.append(StudiedTask(on_base, record, data.train, data.validation, suite))
    metrics = {task.suite.metric for task in tasks}
    if len(metrics) > 1 and metrics & {*LOWER_IS_BETTER}:
        raise InvalidInput(
            f"The recipes are judged by {' and '.join(sorted(metrics))}, which have no mean.",
            "Give them suites of one kind of metric, or study them one by one.",
        )
    return [task.in_prompt for task in tasks] if plan.joint else tasks


class _Kept:
    """What is measured so far, by what decides it; in a file, so that a study that was stopped goes on."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.asked = self.trained = 0
        self._path = workdir / "measured.json"
        self._known: dict[str, list[EvaluationResult]] = {}
        if self._path.is_file():
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = {key: [EvaluationResult.model_validate(each) for each in of] for key, of in stored.items()}

    def of(self, key: str, measure: Callable[[], list[EvaluationResult]]) -> list[EvaluationResult]:
        """What is known under the key, else what `measure` finds."""
        if key not in self._known:
            brief = {"outcomes": None, "answers": (), "losses": (), "tokens": ()}
            self._known[key] = [found.model_copy(update=brief) for found in measure()]
            stored = {name: [each.model_dump(mode="json") for each in of] for name, of in self._known.items()}
            write_whole(self._path, json.dumps(stored))
        return self._known[key]

    def of_training(self, training: Training, tell: Callable[[str], None]) -> list[EvaluationResult]:
        """What an adapter measures on each of its tasks; trained where that is not known."""
        key, self.asked = training.key, self.asked + 1
        workdir = self.workdir / key

        def measure() -> list[EvaluationResult]:
            self.trained += 1
            return _train_and_measure(training, workdir, tell)

        found = self.of(key, measure)
        shutil.rmtree(workdir, ignore_errors=True)  # its checkpoints have done their duty
        return found


def _measurements(plan: CurvePlan, tasks: Sequence[StudiedTask], kept: _Kept) -> list[Measurement]:
    everything = list(trainings(plan, tasks))
    stage = Stage(f"learning curve on {tasks[0].base.name}: trainings")
    measurements = []
    for done, training in enumerate(everything):
        stage(done, len(everything), training.told)
        results = kept.of_training(training, partial(stage, done, len(everything)))
        for judged, size, found in zip(training.tasks, training.sizes, results, strict=True):
            measurements.append(
                Measurement(
                    base=training.base.name,
                    arm=training.arm,
                    task=judged.title,
                    budget=training.budget,
                    examples=size,
                    seed=training.seed,
                    metric=found.metric,
                    value=found.value,
                    low=0.0 if found.low is None else found.low,  # a share of which the items say nothing more
                    high=1.0 if found.high is None else found.high,
                    samples=found.samples,
                )
            )
    stage(len(everything), len(everything))
    return measurements


@task(task_run_name="train {training.told}", cache_policy=NO_CACHE)
def _train_and_measure(training: Training, workdir: Path, tell: Callable[[str], None]) -> list[EvaluationResult]:
    recipe = training.recipe

    def on_event(event: TrainingEvent) -> None:
        tell(f"{training.told}: step {event.step} of {event.total_steps}, loss {event.loss:.3f}")

    with lent(training.base, recipe.method.name, recipe.training.precision) as base:
        with gpu_slot(best_device()):
            adapted, _ = train_recipe(
                recipe, base, training.examples, training.validation, workdir=workdir, on_event=on_event
            )
        adapted.model.eval()
        return [
            run_suite(f"{training.told}: {judged.suite.title}", adapted.model, base.tokenizer, judged.suite)
            for judged in training.tasks
        ]


def _bare(tasks: Sequence[StudiedTask], kept: _Kept) -> dict[tuple[str, str], float]:
    """What the base model scores on each task."""

    def measure(studied: StudiedTask) -> list[EvaluationResult]:
        with lent(studied.base, studied.recipe.method.name, studied.recipe.training.precision) as base:
            return [run_suite(f"bare {studied.base.name}", base.model, base.tokenizer, studied.suite)]

    values = {}
    for studied in tasks:
        suite = studied.suite
        asked = f"{fingerprint(suite.examples)} {suite.metric} {suite.max_new_tokens} {suite.instruction}"
        (found,) = kept.of(f"{studied.base.identity_sha256} {asked}", partial(measure, studied))
        values[studied.base.name, studied.title] = found.value
    return values


def _references(plan: CurvePlan, tasks: Sequence[StudiedTask]) -> tuple[dict[str, float] | None, str]:
    """What is to be reached on each task and in the mean, and what that is, in words."""
    titles = [studied.title for studied in tasks]
    if plan.reference is None:
        less = "" if not plan.allowed_loss else f" less {plan.allowed_loss:g}"
        return None, f"the score of the largest budget on {tasks[0].base.name}{less}"
    if isinstance(plan.reference, VersionRecord):
        version = plan.reference
        suites = [
            prepare(own_suite(recipe), recipe, tasks[0].suite.metric in LOWER_IS_BETTER) for recipe in plan.recipes
        ]
        own = {title: found.child.value for title, found in zip(titles, measured(version, (), suites), strict=True)}
        return {name: fmean(own[each] for each in of) for name, of in mean_of(titles).items()}, version.address
    return dict.fromkeys(mean_of(titles), plan.reference), f"{plan.reference:g}"


def _notes(plan: CurvePlan, tasks: Sequence[StudiedTask]) -> list[str]:
    """Which tasks have fewer examples than a budget asks for, and so contribute all they have."""
    notes = []
    for studied in tasks:
        larger = [b.label for b in plan.budgets if b.examples is not None and b.examples > len(studied.train)]
        if larger:
            notes.append(
                f"{studied.title} has {len(studied.train):,} examples: all of them count as {', '.join(larger)}"
            )
    return notes
