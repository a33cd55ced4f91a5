"""How sure a measurement is, and whether two of them differ. Closed forms, and resampling with explicit seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95  # of every interval
RESAMPLES = 2000


def wilson_interval(right: int, samples: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927): sound at 0 % and 100 %, where ± stderr says ± 0.

    With p = right / n and z the normal quantile: (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n).

    Args:
        right: successes, 0 ≤ right ≤ samples.
        samples: trials, at least 1.
    """
    z, p, n = _quantile(), right / samples, samples
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    return (0.0 if right == 0 else low), (1.0 if right == samples else high)  # exact where rounding would not be


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of the exact McNemar test: are the two disagreements equally likely?

    Args:
        only_a: items that a alone gets right.
        only_b: items that b alone gets right.
    """
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def paired_difference_interval(only_a: int, only_b: int, samples: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired proportions, a − b.

    The adjusted Wald interval of Bonett and Price (2012): p̃₁ = (only_a + 1)/(n + 2), p̃₂ = (only_b + 1)/(n + 2),
    p̃₁ − p̃₂ ± z √((p̃₁ + p̃₂ − (p̃₁ − p̃₂)²)/(n + 2)).
    """
    p1, p2 = (only_a + 1) / (samples + 2), (only_b + 1) / (samples + 2)
    half = _quantile() * math.sqrt((p1 + p2 - (p1 - p2) ** 2) / (samples + 2))
    return max(-1.0, p1 - p2 - half), min(1.0, p1 - p2 + half)


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two models on the same items: `difference` is accuracy of a − accuracy of b, with its 95 % interval."""

    difference: float
    low: float
    high: float
    p_value: float
    only_a: int
    only_b: int


def paired_test(a: Sequence[int], b: Sequence[int]) -> PairedTest:
    """Compare the outcomes (1 right, 0 wrong) of two models, item by item: exact McNemar test.

    Raises:
        ValueError: not the same number of items.
    """
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    low, high = paired_difference_interval(only_a, only_b, len(a))
    return PairedTest((only_a - only_b) / len(a), low, high, mcnemar(only_a, only_b), only_a, only_b)


@dataclass(frozen=True, slots=True)
class Resampled:
    """A statistic over bootstrap resamples: 95 % percentile interval and standard deviation."""

    low: float
    high: float
    stderr: float


def perplexity(loss: float, tokens: float) -> float:
    """exp(loss / tokens); of a hopeless model a huge number, not infinity."""
    return math.exp(min(loss / tokens, 700.0))  # e^709 is the largest double


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], samples: int, seed: int, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """The statistic over resamples of the items with replacement (Efron 1979), [resamples].

    Args:
        statistic: from the places of n drawn items to a number.
        samples: n, how many items there are.
        seed: of the resampling; two statistics of the same items see the same draws under the same seed.
        resamples: how many.
    """
    generator = np.random.default_rng(seed)
    return np.array([statistic(generator.integers(0, samples, samples)) for _ in range(resamples)])


def spread(values: NDArray[np.float64]) -> Resampled:
    """Percentile interval and standard deviation of a bootstrapped statistic."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Resampled(float(low), float(high), float(values.std(ddof=1)))


@dataclass(frozen=True, slots=True)
class PairedBootstrap:
    """Two models on the same items: `difference` is value of a − value of b, with its 95 % percentile interval."""

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    a: Callable[[NDArray[np.int64]], float],
    b: Callable[[NDArray[np.int64]], float],
    samples: int,
    seed: int,
    resamples: int = RESAMPLES,
) -> PairedBootstrap:
    """Paired bootstrap test: do two values over the same n items differ? (Riezler and Maxwell 2005, section 3.2)

    Both are computed over the same draws of items. With δ the observed difference and δ*ᵢ that of draw i of B, the
    two-sided p-value is (1 + #{i: |δ*ᵢ − mean δ*| ≥ |δ|}) / (1 + B), as sacreBLEU has it.

    Args:
        a: value of the first over the items at given places.
        b: value of the second.
        samples: n.
        seed: of the resampling.
        resamples: B.
    """
    everything = np.arange(samples)
    observed = a(everything) - b(everything)
    differences = bootstrap(a, samples, seed, resamples) - bootstrap(b, samples, seed, resamples)
    found = spread(differences)
    extreme = np.abs(differences - differences.mean()) >= abs(observed) - 1e-12
    return PairedBootstrap(observed, found.low, found.high, float(1 + extreme.sum()) / (1 + resamples))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being one of m, in the same order (Holm 1979): valid for any dependence among them.

    The i-th smallest, i = 1…m, becomes max over j ≤ i of min(1, (m − j + 1) p₍ⱼ₎).
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def bootstrap_perplexity(
    losses: Sequence[float], tokens: Sequence[int], seed: int, resamples: int = RESAMPLES
) -> Resampled:
    """Percentile bootstrap of exp(Σ losses / Σ tokens) over examples.

    Args:
        losses: negative log-likelihood of each example, in nats.
        tokens: how many tokens each is the sum over.
        seed: of the resampling.
        resamples: how many.
    """
    loss, count = np.asarray(losses, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    return spread(
        bootstrap(lambda chosen: perplexity(loss[chosen].sum(), count[chosen].sum()), len(loss), seed, resamples)
    )


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int) -> Resampled:
    """Percentile bootstrap of the mean.

    Args:
        values: one for each example, at least one.
        seed: of the resampling.
    """
    told = np.asarray(values, dtype=np.float64)
    return spread(bootstrap(lambda chosen: float(told[chosen].mean()), len(told), seed))


def sign_flip_test(differences: Sequence[float], seed: int, resamples: int = 9999) -> float:
    """Two-sided p-value of the paired permutation test (Fisher 1935): is the mean difference zero?

    Under the hypothesis each difference might as well have had the other sign. The observed signs count as one of the
    permutations, so the value is never 0.

    Args:
        differences: a − b for each item.
        seed: of the signs.
        resamples: how many assignments of signs are drawn.
    """
    d = np.asarray(differences, dtype=np.float64)
    generator = np.random.default_rng(seed)
    observed = abs(d.sum())
    extreme = 0
    for _ in range(resamples):
        signs = generator.integers(0, 2, len(d)) * 2 - 1
        extreme += bool(abs((signs * d).sum()) >= observed - 1e-12 * abs(d).sum())
    return (extreme + 1) / (resamples + 1)


def _quantile() -> float:
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
