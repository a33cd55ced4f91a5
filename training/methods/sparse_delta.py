"""Sparse changes of a tensor, W + scatter(η, δ): flat indices η [k] and values δ [k], added in float32, rounded once.

Indices are row-major in the tensor as the model holds it (a `Conv1D` weight lies transposed), distinct, in any order.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from infra.errors import CorruptArtifact
from kernels.sparse_plan import SparsePlan, planned
from training.methods.remembered import Remembered

Key = TypeVar("Key", bound=Hashable)


class SparseDelta(nn.Module):
    """η and δ of one tensor: δ trains in float32; η is a persistent buffer beside it.

    Args:
        indices: [k], any integer type.
        values: [k]; none given: zeros.
    """

    indices: Tensor

    def __init__(self, indices: Tensor, values: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("indices", indices.clone())
        self.values = nn.Parameter(torch.zeros(len(indices)) if values is None else values.float().clone())
        self._plan = Remembered(planned)

    def plan(self, shape: tuple[int, int]) -> SparsePlan:
        """Where the entries are in a matrix of `shape`; made when η has changed."""
        return self._plan.of(self.indices, shape)

    def added(self, tensor: Tensor) -> Tensor:
        """`tensor` + scatter(η, δ), in its dtype; gradient reaches δ."""
        return added(tensor, self.indices, self.values)

    def dense(self, like: Tensor) -> Tensor:
        """scatter(η, δ) in the shape of `like`, float32; gradient reaches δ."""
        return scattered(self.indices, self.values, like)


def added(tensor: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """A copy of `tensor` (any shape, dtype) with `values` [k] added at `indices` [k]."""
    flat = tensor.detach().reshape(-1)
    changed = (flat[indices].float() + values).to(tensor.dtype)
    return flat.index_put((indices,), changed).view(tensor.shape)


def scattered(indices: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """`values` [k] at `indices` [k] of a float32 tensor in the shape of `like`, zero elsewhere."""
    return torch.zeros(like.numel(), device=like.device).index_put((indices,), values.float()).view(like.shape)


def index_type(size: int) -> torch.dtype:
    """The smaller integer type that holds every index of a tensor of `size` entries."""
    return torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64


def random_indices(size: int, count: int) -> Tensor:
    """`count` distinct indices below `size`, drawn from the global generator."""
    return torch.randperm(size)[:count].to(index_type(size))


def check_indices(indices: Tensor, values: Tensor, size: int) -> None:
    """Raise `CorruptArtifact` unless stored `indices` and `values` are a sparse change of `size` entries."""
    if indices.dtype not in (torch.int32, torch.int64) or indices.ndim != 1 or values.shape != indices.shape:
        raise CorruptArtifact(
            f"{indices.dtype} {tuple(indices.shape)} and {tuple(values.shape)} are no indices and values"
        )
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise CorruptArtifact(f"an index is outside the tensor, which has {size:,} entries")
    if len(torch.unique(indices)) != len(indices):
        raise CorruptArtifact("an index occurs twice")


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` entries over tensors of `sizes`, in proportion; they sum to `total`, and none is above its size."""
    all_of_them, counts, seen = sum(sizes), [], 0
    for size in sizes:
        counts.append(total * (seen + size) // all_of_them - total * seen // all_of_them)
        seen += size
    return counts


def largest(changes: Mapping[Key, Tensor], count: int) -> dict[Key, Tensor]:
    """Masks (bool, of the changes' shapes) of the `count` entries of largest |change| among all tensors together.

    Exactly so many, of equal ones the first. Held at a time are `count` entries and one tensor more.

    Args:
        changes: tensors of any shapes, with `count` entries or more in all.
        count: 0 or more.
    """
    if not count:
        return {key: torch.zeros_like(change, dtype=torch.bool) for key, change in changes.items()}
    best = torch.empty(0)
    for change in changes.values():
        both = torch.cat([best.to(change.device), change.detach().abs().float().view(-1)])
        best = both.topk(min(count, len(both))).values
    least = best.min()
    left, masks = count - int((best > least).sum()), {}  # of those that equal the least
    for key, change in changes.items():
        size = change.detach().abs().float()
        equal = (size == least).view(-1).nonzero()[:left, 0]
        left -= len(equal)
        masks[key] = (size > least).view(-1).index_fill(0, equal, True).view(change.shape)
    return masks


def summed(deltas: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Indices and values of the sum of several sparse changes of one tensor; those that they share add up."""
    indices, where = torch.unique(torch.cat([indices for indices, _ in deltas]), return_inverse=True)
    values = torch.cat([values for _, values in deltas])
    return indices, values.new_zeros(len(indices)).index_add(0, where, values)
