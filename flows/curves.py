"""Learning curves as a study reports them: points with intervals, the budget that suffices, the area."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ConfigDict

from flows.derived import better
from training.evaluation.learning_curve import Point, Score, area, crossing, mean_of_seeds, mean_of_tasks, share
from training.evaluation.suite import pass_at
from training.migration.gate import LOWER_IS_BETTER


class Measurement(BaseModel):
    """One task's score of one training. `examples` of that task were trained on, `samples` items were asked."""

    model_config = ConfigDict(frozen=True)

    base: str
    arm: str
    task: str
    budget: str
    examples: int
    seed: int
    metric: str
    value: float
    low: float
    high: float
    samples: int


class CurvePoint(BaseModel):
    """The mean over seeds at a budget, with its 95 % interval over seeds and items, and each seed's own score."""

    model_config = ConfigDict(frozen=True)

    budget: str
    examples: float
    value: float
    low: float
    high: float
    seeds: list[float]


class Curve(BaseModel):
    """How the score of a task (or the mean of all tasks) grows, from one base model, with one kind of adapter.

    Attributes:
        arm: `one each` or `joint`: an adapter for each task, or one for all of them.
        bare: what the base model scores without any.
        points: by number of examples.
        reference: what is to be reached.
        verdict: `enough`: a budget surely reaches it. `short`: none does. No budget is judged where the bare base
            reaches it already (`bare`), or where the largest budget is no better than the bare base (`nothing learnt`).
        enough: the smallest budget whose lower bound reaches it; None with any other verdict.
        area: under the curve in log(examples), as a mean score.
    """

    model_config = ConfigDict(frozen=True)

    base: str
    arm: str
    task: str
    metric: str
    samples: int
    bare: float
    points: list[CurvePoint]
    reference: float
    verdict: Literal["enough", "short", "bare", "nothing learnt"]
    enough: CurvePoint | None
    area: float


class LearningCurves(BaseModel):
    """What a study found.

    Attributes:
        reference: what the curves' references are.
        notes: tasks that are smaller than a budget.
        trained: trainings of this run; the others were there from an earlier one.
        folder: with curve.png, curve.csv and what is measured so far.
    """

    model_config = ConfigDict(frozen=True)

    curves: list[Curve]
    reference: str
    notes: list[str]
    trainings: int
    trained: int
    folder: Path
    seconds: float


def mean_of(tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What there are curves of: each task, and the mean of them where they are several."""
    each: dict[str, tuple[str, ...]] = {task: (task,) for task in tasks}
    return each if len(tasks) == 1 else {**each, f"mean of {len(tasks)} tasks": tuple(tasks)}


def draw_curves(
    measurements: Sequence[Measurement],
    bare: Mapping[tuple[str, str], float],
    references: Mapping[str, float] | None,
    allowed_loss: float,
) -> list[Curve]:
    """The curves of all bases, arms and tasks.

    Args:
        measurements: of every training; every base and arm has the same tasks, budgets and seeds.
        bare: value of each base model on each task.
        references: what is to be reached, by task. None given: the value of the first base's adapters of their own on
            the largest budget, less the allowed loss, but of shares no less than 0.
        allowed_loss: points; of perplexity the share that it may grow by.
    """
    metric = measurements[0].metric
    found = dict(references or {})
    curves = []
    for base, arm in dict.fromkeys((m.base, m.arm) for m in measurements):
        own = [m for m in measurements if (m.base, m.arm) == (base, arm)]
        of_task = {m.task: m for m in own}
        for title, tasks in mean_of(list(of_task)).items():
            points, seeds = _points(own, tasks)
            full = points[-1].score.value
            wanted = full - allowed_loss * abs(full) if metric in LOWER_IS_BETTER else max(0.0, full - allowed_loss)
            reference = found.setdefault(title, better(metric, wanted))
            unadapted = fmean(bare[base, task] for task in tasks)
            enough = None
            if full <= better(metric, unadapted):
                verdict = "nothing learnt"
            elif better(metric, unadapted) >= better(metric, reference):
                verdict = "bare"
            else:
                enough = crossing(points, better(metric, reference))
                verdict = "enough" if enough else "short"
            shown = [_shown(metric, point, seeds[point.label]) for point in points]
            curves.append(
                Curve(
                    base=base,
                    arm=arm,
                    task=title,
                    metric=metric,
                    samples=sum(of_task[task].samples for task in tasks),
                    bare=unadapted,
                    points=shown,
                    reference=reference,
                    verdict=verdict,
                    enough=next((each for each in shown if enough and each.budget == enough.label), None),
                    area=better(metric, area(points)),
                )
            )
    return curves


def _points(own: Sequence[Measurement], tasks: Sequence[str]) -> tuple[list[Point], dict[str, list[float]]]:
    """The points of the tasks' mean, by number of examples, and each seed's value at each budget."""
    by_place = {(m.budget, m.seed, m.task): m for m in own}
    seeds = sorted({m.seed for m in own})
    points, values = [], {}
    for budget in dict.fromkeys(m.budget for m in own):
        scores = [mean_of_tasks([_score(by_place[budget, seed, task]) for task in tasks]) for seed in seeds]
        examples = fmean(by_place[budget, seeds[0], task].examples for task in tasks)
        score = mean_of_seeds(scores)
        points.append(Point(budget, examples, score if own[0].metric in LOWER_IS_BETTER else score.clipped(0.0, 1.0)))
        values[budget] = [better(own[0].metric, score.value) for score in scores]
    return sorted(points, key=lambda point: point.examples), values


def _score(m: Measurement) -> Score:
    if m.metric in ("exact_match", "multiple_choice") or pass_at([m.metric]):
        return share(m.value, m.samples)
    low, high = sorted((better(m.metric, m.low), better(m.metric, m.high)))
    return Score(better(m.metric, m.value), low, high)


def _shown(metric: str, point: Point, seeds: Sequence[float]) -> CurvePoint:
    low, high = sorted((better(metric, point.score.low), better(metric, point.score.high)))
    value = better(metric, point.score.value)
    return CurvePoint(budget=point.label, examples=point.examples, value=value, low=low, high=high, seeds=list(seeds))
