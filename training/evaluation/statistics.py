"""How sure a measurement is, and whether two of them differ. Closed forms, and resampling with explicit seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from infra.sign_flips import flips, p_value, sign_flip_test, ways

CONFIDENCE = 0.95  # of every interval
RESAMPLES = 2000
FEWEST = 6  # items that a resampled interval rests on: of fewer, all flips together are no 5 %


def wilson_interval(right: float, samples: int) -> tuple[float, float]:
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
class PairedOutcomes:
    """Two models on the same items: `difference` is accuracy of a − accuracy of b, with its 95 % interval."""

    difference: float
    low: float
    high: float
    p_value: float
    only_a: int
    only_b: int


def paired_test(a: Sequence[int], b: Sequence[int]) -> PairedOutcomes:
    """Compare the outcomes (1 right, 0 wrong) of two models, item by item: exact McNemar test.

    Raises:
        ValueError: not the same number of items.
    """
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    low, high = paired_difference_interval(only_a, only_b, len(a))
    return PairedOutcomes((only_a - only_b) / len(a), low, high, mcnemar(only_a, only_b), only_a, only_b)


@dataclass(frozen=True, slots=True)
class Resampled:
    """A statistic over bootstrap resamples: 95 % interval and standard deviation."""

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


def spread(values: NDArray[np.float64], samples: int) -> Resampled:
    """Expanded percentile interval and standard deviation of a statistic that was bootstrapped from n items.

    The percentiles are 100·Φ(∓√(n/(n − 1))·t) with Student's t of n − 1 degrees of freedom, for resamples of few items
    spread too little (Hesterberg 2015, arXiv:1411.5279). Of one item there is nothing to resample.
    """
    from scipy.stats import norm, t

    reach = math.sqrt(samples / (samples - 1)) * t.ppf((1 + CONFIDENCE) / 2, samples - 1) if samples > 1 else 0.0
    low, high = np.quantile(values, [norm.cdf(-reach), norm.cdf(reach)])
    return Resampled(float(low), float(high), float(values.std(ddof=1)))


def mean_interval(values: Sequence[float], least: float = 0.0, most: float = 1.0) -> tuple[float, float]:
    """95 % interval of the mean of n values that are known to lie within [least, most], whatever their distribution.

    Of Learned-Miller and Thomas (2019, arXiv:1905.06208): the upper bound is the 97.5 % quantile of Σ wᵢ xᵢ + wₙ₊₁·most
    over weights w ~ Dirichlet(1, …, 1), here 10,000 of them with a fixed seed, the lower one that of `least`. Of values
    0 and 1 this is the Clopper–Pearson interval, of many others Student's; of equal ones, or of one, it is no point.
    """
    x, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    lower, upper = [], []
    for _ in range(20):
        weights = generator.standard_exponential((500, len(x) + 1))
        weights /= weights.sum(axis=1, keepdims=True)
        of_items = weights[:, :-1] @ x
        lower.append(of_items + weights[:, -1] * least)
        upper.append(of_items + weights[:, -1] * most)
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(lower, tail)), float(np.quantile(upper, 1 - tail))


def difference_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of n paired differences: those that the sign-flip test does not reject at 5 %.

    Its ends are order statistics of the means of the subsets that are flipped (Hartigan 1969, "Using subsample values
    as typical values").

    Returns:
        None where the items tell nothing of it: fewer than six, whose test rejects no mean, or all of them equal.
    """
    d = np.asarray(differences, dtype=np.float64)
    left_out = int((1 - CONFIDENCE) / 2 * ways(len(d)))  # of a tail, the observed way among them
    if left_out < 1 or np.ptp(d) == 0:
        return None
    subsets = (block[block.any(axis=1)] for block in flips(len(d)))
    means = np.sort(np.concatenate([(subset @ d) / subset.sum(axis=1) for subset in subsets]))
    return float(means[left_out - 1]), float(means[-left_out])


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two models on the same items: how much more the first has, with a 95 % interval, and the two-sided p-value."""

    difference: float
    low: float | None
    high: float | None
    p_value: float


def paired_means(differences: Sequence[float]) -> PairedTest:
    """Compare the means of two models' n scores by their differences, item by item: sign flips."""
    low, high = difference_interval(differences) or (None, None)
    return PairedTest(float(np.mean(differences)), low, high, sign_flip_test(differences))


def paired_swaps(statistic: Callable[[NDArray[np.int64]], float], items: int) -> PairedTest:
    """Compare two models by a value over all n items that is no mean of theirs, as that of corpus BLEU.

    The p-value is of approximate randomization: each item's two answers might as well have changed sides (Riezler and
    Maxwell 2005). The interval is the bootstrap's, over the same draws of items for both.

    Args:
        statistic: the value over the answers at given places: the first model's are 0…n − 1, the second's n…2n − 1.
        items: n.
    """
    everything = np.arange(items)
    observed, extreme = statistic(everything) - statistic(everything + items), 0
    for block in flips(items):
        for flipped in block:
            gap = statistic(everything + items * flipped) - statistic(everything + items * ~flipped)
            extreme += abs(gap) >= abs(observed) - 1e-12
    differences = bootstrap(lambda drawn: statistic(drawn) - statistic(drawn + items), items, seed=0)
    low, high = interval_of(differences, items)
    return PairedTest(observed, low, high, p_value(extreme, items))


def interval_of(resampled: NDArray[np.float64], samples: int) -> tuple[float, float] | tuple[None, None]:
    """The interval of a bootstrapped statistic; none of fewer than six items, or of resamples that all agree."""
    found = spread(resampled, samples)
    return (found.low, found.high) if samples >= FEWEST and found.low < found.high else (None, None)


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
    """Bootstrap of exp(Σ losses / Σ tokens) over examples.

    Args:
        losses: negative log-likelihood of each example, in nats.
        tokens: how many tokens each is the sum over.
        seed: of the resampling.
        resamples: how many.
    """
    loss, count = np.asarray(losses, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    drawn = bootstrap(lambda chosen: perplexity(loss[chosen].sum(), count[chosen].sum()), len(loss), seed, resamples)
    return spread(drawn, len(loss))


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int) -> Resampled:
    """Bootstrap of the mean.

    Args:
        values: one for each example, at least one.
        seed: of the resampling.
    """
    told = np.asarray(values, dtype=np.float64)
    return spread(bootstrap(lambda chosen: float(told[chosen].mean()), len(told), seed), len(told))


def _quantile() -> float:
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
