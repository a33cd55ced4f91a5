"""Whether a model is as often right as it says: calibration error, Brier score, the bins of a reliability diagram."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15  # as Guo et al. have them
CALIBRATION_ERRORS = ("ece", "ece_equal_mass")


@dataclass(frozen=True, slots=True)
class Bin:
    """Items whose confidence is about the same: how many, their mean confidence, and the share that is right."""

    items: int
    confidence: float
    accuracy: float


def softmax(log_likelihoods: Sequence[float]) -> list[float]:
    """exp(lₖ) / Σⱼ exp(lⱼ) of K choices' log-likelihoods: how sure the model is of each, given that one is right."""
    scores = np.asarray(log_likelihoods, dtype=np.float64)
    weights = np.exp(scores - scores.max())
    return [float(p) for p in weights / weights.sum()]


def brier_score(probabilities: Sequence[float], right: int) -> float:
    """Σₖ (pₖ − [k is right])² of one item with K choices, in [0, 2] (Brier 1950); lower is better."""
    return sum((p - (k == right)) ** 2 for k, p in enumerate(probabilities))


def calibration_error(confidences: Sequence[float], right: Sequence[float], *, equal_mass: bool = False) -> float:
    """Expected calibration error Σₘ |Bₘ|/n · |acc(Bₘ) − conf(Bₘ)| in [0, 1] (Guo et al., arXiv:1706.04599, eq. 3).

    Args:
        confidences: of the preferred choice, for each of n items, in [0, 1].
        right: 1 or 0 for each.
        equal_mass: bins that hold equally many items, instead of equally wide ones.
    """
    bins = reliability(confidences, right, equal_mass=equal_mass)
    return sum(b.items * abs(b.accuracy - b.confidence) for b in bins) / len(confidences)


def reliability(confidences: Sequence[float], right: Sequence[float], *, equal_mass: bool = False) -> list[Bin]:
    """The bins that are not empty, by rising confidence. Equally wide ones are ((m − 1)/M, m/M] for m = 1…M, M = 15."""
    confidence, outcome = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if equal_mass:
        groups: list[NDArray[np.intp]] = np.array_split(np.argsort(confidence, kind="stable"), BINS)
    else:
        number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        groups = [np.flatnonzero(number == m) for m in range(BINS)]
    return [Bin(len(g), float(confidence[g].mean()), float(outcome[g].mean())) for g in groups if len(g)]
