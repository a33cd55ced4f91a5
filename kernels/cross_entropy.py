"""Row-wise cross-entropy over large vocabularies.

For logits x ∈ ℝ^{N×V} and targets t ∈ {0…V−1, ignore}^N, per row n

    ℓₙ = logΣ_v exp(xₙᵥ) − xₙ,ₜₙ          ∂ℓₙ/∂xₙᵥ = exp(xₙᵥ − lseₙ) − [v = tₙ]

and ℓₙ = 0 without gradient where tₙ = ignore. The forward pass streams over V once with a running maximum m and sum s
(m′ = max(m, x), s′ = s·e^{m−m′} + Σe^{x−m′}; Milakov & Gimelshein, arXiv 1805.02867) and keeps the N values of lse;
the backward pass writes the gradient over the logits themselves, so that no second N×V buffer exists (Liger, arXiv
2410.10989). All arithmetic is float32, whatever the dtype of the logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import runs_on_triton, triton_is_there

IGNORE = -100
_LARGEST_BLOCK = 8192

if triton_is_there():
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def _forward(x, t, loss, lse, stride, V, ignore, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)  # one program a row
        x += row * stride
        target = tl.load(t + row)
        m = -3.4028234e38  # finite, so that a block of −inf leaves m and s as they are
        s = 0.0
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            block = tl.load(x + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(m, tl.max(block, 0))
            s = s * tl.exp(m - larger) + tl.sum(tl.exp(block - larger), 0)
            m = larger
        counted = target != ignore
        known = (target >= 0) & (target < V)
        total = tl.where(counted & (known == 0), float("nan"), m + tl.log(s))
        at_target = tl.load(x + target, mask=counted & known, other=0.0).to(tl.float32)
        tl.store(lse + row, total)
        tl.store(loss + row, tl.where(counted, total - at_target, 0.0))

    @triton.jit  # type: ignore[untyped-decorator]
    def _backward(x, t, lse, upstream, stride, V, ignore, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        x += row * stride
        target = tl.load(t + row)
        total = tl.load(lse + row)
        scale = tl.where(target == ignore, 0.0, tl.load(upstream + row).to(tl.float32))
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < V
            block = tl.load(x + columns, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = (tl.exp(block - total) - tl.where(columns == target, 1.0, 0.0)) * scale
            # Over the logits: no other program reads this row.
            tl.store(x + columns, gradient.to(x.dtype.element_ty), mask=inside)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
        rows, V = logits.shape
        loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
        lse = torch.empty_like(loss)
        ctx.block = min(triton.next_power_of_2(V), _LARGEST_BLOCK)
        ctx.ignore = ignore
        if rows:
            # A kernel is launched on the current device, whatever its arguments are on.
            with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
                _forward[(rows,)](logits, targets, loss, lse, logits.stride(0), V, ignore, BLOCK=ctx.block, num_warps=8)
        ctx.save_for_backward(logits, targets, lse)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, lse = ctx.saved_tensors
        rows, V = logits.shape
        scale = upstream[0].contiguous()
        if rows:
            with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
                _backward[(rows,)](
                    logits, targets, lse, scale, logits.stride(0), V, ctx.ignore, BLOCK=ctx.block, num_warps=8
                )
        # Whoever else saved these logits must hear of the overwriting: autograd then raises instead of using them.
        torch.autograd.graph.increment_version(logits)
        return logits, None, None


def cross_entropy_reference(logits: Tensor, targets: Tensor, ignore: int = IGNORE) -> Tensor:
    """`cross_entropy` in plain PyTorch; leaves the logits as they are."""
    return functional.cross_entropy(logits.float(), targets, ignore_index=ignore, reduction="none")


def cross_entropy(logits: Tensor, targets: Tensor, ignore: int = IGNORE) -> Tensor:
    """The cross-entropy of each row, float32 [N].

    On Triton the backward pass overwrites `logits` with their gradient: clone them first if their values are wanted
    after it, or if another term of the loss reads them. On a GPU nothing waits for the device, so a target that is out
    of range gives NaN there; elsewhere an error.

    Args:
        logits: [N, V], of any floating dtype, any strides.
        targets: [N], int64; `ignore` marks rows that do not count.
        ignore: the mark.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a target is out of range.
    """
    if logits.ndim != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(f"Logits are [N, V] of a floating dtype, not {tuple(logits.shape)} of {logits.dtype}.")
    rows, vocabulary = logits.shape
    require_targets(targets, rows, vocabulary, ignore)
    if targets.device != logits.device:
        raise ValueError(f"The targets are on {targets.device}, the logits on {logits.device}.")
    if not runs_on_triton(logits):
        return cross_entropy_reference(logits, targets, ignore)
    if logits.stride(1) != 1 or logits.stride(0) < vocabulary:  # each row is overwritten: none may share memory
        logits = logits.contiguous()
    result: Tensor = _CrossEntropy.apply(logits, targets.contiguous(), ignore)  # type: ignore[no-untyped-call]
    return result


def require_targets(targets: Tensor, rows: int, vocabulary: int, ignore: int) -> None:
    """Refuse what are no targets [rows].

    Raises:
        ValueError: another shape or dtype, or one out of range.
    """
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(f"{rows} rows need as many int64 targets, not {targets.dtype} {tuple(targets.shape)}.")
    require_tokens(targets[targets != ignore] if targets.device.type == "cpu" else targets, vocabulary)


def require_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Refuse tokens out of range; on a GPU, that would wait for the device: kernels make NaN of what is no token.

    Raises:
        ValueError: one is.
    """
    if tokens.device.type == "cpu" and bool(((tokens < 0) | (tokens >= vocabulary)).any()):
        raise ValueError(f"A target or a teacher's token is not among the {vocabulary} of the vocabulary.")
