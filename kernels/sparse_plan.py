"""Where the entries of a sparse change of a matrix are: checked and sorted once, when they come to be."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BLOCK = {"cpu": 1 << 20, "cuda": 1 << 23}  # entries of a matrix in a block of rows, of which products are taken at once


@dataclass(frozen=True, eq=False)
class SparsePlan:
    """Where the entries of S are, sorted by row, then column; made by `planned`.

    Args:
        shape: (m, n).
        order: [k] int64; the entry sorted to place e is the one that was given order[e]-th.
        rows, columns: [k] int32; of the sorted entries.
        starts: [m + 1] int32; row i has the sorted entries from starts[i] up to starts[i + 1].
        bounds: the same of each block of `block_rows` rows, and k.
        block_rows: rows of a block.
    """

    shape: tuple[int, int]
    order: Tensor
    rows: Tensor
    columns: Tensor
    starts: Tensor
    bounds: tuple[int, ...]
    block_rows: int

    @property
    def density(self) -> float:
        """k/mn."""
        return len(self.order) / max(self.shape[0] * self.shape[1], 1)

    @property
    def places(self) -> Tensor:
        """[k] int64; of the sorted entries, row-major."""
        return self.rows.long() * self.shape[1] + self.columns

    @cached_property
    def transposed(self) -> "SparsePlan":
        """Of Sᵀ with the same values in the order in which they were given; made when it is first asked for."""
        m, n = self.shape
        across = (self.columns.long() * m + self.rows).argsort()
        return _plan((n, m), self.order[across], self.columns[across], self.rows[across])


def planned(indices: Tensor, shape: tuple[int, int]) -> SparsePlan:
    """Sort and check places once, when they come to be. On a GPU that waits for its answer.

    Args:
        indices: η, [k] int32 or int64, row-major in a matrix of `shape`, in any order.
        shape: (m, n).

    Raises:
        ValueError: indices of another dtype or more dimensions, outside of the matrix, or one of them twice.
    """
    m, n = shape
    if indices.dtype not in (torch.int32, torch.int64) or indices.ndim != 1:
        raise ValueError(f"Indices must be a vector of int32 or int64, not {tuple(indices.shape)} of {indices.dtype}.")
    if len(indices) > torch.iinfo(torch.int32).max:
        raise ValueError(f"{len(indices):,} entries are more than a plan can count.")
    flat, order = indices.long().sort()
    if len(flat) and not 0 <= int(flat[0]) <= int(flat[-1]) < m * n:
        raise ValueError(f"An index is outside of a matrix {m} × {n}: they are {int(flat[0])} to {int(flat[-1])}.")
    if bool((flat[1:] == flat[:-1]).any()):
        raise ValueError("An index occurs twice.")
    return _plan((m, n), order, (flat // max(n, 1)).int(), (flat % max(n, 1)).int())


def _plan(shape: tuple[int, int], order: Tensor, rows: Tensor, columns: Tensor) -> SparsePlan:
    m, n = shape
    starts = torch.searchsorted(rows, torch.arange(m + 1, dtype=torch.int32, device=rows.device), out_int32=True)
    block_rows = max(BLOCK.get(rows.device.type, BLOCK["cpu"]) // max(n, 1), 1)
    bounds = (*starts[:-1:block_rows].tolist(), len(order))
    return SparsePlan(shape, order, rows, columns, starts, bounds, block_rows)
