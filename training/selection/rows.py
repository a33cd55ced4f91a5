"""Embeddings as rows, read block by block: pools of any size in little memory."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra.errors import InvalidInput


class Rows(Protocol):
    """A matrix whose rows a slice, or an array of row numbers, takes out: an array, a memory map, a tensor."""

    @property
    def shape(self) -> Any:
        """(rows, dimensions)."""

    def __getitem__(self, rows: Any, /) -> Any:
        """The rows asked for, as an array or a tensor."""


def taken(rows: Rows, which: slice | NDArray[np.int64], like: Tensor) -> Tensor:
    """A copy of some rows, with the dtype and on the device of `like`."""
    part = rows[which]
    if isinstance(part, Tensor):
        return part.to(like, copy=True)
    return torch.tensor(np.asarray(part)).to(like)


def blocks(rows: Rows, size: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """All rows, `size` at a time, each with its place; as `taken`."""
    for begin in range(0, rows.shape[0], size):
        place = slice(begin, min(begin + size, rows.shape[0]))
        yield place, taken(rows, place, like)


def require_matching(target: Tensor, pool: Rows) -> None:
    """Refuse a target and a pool that cannot be compared.

    Raises:
        InvalidInput: no matrices, an empty target, fewer than two candidates, or different dimensions.
    """
    for name, matrix in (("target", target), ("candidate pool", pool)):
        if len(matrix.shape) != 2 or not matrix.shape[1]:
            raise InvalidInput(
                f"The {name}'s embeddings have the shape {tuple(matrix.shape)}, not (rows, dimensions).",
                "Give one row for each text.",
            )
    if not target.shape[0]:
        raise InvalidInput("The target sample is empty.", "Give a few hundred texts of the target task.")
    if pool.shape[0] < 2:
        held = "one candidate" if pool.shape[0] else "no candidates"
        raise InvalidInput(f"The pool holds {held}: there is nothing to choose from.", "Give a pool of at least two.")
    if target.shape[1] != pool.shape[1]:
        raise InvalidInput(
            f"The target's embeddings have {target.shape[1]} dimensions, the pool's {pool.shape[1]}.",
            "Embed both with the same encoder.",
        )


def require_budget(budget: int, candidates: int) -> None:
    """Refuse to choose none, or more than there are.

    Raises:
        InvalidInput: naming both numbers.
    """
    if budget < 1:
        raise InvalidInput(f"A budget of {budget:,} chooses nothing.", "Ask for at least one candidate.")
    if budget > candidates:
        raise InvalidInput(
            f"The budget is {budget:,}, but the pool holds {candidates:,} candidates.",
            "Ask for fewer, or give a larger pool.",
        )


def require_finite(block: Tensor, name: str, first: int = 0) -> None:
    """Refuse rows whose squared length is no number of their dtype.

    Args:
        block: some rows of `name`.
        name: what they belong to, for the message.
        first: the number of the block's first row.

    Raises:
        InvalidInput: naming the first such row, counted from 0.
    """
    bad = (~block.square().sum(1).isfinite()).nonzero()
    if len(bad):
        raise InvalidInput(
            f"Row {first + int(bad[0]):,} of the {name}'s embeddings (counted from 0) holds NaN, infinity or numbers "
            "too large to square.",
            "Embed that text again, or leave it out.",
        )


class Stacked:
    """Matrices of equal width, one under the other, as one; each may be a memory map, and stays one.

    Args:
        parts: at least one.
    """

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, dimensions)."""
        return int(self._ends[-1]), self._parts[0].shape[1]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
        """The rows of a slice, or those with the numbers, in that order."""
        which = np.arange(*rows.indices(self.shape[0])) if isinstance(rows, slice) else np.asarray(rows)
        owners = np.searchsorted(self._ends, which, side="right")
        found = np.empty((len(which), self.shape[1]), self._parts[0].dtype)
        for owner in np.unique(owners):
            mine = owners == owner
            part = self._parts[owner]
            found[mine] = part[which[mine] - (self._ends[owner] - len(part))]
        return found
