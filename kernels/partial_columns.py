"""Columns of a weight that train (PaCA, arXiv 2503.01905; S²FT, arXiv 2412.06289): products with few of the features.

For I, k of n features, and numbers B beside a layer's W ∈ ℝ^{m×n}:

    from columns:  y ← y + s·x[:, I]·Bᵀ,              B ∈ ℝ^{m×k}, x ∈ ℝ^{T×n}
    to columns:    y[:, I] ← y[:, I] + s·x·Bᵀ,        B ∈ ℝ^{k×m}, x ∈ ℝ^{T×m}, y ∈ ℝ^{T×n}
    gradient:      ∂L/∂W[:, I] = gᵀ·x[:, I],          g ∈ ℝ^{T×m}

All three read or write one tall matrix and are bounded by that: of the m·n·T products of a dense gradient k/n are left,
of its bytes those of g. cuBLAS goes through the tall matrix at the speed of memory if the small one's rows begin on 16
bytes: so on a GPU x[:, I] and B get columns beyond k, up to the next multiple of 8, of which those of B are zeros.
Kernels that gather within their loads were measured on an H200, too: with 128 columns they took half as long again.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

_ALIGNED = 8  # numbers of 16 bits in 16 bytes


@dataclass(frozen=True, eq=False)
class Columns:
    """I. Whether it is one is checked once, here; on a GPU that waits for its answer.

    Args:
        indices: [k] int64, ascending.
        size: n, how many there are.

    Raises:
        ValueError: indices of another dtype or more dimensions, not ascending, twice the same, or outside.
    """

    indices: Tensor
    size: int

    def __post_init__(self) -> None:
        I = self.indices  # noqa: E741
        if I.ndim != 1 or I.dtype != torch.int64:
            raise ValueError(f"Columns must be a vector of int64, not {tuple(I.shape)} of {I.dtype}.")
        if len(I) and (not bool((I.diff() > 0).all()) or I[0] < 0 or I[-1] >= self.size):
            raise ValueError(f"Columns must be ascending whole numbers below {self.size:,}, none of them twice.")

    @cached_property
    def picked(self) -> Tensor:
        """I, on a GPU with its last one repeated up to a multiple of 8."""
        missing = -len(self.indices) % _ALIGNED if self.indices.is_cuda else 0
        return torch.cat([self.indices, self.indices[-1:].expand(missing)]) if len(self.indices) else self.indices


def add_from_columns_reference(y: Tensor, x: Tensor, B: Tensor, columns: Columns, scale: float) -> Tensor:
    """`add_from_columns` in one line."""
    y += (scale * (x[:, columns.indices] @ B.to(x.dtype).T)).to(y.dtype)
    return x[:, columns.indices].to(y.dtype)


def add_from_columns(y: Tensor, x: Tensor, B: Tensor, columns: Columns, scale: float = 1.0) -> Tensor:
    """y += s·x[:, I]·Bᵀ in place, multiplied in y's dtype; without a gradient.

    Args:
        y: contiguous [T, m].
        x: [T, n], of any floating dtype.
        B: [m, k], of any floating dtype.
        columns: I.
        scale: s.

    Returns:
        A copy of x[:, I] in y's dtype for `gradient_of_picked`; [T, k' ≥ k].

    Raises:
        ValueError: shapes, dtypes or devices do not fit; y has gaps.
    """
    k, m = len(columns.indices), y.shape[-1]
    _check(y, x, B, columns, (m, k), (columns.size, m))
    picked = x.index_select(1, columns.picked).to(y.dtype)
    y.addmm_(picked, _widened(B.to(y.dtype), picked.shape[1]).T, alpha=scale)
    return picked


def add_to_columns_reference(y: Tensor, x: Tensor, B: Tensor, columns: Columns, scale: float) -> None:
    """`add_to_columns` in one line."""
    y[:, columns.indices] += (scale * (x @ B.to(x.dtype).T)).to(y.dtype)


def add_to_columns(y: Tensor, x: Tensor, B: Tensor, columns: Columns, scale: float = 1.0) -> None:
    """y[:, I] += s·x·Bᵀ in place, multiplied in y's dtype; without a gradient.

    Args:
        y: contiguous [T, n].
        x: [T, m], of any floating dtype.
        B: [k, m], of any floating dtype.
        columns: I.
        scale: s.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; y has gaps.
    """
    k, m = len(columns.indices), x.shape[-1]
    _check(y, x, B, columns, (k, m), (m, columns.size))
    low = x.to(y.dtype) @ _widened(B.T.to(y.dtype), len(columns.picked))
    y.index_add_(1, columns.indices, low[:, :k], alpha=scale)


def column_gradient_reference(g: Tensor, x: Tensor, columns: Columns) -> Tensor:
    """`column_gradient` through all of ∂L/∂W."""
    return (g.to(_sums(g)).T @ x.to(_sums(g)))[:, columns.indices]


def column_gradient(g: Tensor, x: Tensor, columns: Columns) -> Tensor:
    """∂L/∂W[:, I] = gᵀ·x[:, I].

    Args:
        g: ∂L/∂y [T, m].
        x: [T, n], of g's dtype.
        columns: I.

    Returns:
        [m, k], float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if x.ndim != 2 or x.shape[1] != columns.size or x.device != columns.indices.device:
        raise ValueError(f"x is {tuple(x.shape)} on {x.device}; {columns.size:,} columns were planned.")
    return gradient_of_picked(g, x.index_select(1, columns.picked), len(columns.indices))


def gradient_of_picked(g: Tensor, picked: Tensor, k: int) -> Tensor:
    """gᵀ·x[:, I], [m, k], float32 (float64 for float64).

    Args:
        g: [T, m].
        picked: x[:, I] [T, k' ≥ k], of g's dtype, contiguous.
        k: columns.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if g.ndim != 2 or picked.ndim != 2 or len(g) != len(picked) or picked.shape[1] < k or not picked.is_contiguous():
        raise ValueError(f"g is {tuple(g.shape)}, the picked features {tuple(picked.shape)} of {k}, or with gaps.")
    if (g.dtype, g.device) != (picked.dtype, picked.device) or not g.is_floating_point():
        raise ValueError(f"g is {g.dtype} on {g.device}, the picked features {picked.dtype} on {picked.device}.")
    # Twice as fast as gᵀ · picked.
    if g.is_cuda and g.dtype.itemsize == 2:
        return torch.mm(picked.T, g, out_dtype=torch.float32)[:k].T
    return (picked.T @ g)[:k].T.to(_sums(g))


def _widened(B: Tensor, width: int) -> Tensor:
    """B [m, k] with zeros beyond its columns, [m, width]."""
    return functional.pad(B, (0, width - B.shape[1])) if width > B.shape[1] else B


def _sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(
    y: Tensor, x: Tensor, B: Tensor, columns: Columns, shape: tuple[int, int], features: tuple[int, int]
) -> None:
    """Refuse y, x and B that do not go together; features: of x and of y."""
    tensors = {"x": (x, features[0]), "y": (y, features[1])}
    for name, (tensor, size) in tensors.items():
        if tensor.ndim != 2 or tensor.shape[1] != size or len(tensor) != len(x):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; wanted are {len(x)} × {size:,}.")
    if B.shape != shape:
        raise ValueError(f"B is {tuple(B.shape)}, not {shape}.")
    for name, tensor in (("x", x), ("y", y), ("B", B)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, not {tensor.dtype}.")
        if tensor.device != columns.indices.device:
            raise ValueError(f"{name} is on {tensor.device}, the columns on {columns.indices.device}.")
    if not y.is_contiguous():
        raise ValueError("y must be contiguous.")
