"""The largest magnitudes among very many numbers, found exactly and without sorting or holding them.

The bits of a float32's magnitude, read as an integer, are ordered as the magnitudes are. So two histograms of 2^16
bins, of the upper halves and then of the lower halves in the bin that matters, give the exact threshold (radix
selection).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 1 << 16
_MAGNITUDE = np.uint32(0x7FFF_FFFF)
Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class Survey:
    """What a first look at all numbers tells.

    Args:
        elements: how many there are.
        deviation: their standard deviation, unbiased; of a single number its magnitude.
        threshold: bits of the magnitude above which all are among the largest.
        ties: how many of exactly that magnitude are, too.
        nonzero: the least number of them that are not 0.
    """

    elements: int
    deviation: float
    threshold: int
    ties: int
    nonzero: int


def survey(pieces: Callable[[], Iterable[Numbers]], wanted: int) -> Survey:
    """Threshold of the `wanted` largest magnitudes among the numbers that `pieces` gives, each time it is called.

    Zeros are never among them: fewer are found where not as many are left.
    """
    upper, elements, total, squares, shift = np.zeros(BINS, np.int64), 0, 0.0, 0.0, None
    for piece in pieces():
        upper += np.bincount(piece.view(np.uint16)[1::2], minlength=BINS)
        if shift is None:
            shift = float(piece[0])  # the variance is the same; that of equal numbers is exactly 0
        shifted = piece.astype(np.float64) - shift
        total += float(shifted.sum())
        squares += float(np.square(shifted, out=shifted).sum())  # not by BLAS, whose threads wait for a busy machine
        elements += len(piece)
    if elements > 1:
        deviation = math.sqrt(max(squares - total * total / elements, 0) / (elements - 1))
    else:
        deviation = abs(shift or 0.0)
    upper = upper[: BINS // 2] + upper[BINS // 2 :]  # both signs
    high, missing = _bin(upper, wanted)
    if missing == upper[high]:
        low, ties = 0, int(np.iinfo(np.int64).max)
    else:
        lower = np.zeros(BINS, np.int64)
        for piece in pieces():
            bits = piece.view(np.uint32) & _MAGNITUDE
            lower += np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=BINS)
        low, ties = _bin(lower, missing)
    threshold = (high << 16) + low
    return Survey(elements, deviation, threshold, ties if threshold else 0, elements - int(upper[0]))


def _bin(counts: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The bin that holds the last of the `wanted` highest, and how many of that bin are among them."""
    from_top = np.cumsum(counts[::-1])
    place = min(int(np.searchsorted(from_top, wanted)), len(counts) - 1)
    taken_above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, min(wanted - taken_above, int(counts[-1 - place]))


class Choice:
    """Which numbers are among the largest; asked piece by piece in order, as the first of those that tie are taken."""

    def __init__(self, found: Survey) -> None:
        self._threshold = np.uint32(found.threshold)
        self._ties = found.ties

    def among(self, piece: Numbers) -> NDArray[np.bool_]:
        """For each number of the next piece, whether it is among the largest."""
        magnitude = piece.view(np.uint32) & _MAGNITUDE
        chosen: NDArray[np.bool_] = magnitude > self._threshold
        if self._ties:
            tied = np.flatnonzero(magnitude == self._threshold)[: self._ties]
            chosen[tied] = True
            self._ties -= len(tied)
        return chosen
