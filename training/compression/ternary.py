"""Vectors of −1, 0 and 1 as two bit masks, and arithmetic on them that never unpacks more than a piece.

Source: ComPEFT (arXiv 2311.13171), "two binary masks": 2·⌈d/8⌉ bytes, AND, XOR and popcount for products of two of
them. What makes them dense, or multiplies by them, is in `kernels.ternary`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ternary import TernaryTensor, add_ternary

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

    def packed(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> TernaryTensor:
        """A copy as the kernels take it: to be decoded, added or applied where it is, on a GPU, too.

        Raises:
            ValueError: the masks are not of that shape, contradict each other, or do not end where the vector ends.
        """
        # Copied here, as what the masks are views of may not be written to, which PyTorch has no word for.
        nonzero, negative = (torch.from_numpy(mask.copy()).to(device) for mask in (self.nonzero, self.negative))
        return TernaryTensor(shape, nonzero, negative)

    def add_to(self, tensor: Tensor, scale: float) -> None:
        """tensor += scale · self, in place.

        Args:
            tensor: contiguous, on any device, `length` elements in any shape.
            scale: of the vector.

        Raises:
            ValueError: the tensor has another number of elements, or gaps; the masks are not sound.
        """
        if tensor.numel() != self.length:
            raise ValueError(f"The vector has {self.length:,} entries, the tensor {tensor.numel():,}.")
        add_ternary(tensor, self.packed((self.length,), tensor.device), scale)

    def is_sound(self) -> bool:
        """Whether the masks are of the right length, agree with each other, and end where the vector ends."""
        try:
            self.packed((self.length,))
        except ValueError:
            return False
        return True

    def _pieces(self) -> list[slice]:
        return [slice(begin, begin + PIECE) for begin in range(0, len(self.nonzero), PIECE)]


def _population(bits: NDArray[np.uint8]) -> int:
    whole = len(bits) // 8 * 8
    words, rest = bits[:whole].view(np.uint64), bits[whole:]
    return int(np.bitwise_count(words).sum(dtype=np.int64)) + int(np.bitwise_count(rest).sum(dtype=np.int64))
