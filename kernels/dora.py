"""DoRA: a linear layer whose weight's direction has a low-rank update, and whose rows have a trained magnitude.

For x ∈ ℝ^{T×n}, a frozen W ∈ ℝ^{m×n} with bias b, trained A ∈ ℝ^{r×n}, B ∈ ℝ^{m×r} and μ ∈ ℝ^m (Liu et al., arXiv
2402.09353),

    y = b + c ∘ u        u = x·Wᵀ + s·x·Aᵀ·Bᵀ        c = μ / ‖W + s·BA‖        (norms of rows)

with the norm held constant in the backward pass, as in the paper's §4.3. W + s·BA is never made: row by row

    ‖W + s·BA‖² = ‖W‖² + 2s·⟨B, W·Aᵀ⟩ + s²·⟨B, B·(A·Aᵀ)⟩

where ‖W‖² is computed once, as W is frozen. For the gradient of μ u is kept, too.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels.dispatch import runs_on_triton, triton_is_there
from kernels.fused_lora import KERNEL_DTYPES, check_lora, fused_lora

_TOKENS, _COLUMNS = 16, 256  # that a program takes at a time
_PROGRAMS = 528

if triton_is_there():
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["tokens", "part"])  # type: ignore[untyped-decorator]
    def _scale(  # type: ignore[no-untyped-def]
        z,
        u,
        c,
        bias,
        out,
        sums,
        tokens,
        columns,
        z_stride,
        part,
        BIAS: tl.constexpr,
        SUMS: tl.constexpr,
        TOKENS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """out = bias + c∘z, and sums = Σ z∘u over a part of the tokens."""
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        factor = tl.load(c + column, mask=column < columns, other=0.0).to(tl.float32)
        if BIAS:
            shift = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        total = tl.zeros([COLUMNS], tl.float32)
        begin = tl.program_id(1) * part
        for start in range(begin, min(begin + part, tokens), TOKENS):
            t = (start + tl.arange(0, TOKENS)).to(tl.int64)
            there = (t < tokens)[:, None] & (column < columns)[None, :]
            tile = tl.load(z + t[:, None] * z_stride + column[None, :], mask=there, other=0.0).to(tl.float32)
            place = t[:, None] * columns + column[None, :]
            if SUMS:
                total += tl.sum(tile * tl.load(u + place, mask=there, other=0.0).to(tl.float32), 0)
            scaled = tile * factor[None, :]
            if BIAS:
                scaled += shift[None, :]
            tl.store(out + place, scaled.to(out.dtype.element_ty), mask=there)
        if SUMS:
            tl.store(sums + tl.program_id(1).to(tl.int64) * columns + column, total, mask=column < columns)


class _Scaled(torch.autograd.Function):
    """b + c∘u, u contiguous [T, m], in one reading of each tensor."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(u, c)
        return _launch_scale(u, c, bias=bias)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        u, c = ctx.saved_tensors
        g = upstream[0] if upstream[0].stride(1) == 1 else upstream[0].contiguous()
        of_u, of_c = _launch_scale(g, c, u=u)
        return of_u, None if of_c is None else of_c.to(c.dtype), None


def _launch_scale(
    z: Tensor, c: Tensor, *, bias: Tensor | None = None, u: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    tokens, columns = z.shape
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    stripes = triton.cdiv(columns, _COLUMNS)
    part = triton.cdiv(triton.cdiv(tokens, max(_PROGRAMS // stripes, 1)), _TOKENS) * _TOKENS
    parts = triton.cdiv(tokens, part)
    sums = None if u is None else torch.empty(parts, columns, dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
        _scale[(stripes, parts)](
            z,
            z if u is None else u,
            c,
            z if bias is None else bias,
            out,
            z if sums is None else sums,
            tokens,
            columns,
            z.stride(0),
            part,
            BIAS=bias is not None,
            SUMS=u is not None,
            TOKENS=_TOKENS,
            COLUMNS=_COLUMNS,
        )
    return out, None if sums is None else sums.sum(0)


def row_squares(W: Tensor) -> Tensor:
    """‖W‖² of each row [m], in float32 or W's dtype if that is wider."""
    norms: Tensor = torch.linalg.vector_norm(W.detach(), dim=1, dtype=torch.promote_types(W.dtype, torch.float32))
    return norms.square()


@torch.no_grad()
def row_norms(W: Tensor, squares: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """‖W + s·BA‖ of each row [m], a constant, in the dtype of `squares`: `row_squares(W)`.

    Where an update nearly cancels a row, nothing but rounding is left of the difference.
    """
    with torch.autocast(W.device.type, enabled=False):
        cross = (W @ A.to(W.dtype).T).to(squares.dtype)
        A, B = A.to(squares.dtype), B.to(squares.dtype)
        terms = 2 * scale * cross + scale**2 * (B @ (A @ A.T))
        return (squares + (B * terms).sum(1)).clamp(min=0).sqrt()


def fused_dora_reference(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float
) -> Tensor:
    """`fused_dora` without dropout, with W + s·BA in memory."""
    updated = W + scale * (B @ A).to(W.dtype)
    norms = torch.linalg.vector_norm(updated.detach(), dim=1)
    return functional.linear(x, (magnitude / norms)[:, None].to(x.dtype) * updated, bias)


def fused_dora(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scale: float,
    squares: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """y = b + μ/‖W + s·BA‖ ∘ (x·Wᵀ + s·x·Aᵀ·Bᵀ), with gradients for x, A, B and μ; W and b are frozen.

    With dropout, what the adapter adds to the base layer's output, (c − 1)∘(x·Wᵀ) + c∘(s·x·Aᵀ·Bᵀ), is of the dropped
    x′, as DoRA's authors have it: y = b + (x − x′)·Wᵀ + c∘u(x′), which takes a second product with W.

    Args:
        x: [..., n], of any strides.
        W: [m, n], of x's dtype and any strides.
        bias: [m] of x's dtype, or None.
        A: [r, n], of any floating dtype, as are B and μ.
        B: [m, r].
        magnitude: μ [m].
        scale: s.
        squares: `row_squares(W)`.
        dropout: p, the probability with which each element of x is dropped on its way to the adapter.

    Returns:
        [..., m], contiguous, of x's dtype.

    Raises:
        ValueError: as `fused_lora` does; the magnitude or the squares are not [m].
    """
    check_lora(x, W, bias, A, B, dropout)
    m = len(W)
    if magnitude.shape != (m,) or squares.shape != (m,):
        raise ValueError(
            f"{m} outputs need as many magnitudes and squares, not {tuple(magnitude.shape)} and {tuple(squares.shape)}."
        )
    dropped = functional.dropout(x, dropout) if dropout else x
    u = fused_lora(dropped, W, None, A, B, scale)
    c = magnitude / row_norms(W, squares, A, B, scale)
    flat = u.view(prod(u.shape[:-1]), m)
    with torch.autocast(x.device.type, enabled=False):
        if runs_on_triton(u) and u.dtype in KERNEL_DTYPES and u.numel():
            y: Tensor = _Scaled.apply(flat, c, bias)  # type: ignore[no-untyped-call]
        else:
            y = flat * c.to(u.dtype) if bias is None else torch.addcmul(bias, flat, c.to(u.dtype))
        if dropout:
            y.addmm_((x - dropped).reshape(len(flat), x.shape[-1]), W.T)
    return y.view(u.shape)
