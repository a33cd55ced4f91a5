"""How a tensor's few places and signs lie in a file: Rice-coded gaps, or bit masks.

golomb: for each piece of `PIECE` elements its quotients, remainders and signs, one after the other; how many places,
the parameter b and the bytes of quotients stand in the header. bitmask: the mask of non-zeros, then that of negatives.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from infra.errors import CorruptArtifact
from training.compression import codes, rice
from training.compression.codec import PIECE
from training.compression.container import REMEDY, Packed
from training.compression.ternary import Ternary

Chosen = Iterable[tuple[NDArray[np.bool_], NDArray[np.bool_]]]  # of each piece, what is kept and what is negative
Placed = Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]  # of each piece, places, and 1 where negative


def golomb(chosen: Chosen) -> tuple[bytes, list[list[int]]]:
    """The bytes, and of each piece: places, b, bytes of quotients."""
    parts: list[bytes] = []
    counts = []
    for kept, negative in chosen:
        places = np.flatnonzero(kept)
        coded = rice.encode(places, len(kept))
        signs = np.packbits(negative[places], bitorder="little")
        parts += [coded.quotients.tobytes(), coded.remainders.tobytes(), signs.tobytes()]
        counts.append([coded.count, coded.parameter, len(coded.quotients)])
    return b"".join(parts), counts


def bitmask(chosen: Chosen) -> bytes:
    """2·⌈d/8⌉ bytes."""
    nonzero: list[bytes] = []
    signs: list[bytes] = []
    for kept, negative in chosen:
        nonzero.append(np.packbits(kept, bitorder="little").tobytes())
        signs.append(np.packbits(kept & negative, bitorder="little").tobytes())
    return b"".join(nonzero + signs)


def from_golomb(packed: Packed, counts: list[list[int]]) -> Placed:
    """Inverse of `golomb`, a piece at a time; all lengths are checked before the first.

    Raises:
        CorruptArtifact: the bytes are not of so many places in a tensor of this shape.
    """
    whole, rest = divmod(packed.elements, PIECE)
    size = 0
    if len(counts) != whole + bool(rest):
        raise CorruptArtifact(f"{packed.name} is not of as many pieces as its shape says.", REMEDY)
    for number, numbers in enumerate(counts):
        length = PIECE if number < whole else rest
        if len(numbers) != 3 or min(numbers) < 0 or numbers[0] > length or numbers[1] > rice.LARGEST_PARAMETER:
            raise CorruptArtifact(f"{packed.name} has the impossible piece {numbers!r:.100}.", REMEDY)
        count, b, quotients = numbers
        if length > rice.longest(quotients, b):
            raise CorruptArtifact(f"{packed.name} claims more elements than its bytes can be of.", REMEDY)
        size += quotients + codes.packed_size(count, b) + codes.packed_size(count, 1)
    if size != len(packed.content):
        raise CorruptArtifact(f"{packed.name} has {len(packed.content):,} bytes where {size:,} are announced.", REMEDY)
    return _pieces(packed, counts)


def _pieces(packed: Packed, counts: list[list[int]]) -> Placed:
    content = np.frombuffer(packed.content, np.uint8)
    for number, (count, b, quotients) in enumerate(counts):
        begin = number * PIECE
        ends = np.cumsum([quotients, codes.packed_size(count, b), codes.packed_size(count, 1)])
        coded = rice.Coded(count, b, content[: ends[0]], content[ends[0] : ends[1]])
        try:
            places = rice.decode(coded, min(PIECE, packed.elements - begin))
        except CorruptArtifact as error:
            raise CorruptArtifact(f"{packed.name}: {error.what}", REMEDY) from None
        yield places + begin, codes.unpacked(content[ends[1] : ends[2]], count, 1)
        content = content[ends[2] :]


def from_bitmask(packed: Packed) -> Ternary:
    """Inverse of `bitmask`; the masks are views of the bytes.

    Raises:
        CorruptArtifact: the masks are not of this shape, or contradict each other.
    """
    size = codes.packed_size(packed.elements, 1)
    content = np.frombuffer(packed.content, np.uint8)
    ternary = Ternary(packed.elements, content[:size], content[size:])
    if not ternary.is_sound():
        raise CorruptArtifact(f"{packed.name} is not two masks of {packed.elements:,} bits that agree.", REMEDY)
    return ternary


def places(ternary: Ternary) -> Placed:
    """Places and signs of bit masks, a piece at a time."""
    for begin in range(0, ternary.length, PIECE):
        at = slice(begin // 8, (begin + PIECE) // 8)
        found = np.flatnonzero(np.unpackbits(ternary.nonzero[at], bitorder="little"))
        negative = np.unpackbits(ternary.negative[at], bitorder="little")
        yield found + begin, negative[found]
