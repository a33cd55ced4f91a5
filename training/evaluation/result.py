"""What an evaluation found, and how two of them compare item by item."""

import math
from collections.abc import Sequence
from dataclasses import asdict

from pydantic import BaseModel, ConfigDict

from infra.errors import InvalidInput
from training.evaluation.statistics import paired_test, sign_flip_test, wilson_interval


class EvaluationResult(BaseModel):
    """One metric of one model on one data set. Goes through JSON unchanged.

    Attributes:
        metric: what was measured.
        value: accuracy in [0, 1], perplexity, or what a task of lm-eval defines.
        low: lower end of the 95 % interval: Wilson for accuracy, bootstrap over examples for perplexity. None where
            lm-eval gives no error.
        high: its upper end.
        stderr: standard error of the value.
        samples: number of examples.
        outcomes: 1 or 0 for each example, in order; None where examples are not right or wrong.
        answers: what the model said (or which choice it preferred) for each example; empty for perplexity.
        losses: for perplexity, negative log-likelihood of each completion, in nats; else empty.
        tokens: for perplexity, the tokens of each completion; else empty.
        seconds: how long it took.
        dataset_fingerprint: `training.data.example.fingerprint` of the examples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    value: float
    low: float | None
    high: float | None
    stderr: float | None
    samples: int
    outcomes: tuple[int, ...] | None = None
    answers: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    seconds: float
    dataset_fingerprint: str

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
        difference: value of a − value of b.
        low: lower end of the difference's 95 % interval; None for perplexity.
        high: its upper end.
        p_value: two-sided; exact McNemar for accuracy, paired sign-flip permutation of the losses for perplexity.
        only_a: examples that a alone gets right; for perplexity, those that a predicts better.
        only_b: the same for b.
        samples: number of examples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
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
        InvalidInput: other examples, another metric, or perplexities that are counted in different tokens.
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
    if a.outcomes is None or b.outcomes is None:
        raise InvalidInput(
            f"{a.metric} has no right and wrong, example by example.", "Compare the numbers as they are."
        )
    found = paired_test(a.outcomes, b.outcomes)
    return PairedComparison(metric=a.metric, samples=a.samples, **asdict(found))


def _compare_perplexities(a: EvaluationResult, b: EvaluationResult) -> PairedComparison:
    if a.tokens != b.tokens:
        raise InvalidInput(
            "The two perplexities are counted in different tokens, so they cannot be compared.",
            "Between bases with different tokenizers compare exact_match or multiple_choice.",
        )
    gaps = [x - y for x, y in zip(a.losses, b.losses, strict=True)]
    return PairedComparison(
        metric=a.metric,
        difference=a.value - b.value,
        low=None,
        high=None,
        p_value=sign_flip_test(gaps, seed=0),
        only_a=sum(gap < 0 for gap in gaps),
        only_b=sum(gap > 0 for gap in gaps),
        samples=a.samples,
    )


def accuracy(
    metric: str, outcomes: Sequence[int], answers: Sequence[str], *, seconds: float, dataset_fingerprint: str
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
