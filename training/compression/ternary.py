"""Vectors of −1, 0 and 1 as two bit masks, and arithmetic on them that never unpacks more than a piece.

Source: ComPEFT (arXiv 2311.13171), "two binary masks": 2·⌈d/8⌉ bytes, AND, XOR and popcount for products.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 1 << 15  # bytes of a mask at a time


@dataclass(frozen=True)
class Ternary:
    """A vector of `length` entries of −1, 0 and 1.

    Args:
        length: d.
        nonzero: bits [⌈d/8⌉ bytes], the first entry in the lowest; which entries are not 0.
        negative: the same; which are −1.
    """

    length: int
    nonzero: NDArray[np.uint8]
    negative: NDArray[np.uint8]

    @property
    def count(self) -> int:
        """How many entries are not 0."""
        return sum(_population(self.nonzero[at]) for at in self._pieces())

    def dot(self, other: "Ternary") -> int:
        """The dot product, exact: of the places where both are not 0, those with equal signs minus the others.

        Raises:
            ValueError: the vectors are not of one length.
        """
        if self.length != other.length:
            raise ValueError(f"The vectors have {self.length:,} and {other.length:,} entries.")
        total = 0
        for at in self._pieces():
            both = self.nonzero[at] & other.nonzero[at]
            unlike = (self.negative[at] ^ other.negative[at]) & both
            total += _population(both) - 2 * _population(unlike)
        return total

    def add_to(self, tensor: Tensor, scale: float) -> None:
        """tensor += scale · self, in place.

        Args:
            tensor: contiguous, on the CPU, `length` elements in any shape.
            scale: of the vector.

        Raises:
            ValueError: the tensor has another number of elements.
        """
        if tensor.numel() != self.length:
            raise ValueError(f"The vector has {self.length:,} entries, the tensor {tensor.numel():,}.")
        flat = tensor.detach().view(-1)
        for at in self._pieces():
            piece = flat[8 * at.start : 8 * at.stop]
            plus, minus = (
                torch.from_numpy(np.unpackbits(mask, count=len(piece), bitorder="little"))
                for mask in (self.nonzero[at] & ~self.negative[at], self.negative[at])
            )
            piece.add_((plus.to(torch.int8) - minus.to(torch.int8)).to(tensor.dtype), alpha=scale)

    def is_sound(self) -> bool:
        """Whether the masks are of the right length, agree with each other, and end where the vector ends."""
        size = -(-self.length // 8)
        if not len(self.nonzero) == len(self.negative) == size:
            return False
        if self.length % 8 and self.nonzero[-1] >> (self.length % 8):
            return False
        return not any((self.negative[at] & ~self.nonzero[at]).any() for at in self._pieces())

    def _pieces(self) -> list[slice]:
        return [slice(begin, begin + PIECE) for begin in range(0, len(self.nonzero), PIECE)]


def _population(bits: NDArray[np.uint8]) -> int:
    whole = len(bits) // 8 * 8
    words, rest = bits[:whole].view(np.uint64), bits[whole:]
    return int(np.bitwise_count(words).sum(dtype=np.int64)) + int(np.bitwise_count(rest).sum(dtype=np.int64))
