"""What an evaluation found, in all and in parts, and how two of them compare item by item."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from pydantic import BaseModel, ConfigDict

from infra.errors import InvalidInput
from infra.sign_flips import sign_flip_test
from training.evaluation.aggregate import statistic_of
from training.evaluation.calibration import CALIBRATION_ERRORS
from training.evaluation.statistics import (
    FEWEST,
    bootstrap,
    bootstrap_perplexity,
    interval_of,
    mean_interval,
    paired_means,
    paired_swaps,
    paired_test,
    perplexity,
    wilson_interval,
)

MOST = {"brier": 2.0}  # that an item can score; of all others 1


class EvaluationResult(BaseModel):
    """One metric of one model on one data set. Goes through JSON unchanged.

    Attributes:
        metric: what was measured.
        value: accuracy or another share in [0, 1], perplexity, or what a task of lm-eval defines.
        low: lower end of the 95 % interval: Wilson for accuracy, `statistics.mean_interval` for means of scores, else
            bootstrap over examples. None where lm-eval gives no error, where resamples say nothing (of fewer than six
            examples, or where they all agree), and for calibration errors, whose resamples are biased upwards.
        high: its upper end.
        stderr: standard error of the value; None of the mean of one score.
        samples: number of examples.
        outcomes: 1 or 0 for each example, in order; None where examples are not right or wrong.
        scores: a number for each example: its share of a text metric, its Brier score; else empty.
        components: what the value is computed from where it is no mean of scores, as `aggregate.statistic_of` wants
            it: of bleu, chrf and calibration errors; else empty.
        answers: what the model said (or which choice it preferred) for each example; empty for perplexity.
        losses: for perplexity, negative log-likelihood of each completion, in nats; else empty.
        tokens: for perplexity, the tokens of each completion; else empty.
        seconds: how long it took.
        dataset_fingerprint: `training.data.example.fingerprint` of the examples.
        beside: other metrics of the same answers: calibration of multiple choice, and what a suite wants `also`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    value: float
    low: float | None
    high: float | None
    stderr: float | None
    samples: int
    outcomes: tuple[int, ...] | None = None
    scores: tuple[float, ...] = ()
    components: tuple[tuple[float, ...], ...] = ()
    answers: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    seconds: float
    dataset_fingerprint: str
    beside: tuple["EvaluationResult", ...] = ()

    def __repr__(self) -> str:
        return f"EvaluationResult({self})"

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            shown = f"{self.value:.3f}"
        elif self.outcomes is None:
            shown = f"{self.value:.3f} [{self.low:.3f}–{self.high:.3f}]"
        else:
            shown = f"{100 * self.value:.1f} % [{100 * self.low:.1f}–{100 * self.high:.1f}]"
        return f"{self.metric} {shown}, {self.samples} samples, {self.seconds:.1f} s"


class PairedComparison(BaseModel):
    """How a differs from b on the same examples.

    Attributes:
        metric: what was measured.
        test: which test the p-value is of.
        difference: value of a − value of b.
        low: lower end of the difference's 95 % interval; None for perplexity, and where the items say nothing of it.
        high: its upper end.
        p_value: two-sided; exact McNemar for accuracy, sign flips of the paired scores, or of the losses for
            perplexity; for values over all examples (bleu, chrf, calibration) approximate randomization.
        only_a: examples that a alone gets right; else those on which a has the better score or loss.
        only_b: the same for b.
        samples: number of examples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    test: str
    difference: float
    low: float | None
    high: float | None
    p_value: float
    only_a: int
    only_b: int
    samples: int


def compare(a: EvaluationResult, b: EvaluationResult) -> PairedComparison:
    """Paired comparison of two results on the same examples.

    Raises:
        InvalidInput: other examples, another metric, perplexities that are counted in different tokens, or a result
            that holds nothing item by item.
    """
    if a.metric != b.metric:
        raise InvalidInput(f"{a.metric} and {b.metric} cannot be compared.", "Measure both with one metric.")
    if a.dataset_fingerprint != b.dataset_fingerprint:
        raise InvalidInput(
            f"The two results are on different examples ({a.dataset_fingerprint[:8]} and {b.dataset_fingerprint[:8]}).",
            "Evaluate both on one suite: same data, split, samples and seed.",
        )
    if a.metric == "perplexity":
        return _compare_perplexities(a, b)
    if a.outcomes is not None and b.outcomes is not None:
        found = paired_test(a.outcomes, b.outcomes)
        return PairedComparison(metric=a.metric, test="exact McNemar", samples=a.samples, **asdict(found))
    if not all(each.scores or each.components for each in (a, b)):
        raise InvalidInput(f"{a.metric} holds nothing example by example.", "Compare the numbers as they are.")
    gaps = [x - y for x, y in zip(a.scores, b.scores, strict=True)]
    if a.components:
        both = statistic_of(a.metric, a.scores + b.scores, a.components + b.components)
        test, paired = "approximate randomization", paired_swaps(both, a.samples)
    else:
        test, paired = "paired sign flips", paired_means(gaps)
    return PairedComparison(
        metric=a.metric,
        test=test,
        samples=a.samples,
        only_a=sum(gap > 0 for gap in gaps),
        only_b=sum(gap < 0 for gap in gaps),
        **asdict(paired),
    )


def _compare_perplexities(a: EvaluationResult, b: EvaluationResult) -> PairedComparison:
    if a.tokens != b.tokens:
        raise InvalidInput(
            "The two perplexities are counted in different tokens, so they cannot be compared.",
            "Between bases with different tokenizers compare exact_match or multiple_choice.",
        )
    gaps = [x - y for x, y in zip(a.losses, b.losses, strict=True)]
    return PairedComparison(
        metric=a.metric,
        test="paired sign flips",
        difference=a.value - b.value,
        low=None,
        high=None,
        p_value=sign_flip_test(gaps),
        only_a=sum(gap < 0 for gap in gaps),
        only_b=sum(gap > 0 for gap in gaps),
        samples=a.samples,
    )


def accuracy(
    metric: str,
    outcomes: Sequence[int],
    answers: Sequence[str],
    *,
    seconds: float,
    dataset_fingerprint: str,
) -> EvaluationResult:
    """The share of right outcomes, with its Wilson interval and standard error √(p(1 − p)/n)."""
    n, right = len(outcomes), sum(outcomes)
    low, high = wilson_interval(right, n)
    return EvaluationResult(
        metric=metric,
        value=right / n,
        low=low,
        high=high,
        stderr=math.sqrt(right * (n - right) / n**3),
        samples=n,
        outcomes=tuple(outcomes),
        answers=tuple(answers),
        seconds=seconds,
        dataset_fingerprint=dataset_fingerprint,
    )


def scored(
    metric: str,
    scores: Sequence[float],
    components: Sequence[Sequence[float]],
    answers: Sequence[str],
    *,
    seconds: float,
    dataset_fingerprint: str,
) -> EvaluationResult:
    """The value over all items of a metric that is no accuracy, with its interval."""
    statistic, n = statistic_of(metric, scores, components), max(len(scores), len(components))
    low, high, stderr = None, None, None
    if not components:
        low, high = mean_interval(scores, most=MOST.get(metric, 1.0))
        stderr = float(np.std(scores, ddof=1)) / math.sqrt(n) if n > 1 else None
    elif metric not in CALIBRATION_ERRORS:
        resampled = bootstrap(statistic, n, seed=0)
        low, high = interval_of(resampled, n)
        stderr = float(resampled.std(ddof=1))
    return EvaluationResult(
        metric=metric,
        value=statistic(np.arange(n)),
        low=low,
        high=high,
        stderr=stderr,
        samples=n,
        scores=tuple(scores),
        components=tuple(map(tuple, components)),
        answers=tuple(answers),
        seconds=seconds,
        dataset_fingerprint=dataset_fingerprint,
    )


def of_losses(
    losses: Sequence[float], tokens: Sequence[int], *, seconds: float, dataset_fingerprint: str
) -> EvaluationResult:
    """The perplexity of texts with these losses (nats) over so many tokens each."""
    resampled, enough = bootstrap_perplexity(losses, tokens, seed=0), len(losses) >= FEWEST
    return EvaluationResult(
        metric="perplexity",
        value=perplexity(sum(losses), sum(tokens)),
        low=resampled.low if enough else None,
        high=resampled.high if enough else None,
        stderr=resampled.stderr,
        samples=len(losses),
        losses=tuple(losses),
        tokens=tuple(tokens),
        seconds=seconds,
        dataset_fingerprint=dataset_fingerprint,
    )


def part(whole: EvaluationResult, places: Sequence[int], dataset_fingerprint: str) -> EvaluationResult:
    """The same measurement of some of its items alone, whose fingerprint is given."""
    seconds = whole.seconds * len(places) / whole.samples
    answers = [whole.answers[place] for place in places] if whole.answers else []
    if whole.outcomes is not None:
        outcomes = [whole.outcomes[place] for place in places]
        result = accuracy(whole.metric, outcomes, answers, seconds=seconds, dataset_fingerprint=dataset_fingerprint)
    elif whole.losses:
        losses, tokens = [whole.losses[place] for place in places], [whole.tokens[place] for place in places]
        result = of_losses(losses, tokens, seconds=seconds, dataset_fingerprint=dataset_fingerprint)
    else:
        scores = [whole.scores[place] for place in places] if whole.scores else []
        components = [whole.components[place] for place in places] if whole.components else []
        result = scored(
            whole.metric, scores, components, answers, seconds=seconds, dataset_fingerprint=dataset_fingerprint
        )
    beside = tuple(part(other, places, dataset_fingerprint) for other in whole.beside)
    return result.model_copy(update={"beside": beside})
