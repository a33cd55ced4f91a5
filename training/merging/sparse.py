"""Sparse differences: indices and values of one tensor, stored as `…indices` and `…values` (sparse_delta.py).

Adapters whose index sets differ are laid on the union of them, where an adapter has zeros that the others do not; from
there on they merge as any other: a sum is the composition θ = θ₀ + φ₁ + φ₂ + … of LT-SFT (arXiv 2110.07560), entries
that several hold add up, and what comes out is a sparse difference again.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from training.merging.adapter import Adapter
from training.methods.sparse_delta import summed

INDICES, VALUES = "indices", "values"


def is_sparse(adapter: Adapter) -> bool:
    """Whether it holds a sparse difference."""
    return bool(_pairs(adapter.tensors))


def aligned(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The same differences on equal, ascending index sets; equal sets stay as they are."""
    tensors = [dict(adapter.tensors) for adapter in adapters]
    for indices, values in dict.fromkeys(pair for adapter in adapters for pair in _pairs(adapter.tensors)):
        held = [each for each in tensors if indices in each]
        if len(held) == len(tensors) and all(torch.equal(each[indices], held[0][indices]) for each in held):
            continue
        union = torch.unique(torch.cat([each[indices] for each in held]))
        for each in tensors:
            own = (each[indices], each[values]) if indices in each else (union[:0], held[0][values][:0])
            each[indices], each[values] = summed([own, (union, own[1].new_zeros(len(union)))])
    return [Adapter(old.name, old.config, new) for old, new in zip(adapters, tensors, strict=True)]


def number_of_entries(tensors: Mapping[str, Tensor]) -> int:
    """K: of all differences together."""
    return sum(len(tensors[values]) for _, values in _pairs(tensors))


def _pairs(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The names of indices and of their values."""
    named = ((key, key.removesuffix(INDICES) + VALUES) for key in tensors if key.endswith(INDICES))
    return [(indices, values) for indices, values in named if values in tensors]
