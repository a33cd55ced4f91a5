"""Columns of a weight that train (PaCA, arXiv 2503.01905; S²FT, arXiv 2412.06289): products with few of the features.

For I, k of n features, and numbers B beside a layer's W ∈ ℝ^{m×n}:

    from columns:  y ← y + s·x[:, I]·Bᵀ,              B ∈ ℝ^{m×k}, x ∈ ℝ^{T×n}
    to columns:    y[:, I] ← y[:, I] + s·x·Bᵀ,        B ∈ ℝ^{k×m}, x ∈ ℝ^{T×m}, y ∈ ℝ^{T×n}
    gradient:      ∂L/∂W[:, I] = gᵀ·x[:, I],          g ∈ ℝ^{T×m}

All three read or write one tall matrix and are bounded by that: of the m·n·T products of a dense gradient k/n are left,
of its bytes those of g. So on a GPU each goes through the tall matrix once. In the first a program gathers its tokens'
features when it loads them and keeps them for all m outputs, so that x[:, I] is read once and is written for the
backward pass on the way. In the second it adds its sums where they belong, without a matrix [T, k] in memory. The third
reads a copy of x[:, I]: features gathered anew for every few rows of W would be a sector of 32 bytes for each number,
more than g itself. There the tokens are divided among programs, whose sums are added in a fixed order.

Kernels take 16-bit numbers and up to 128 columns; beyond that cuBLAS has the work that it is made for, and float32 is
multiplied in full. Sums are float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import interpreted, runs_on_triton, triton_is_there

_MOST_COLUMNS = 128
_FROM = (64, 64, 4)  # tokens, outputs, warps of a program
_TO = (32, 128, 4)  # tokens, features of a step, warps
_GRADIENT = (64, 64, 4)  # tokens of a step, rows, warps
_PROGRAMS = 512  # as many as fill a GPU about twice

if triton_is_there():
    import triton
    import triton.language as tl

    _INTERPRETED = tl.constexpr(interpreted())

    @triton.jit
    def _dot(left, right):  # type: ignore[no-untyped-def]
        if _INTERPRETED:  # the interpreter multiplies bfloat16 as if its bits were integers
            left, right = left.to(tl.float32), right.to(tl.float32)
        return tl.dot(left, right)

    @triton.jit  # type: ignore[untyped-decorator]
    def _add_from(  # type: ignore[no-untyped-def]
        x,
        B,
        indices,
        y,
        picked,
        scale,
        tokens,
        m,
        k,
        width,
        part,
        x_stride,
        x_step,
        COLUMNS: tl.constexpr,
        TOKENS: tl.constexpr,
        OUTPUTS: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        column = tl.arange(0, COLUMNS)
        feature = tl.load(indices + column, mask=column < k, other=0).to(tl.int64)
        there = (token < tokens)[:, None] & (column < k)[None, :]
        inputs = tl.load(x + token[:, None] * x_stride + feature[None, :] * x_step, mask=there, other=0.0)
        inputs = inputs.to(y.dtype.element_ty)
        if tl.program_id(1) == 0:
            wide = (token < tokens)[:, None] & (column < width)[None, :]
            tl.store(picked + token[:, None] * width + column[None, :], inputs, mask=wide)
        for begin in range(tl.program_id(1) * part, min(m, (tl.program_id(1) + 1) * part), OUTPUTS):
            output = begin + tl.arange(0, OUTPUTS)
            used = (column < k)[:, None] & (output < m)[None, :]
            weights = tl.load(B + column[:, None].to(tl.int64) * m + output[None, :], mask=used, other=0.0)
            total = scale * _dot(inputs, weights)
            place = y + token[:, None] * m + output[None, :]
            inside = (token < tokens)[:, None] & (output < m)[None, :]
            total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, total.to(y.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _add_to(  # type: ignore[no-untyped-def]
        x,
        B,
        indices,
        y,
        scale,
        tokens,
        m,
        n,
        k,
        x_stride,
        x_step,
        COLUMNS: tl.constexpr,
        TOKENS: tl.constexpr,
        FEATURES: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        column = tl.arange(0, COLUMNS)
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for begin in range(0, m, FEATURES):
            feature = begin + tl.arange(0, FEATURES).to(tl.int64)
            there = (token < tokens)[:, None] & (feature < m)[None, :]
            inputs = tl.load(x + token[:, None] * x_stride + feature[None, :] * x_step, mask=there, other=0.0)
            used = (feature < m)[:, None] & (column < k)[None, :]
            weights = tl.load(B + column[None, :].to(tl.int64) * m + feature[:, None], mask=used, other=0.0)
            total += _dot(inputs.to(y.dtype.element_ty), weights)
        place = y + token[:, None] * n + tl.load(indices + column, mask=column < k, other=0).to(tl.int64)[None, :]
        inside = (token < tokens)[:, None] & (column < k)[None, :]
        total = scale * total + tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, total.to(y.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _take_gradient(  # type: ignore[no-untyped-def]
        g,
        picked,
        out,
        tokens,
        m,
        k,
        width,
        part,
        g_stride,
        g_step,
        COLUMNS: tl.constexpr,
        TOKENS: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(tl.program_id(1) * part, min(tokens, (tl.program_id(1) + 1) * part), TOKENS):
            token = begin + tl.arange(0, TOKENS).to(tl.int64)
            there = (token < tokens)[:, None] & (row < m)[None, :]
            upstream = tl.load(g + token[:, None] * g_stride + row[None, :] * g_step, mask=there, other=0.0)
            wide = (token < tokens)[:, None] & (column < width)[None, :]
            inputs = tl.load(picked + token[:, None] * width + column[None, :], mask=wide, other=0.0)
            total += _dot(upstream.trans(), inputs)
        place = out + (tl.program_id(1).to(tl.int64) * m + row[:, None]) * k + column[None, :]
        tl.store(place, total, mask=(row < m)[:, None] & (column < k)[None, :])


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
        A copy of x[:, I] in y's dtype for `gradient_of_picked`; [T, k' ≥ k], so that rows of it begin where 16 bytes
        do, zeros beyond k.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; y has gaps.
    """
    k, m = len(columns.indices), y.shape[-1]
    _check(y, x, B, columns, (m, k), (columns.size, m))
    if not _on_triton(y, k) or not y.numel():
        picked = x.index_select(1, columns.indices).to(y.dtype)
        y.addmm_(picked, B.to(y.dtype).T, alpha=scale)
        return picked
    picked = y.new_empty(len(x), _width(k))
    tokens, outputs, warps = _FROM
    tiles = triton.cdiv(len(x), tokens)
    part = triton.cdiv(triton.cdiv(m, outputs), max(_PROGRAMS // tiles, 1)) * outputs
    with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
        _add_from[(tiles, triton.cdiv(m, part))](
            x,
            B.T.to(y.dtype).contiguous(),
            columns.indices,
            y,
            picked,
            scale,
            len(x),
            m,
            k,
            picked.shape[1],
            part,
            *x.stride(),
            COLUMNS=_padded(k),
            TOKENS=tokens,
            OUTPUTS=outputs,
            num_warps=warps,
        )
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
    if not _on_triton(y, k) or not x.numel():
        y.index_add_(1, columns.indices, x.to(y.dtype) @ B.to(y.dtype).T, alpha=scale)
        return
    tokens, features, warps = _TO
    with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
        _add_to[(triton.cdiv(len(x), tokens),)](
            x,
            B.to(y.dtype).contiguous(),
            columns.indices,
            y,
            scale,
            len(x),
            m,
            columns.size,
            k,
            *x.stride(),
            COLUMNS=_padded(k),
            TOKENS=tokens,
            FEATURES=features,
            num_warps=warps,
        )


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
    return gradient_of_picked(g, x.index_select(1, columns.indices), len(columns.indices))


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
    (tokens, m), width = g.shape, _width(k)
    if not _on_triton(g, k) or not g.numel():
        return (picked[:, :k].T @ g).T.to(_sums(g))  # twice as fast as gᵀ · picked
    if picked.shape[1] != width:
        picked = functional.pad(picked[:, :k], (0, width - k))
    each, rows, warps = _GRADIENT
    tiles, steps = triton.cdiv(m, rows), triton.cdiv(tokens, each)
    part = triton.cdiv(steps, max(_PROGRAMS // tiles, 1)) * each
    parts = triton.cdiv(tokens, part)
    found = torch.empty(parts, m, k, dtype=torch.float32, device=g.device)
    with torch.cuda.device_of(g):  # type: ignore[no-untyped-call]
        _take_gradient[(tiles, parts)](
            g,
            picked,
            found,
            tokens,
            m,
            k,
            width,
            part,
            *g.stride(),
            COLUMNS=_padded(k),
            TOKENS=each,
            ROWS=rows,
            num_warps=warps,
        )
    return found[0] if parts == 1 else found.sum(0)


def _on_triton(y: Tensor, k: int) -> bool:
    return y.dtype in (torch.bfloat16, torch.float16) and 0 < k <= _MOST_COLUMNS and runs_on_triton(y)


def _width(k: int) -> int:
    """Columns of a row of picked features: the next multiple of 16."""
    return -(-k // 16) * 16


def _padded(k: int) -> int:
    """Columns of a program: a product on tensor cores has 16 or more, and a power of 2."""
    return max(int(triton.next_power_of_2(k)), 16)


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
