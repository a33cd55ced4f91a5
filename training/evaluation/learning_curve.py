"""Learning curves: how a score grows with the number of training examples, and how many of them suffice.

The protocol of Gupta et al., "Instruction Tuned Models are Quick Learners" (2023, arXiv:2306.05539): nested budgets of
a task's training examples, test and validation fixed. Unlike theirs the examples are drawn at random and under several
seeds, and a budget counts as enough by its lower confidence bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist, fmean, variance

from infra.errors import InvalidInput
from training.data.example import Example
from training.data.sampling import sample
from training.evaluation.statistics import CONFIDENCE, wilson_interval

_HOW = "Budgets are numbers, shares and all, as in 10,1%,100,200,1000,all."


@dataclass(frozen=True, slots=True)
class Budget:
    """How many of a task's examples are trained on: a number, a share of them, or (neither given) all."""

    label: str
    examples: int | None = None
    share: float | None = None

    def of(self, available: int) -> int:
        """Examples of a task that has so many: at least 1 (as the paper's 1 %), at most all."""
        if self.share is not None:
            return min(available, max(1, int(self.share * available)))
        return available if self.examples is None else min(available, self.examples)


def read_budgets(text: str) -> tuple[Budget, ...]:
    """Budgets from `10,1%,100,all`.

    Raises:
        InvalidInput: something else, or a budget twice.
    """
    budgets = tuple(_read_budget(part.strip()) for part in text.split(","))
    twice = next((b.label for place, b in enumerate(budgets) if b.label in {c.label for c in budgets[:place]}), None)
    if twice is not None:
        raise InvalidInput(f"The budget {twice} is there twice.", _HOW)
    return budgets


def _read_budget(label: str) -> Budget:
    number = label.removesuffix("%").strip()
    try:
        if label == "all":
            return Budget(label)
        if label.endswith("%") and 0 < float(number) <= 100:
            return Budget(label, share=float(number) / 100)
        if label.isascii() and label.isdigit() and int(label) >= 1:
            return Budget(label, examples=int(label))
    except ValueError:
        pass
    raise InvalidInput(f"{label!r} is not a budget.", _HOW)


def nested(pool: Sequence[Example], budgets: Sequence[Budget], seed: int) -> dict[str, tuple[Example, ...]]:
    """The examples of each budget, by label: every smaller set is part of every larger one under the same seed."""
    return {budget.label: tuple(sample(pool, budget.of(len(pool)), seed)) for budget in budgets}


@dataclass(frozen=True, slots=True)
class Score:
    """One measurement, more being better; `low` and `high` each bound what its items leave open, with 97.5 %."""

    value: float
    low: float
    high: float

    def clipped(self, least: float, most: float) -> "Score":
        """The same with bounds within [least, most], which no score can leave."""
        return Score(self.value, max(least, self.low), min(most, self.high))


def share(value: float, items: int) -> Score:
    """The score of a share of n items that are right: the wider of Wilson's bounds and those of Clopper and Pearson.

    Of the latter (1934) each side covers the truth with 97.5 % at least, at 2 % and at 98 % as well, where one side of
    Wilson's falls to 95 %: the quantiles of Beta(x, n − x + 1) and Beta(x + 1, n − x), x = value·n. Of items that are
    right in part they hold, too, for no scores vary more than right and wrong.
    """
    from scipy.stats import beta

    right, (low, high), tail = value * items, wilson_interval(value * items, items), (1 - CONFIDENCE) / 2
    if right > 0:
        low = min(low, float(beta.ppf(tail, right, items - right + 1)))
    if right < items:
        high = max(high, float(beta.ppf(1 - tail, right + 1, items - right)))
    return Score(value, low, high)


def mean_of_tasks(scores: Sequence[Score]) -> Score:
    """The unweighted mean over k tasks, each of which has items of its own.

    The bounds lie √Σ(value − low)²/k below and √Σ(high − value)²/k above it (Zou and Donner 2008, MOVER).
    """
    value = fmean(score.value for score in scores)
    below = math.sqrt(sum((score.value - score.low) ** 2 for score in scores)) / len(scores)
    above = math.sqrt(sum((score.high - score.value) ** 2 for score in scores)) / len(scores)
    return scores[0] if len(scores) == 1 else Score(value, value - below, value + above)


def mean_of_seeds(scores: Sequence[Score]) -> Score:
    """The mean over trainings with other seeds, judged on the same items: more seeds are not more items.

    On each side the items leave a variance v open: the mean over seeds of ((value − low)/z)², below, and of
    ((high − value)/z)², above; at 100 % there is none above and all the more below. With s² the variance between k
    seeds V = v + s²/k, and the bound lies t·√V away, where t is Student's 97.5 % quantile with (k − 1)·V²/(s²/k)²
    degrees of freedom (Welch and Satterthwaite, v taken as known). So seeds that agree have the bounds of one, and one
    seed, which says nothing about others, has its own.
    """
    value = fmean(score.value for score in scores)
    between = variance(score.value for score in scores) / len(scores) if len(scores) > 1 else 0.0
    below = _distance([score.value - score.low for score in scores], between)
    above = _distance([score.high - score.value for score in scores], between)
    return Score(value, value - below, value + above)


def _distance(of_items: Sequence[float], between: float) -> float:
    """How far from the mean over seeds a bound lies: the items' distances of each, and s²/k."""
    from scipy.stats import t

    total = fmean(distance**2 for distance in of_items) / _quantile() ** 2 + between
    freedom = (len(of_items) - 1) * (total / between) ** 2 if between > 0 else math.inf
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(total)


@dataclass(frozen=True, slots=True)
class Point:
    """What training on `examples` examples (of each task, in the mean) leads to."""

    label: str
    examples: float
    score: Score


def crossing(points: Sequence[Point], reference: float) -> Point | None:
    """The smallest budget whose lower confidence bound is at least the reference; None where there is none.

    Each budget has its own 97.5 % of confidence: of k budgets that all fall short, one is taken in up to 2.5·k % of
    studies.
    """
    enough = (point for point in points if point.score.low >= reference)
    return min(enough, key=lambda point: point.examples, default=None)


def area(points: Sequence[Point]) -> float:
    """Area under the curve in log(examples), by trapezoids, as a mean score: 1/log(b_k/b_1) ∫ score d log(b)."""
    by_size = sorted({point.examples: point.score.value for point in points}.items())
    if len(by_size) == 1:
        return by_size[0][1]
    steps = pairwise(by_size)
    whole = sum((right[1] + left[1]) / 2 * math.log(right[0] / left[0]) for left, right in steps)
    return whole / math.log(by_size[-1][0] / by_size[0][0])


def _quantile() -> float:
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
