"""The paired permutation test: one module for training and registry, so that they never tell two p-values apart."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ENUMERATED = 12  # pairs: up to so many, all ways to flip them are taken
DRAWN = 9_999  # ways to flip more pairs than that
_BLOCK = 1_000


def flips(pairs: int) -> "Iterator[NDArray[np.bool_]]":
    """Which of n pairs change sides, in blocks of [ways, n]: all 2ⁿ ways, the first of which flips none, or drawn ones.

    The seed is fixed.
    """
    import numpy as np

    if pairs <= ENUMERATED:
        yield (np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1 == 1
        return
    generator = np.random.default_rng(0)
    for start in range(0, DRAWN, _BLOCK):
        yield generator.random((min(_BLOCK, DRAWN - start), pairs)) < 0.5


def ways(pairs: int) -> int:
    """How many there are, the one that was observed among them."""
    return int(2**pairs) if pairs <= ENUMERATED else DRAWN + 1


def p_value(extreme: int, pairs: int) -> float:
    """Of the ways that are at least as extreme as the observed one: itself counts, so that no p-value is 0.

    Of drawn ways (1 + extreme) / (1 + 9,999) (Phipson and Smyth 2010, arXiv:1603.05766).
    """
    return (extreme + (pairs > ENUMERATED)) / ways(pairs)


def sign_flip_test(differences: Sequence[float], *, one_sided: bool = False) -> float:
    """p-value of "the mean of n paired differences is 0", or, one-sided, "is at most 0" (Fisher 1935).

    Under the hypothesis each difference might as well have had the other sign: exact for differences that are
    symmetric about 0, as those of two versions that are equally good, and asymptotically for all others. Two-sided, n
    pairs give no less than 2/2ⁿ: five or fewer are never significant at 5 %.
    """
    return sign_flip_tests([differences], one_sided=one_sided)[0]


def sign_flip_tests(differences: Sequence[Sequence[float]], *, one_sided: bool = False) -> list[float]:
    """`sign_flip_test` of several rows of n differences each, [m, n], under the same flips."""
    import numpy as np

    rows = np.asarray(differences, dtype=np.float64)
    pairs = rows.shape[1]
    observed, rounding = rows.sum(axis=1), 1e-9 * np.abs(rows).sum(axis=1)
    extreme = np.zeros(len(rows), dtype=np.int64)
    for flipped in flips(pairs):
        sums = (1.0 - 2.0 * flipped) @ rows.T  # [ways, m]
        reached = sums >= observed - rounding if one_sided else np.abs(sums) >= np.abs(observed) - rounding
        extreme += reached.sum(axis=0)
    return [p_value(int(count), pairs) for count in extreme]
