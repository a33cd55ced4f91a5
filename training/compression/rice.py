"""Rice code for the gaps between the few non-zero places of a sparse vector, and the sizes that the theory gives it.

A gap g ≥ 0 (zeros before a non-zero place) is coded as its quotient g >> b in unary and its remainder in b bits. All
quotients come first, then all remainders: as many bits as in turn, but both directions work on whole arrays. The zeros
behind the last place count as one more quotient without an end, so that the code is at least length / 2^b bits long:
what a file can claim to be long is bounded by how long it is.

Source: Golomb (1966); the choice of b is that of Sattler et al. (arXiv 1805.08768), which ComPEFT follows.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infra.errors import CorruptArtifact
from training.compression import codes

LARGEST_PARAMETER = 10
GOLDEN = (math.sqrt(5) + 1) / 2


@dataclass(frozen=True)
class Coded:
    """Places of a vector, coded: how many, the parameter b, quotients and remainders."""

    count: int
    parameter: int
    quotients: NDArray[np.uint8]
    remainders: NDArray[np.uint8]


def entropy_bits(density: float, elements: int) -> float:
    """H = −((1−k)·log2(1−k) + k·log2(k/2))·d + 16: the least for a ternary vector with random places and signs.

    Args:
        density: k, the fraction that is not zero.
        elements: d.
    """
    zero = (1 - density) * math.log2(1 - density) if density < 1 else 0.0
    other = density * math.log2(density / 2) if density > 0 else 0.0
    return -(zero + other) * elements + 16


def parameter(density: float) -> int:
    """b* = 1 + ⌊log2(log(φ−1) / log(1−p))⌋ with the golden ratio φ, from 0 to `LARGEST_PARAMETER`."""
    if density >= 1:
        return 0
    if density <= 0:
        return LARGEST_PARAMETER
    best = 1 + math.floor(math.log2(math.log(GOLDEN - 1) / math.log1p(-density)))
    return min(max(best, 0), LARGEST_PARAMETER)


def expected_bits(density: float, elements: int) -> float:
    """p·d·(b* + 1 / (1 − (1−p)^(2^b*)) + 1) + 16: what this code should take, a sign for each place included."""
    if density <= 0:
        return 16
    b = parameter(density)
    position: float = b + 1 / (1 - (1 - density) ** 2**b)
    return density * elements * (position + 1) + 16


def encode(places: NDArray[np.int64], length: int) -> Coded:
    """The places [count], ascending, of a vector of `length`."""
    b = parameter(len(places) / max(length, 1))
    gaps = np.diff(places, prepend=-1) - 1
    quotients = gaps >> b
    ends = np.cumsum(quotients + 1) - 1
    bits = np.zeros(_bits(places, ends, length, b), np.uint8)
    bits[ends] = 1
    return Coded(len(places), b, np.packbits(bits, bitorder="little"), _pack(gaps & (2**b - 1), b))


def decode(coded: Coded, length: int) -> NDArray[np.int64]:
    """Inverse of `encode`. The caller has bounded `length` with `longest`.

    Raises:
        CorruptArtifact: this is no code of so many places of a vector of `length`.
    """
    b = coded.parameter
    ends = np.flatnonzero(np.unpackbits(coded.quotients, bitorder="little"))
    if len(ends) != coded.count or len(coded.remainders) != codes.packed_size(coded.count, b):
        raise CorruptArtifact("The places of a sparse tensor are not as many as they should be.")
    order = np.arange(coded.count)
    places = ((ends - order) << b) + np.cumsum(_unpack(coded.remainders, coded.count, b)) + order
    if (len(places) and places[-1] >= length) or len(coded.quotients) != -(-_bits(places, ends, length, b) // 8):
        raise CorruptArtifact("The places of a sparse tensor lie beyond its end.")
    return places


def longest(quotients: int, parameter: int) -> int:
    """The longest vector that so many bytes of quotients can be of."""
    return (8 * quotients + 1) << parameter


def _bits(places: NDArray[np.int64], ends: NDArray[np.int64], length: int, b: int) -> int:
    """Length of the quotients in bits: up to the last place's end, and the quotient of the zeros behind it."""
    last, end = (int(places[-1]), int(ends[-1])) if len(places) else (-1, -1)
    return end + 1 + ((length - 1 - last) >> b)


def _pack(remainders: NDArray[np.int64], b: int) -> NDArray[np.uint8]:
    if b in (1, 2, 4, 8):
        return codes.packed(remainders.astype(np.uint8), b)
    return np.packbits((remainders[:, None] >> np.arange(b)) & 1 != 0, bitorder="little")


def _unpack(content: NDArray[np.uint8], number: int, b: int) -> NDArray[np.int64]:
    if b in (1, 2, 4, 8):
        return codes.unpacked(content, number, b).astype(np.int64)
    bits = np.unpackbits(content, count=number * b, bitorder="little").reshape(number, b)
    remainders: NDArray[np.int64] = (bits.astype(np.int64) << np.arange(b)).sum(axis=1)
    return remainders
