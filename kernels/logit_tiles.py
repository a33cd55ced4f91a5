"""Pieces of the logits of a vocabulary's head: seen once for their softmax, or made their own gradient.

The loops and the equations are in `kernels.linear_cross_entropy`; here is what is done to a tile [n, C] of them, by
Triton kernels or without.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import runs_on_triton, triton_is_there

LOWEST = -3.4028234e38  # finite, so that −inf less it is −inf
WIDEST = 8192  # columns that one program of a kernel holds

if triton_is_there():
    import triton
    import triton.language as tl

    @triton.jit
    def _capped(y, cap):  # type: ignore[no-untyped-def]
        return cap * (2 / (1 + tl.exp(-2 / cap * y)) - 1)

    @triton.jit  # type: ignore[untyped-decorator]
    def _online(  # type: ignore[no-untyped-def]
        tile,
        targets,
        m,
        s,
        sums,
        first,
        columns,
        stride,
        plane,
        s_plane,
        width,
        sums_plane,
        scale,
        cap,
        rate,
        second_rate,
        CAPPED: tl.constexpr,
        TERMS: tl.constexpr,
        GRADIENT: tl.constexpr,
        BLOCK: tl.constexpr,
        STEP: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)  # one program a row
        tile += row * stride
        column = tl.arange(0, BLOCK)
        y = tl.load(tile + column, mask=column < columns, other=0.0).to(tl.float32) * scale
        if CAPPED:
            y = _capped(y, cap)
        # Without the target, and what lies beyond the last column.
        inside = (column < columns) & (column != tl.load(targets + row) - first)
        before = tl.load(m + row)
        after = tl.maximum(before, tl.max(tl.where(inside, y, float("-inf")), 0))
        tl.store(m + row, after)
        for term in tl.static_range(TERMS):
            p = tl.where(inside, tl.exp((y - after) * (second_rate if term else rate)), 0.0)
            shrunk = tl.exp((before - after) * (second_rate if term else rate))
            begun = s + term * s_plane + row
            tl.store(begun, tl.load(begun) * shrunk + tl.sum(p, 0))
            if GRADIENT:
                if CAPPED:
                    p *= 1 - (y / cap) * (y / cap)
                # Over the logits, which no other program reads; y is in registers.
                tl.store(tile + term * plane + column, p.to(tile.dtype.element_ty), mask=column < columns)
                if after > before:
                    for begin in range(0, width, STEP):
                        place = begin + tl.arange(0, STEP)
                        total = sums + term * sums_plane + row * width + place
                        found = tl.load(total, mask=place < width, other=0.0)
                        tl.store(total, found * shrunk, mask=place < width)

    @triton.jit  # type: ignore[untyped-decorator]
    def _differentiate(  # type: ignore[no-untyped-def]
        tile,
        targets,
        at_target,
        lse,
        upstream,
        first,
        columns,
        stride,
        rows,
        scale,
        cap,
        rate,
        second_rate,
        share,
        second_share,
        CAPPED: tl.constexpr,
        TERMS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)  # one program a row
        tile += row * stride
        column = tl.arange(0, BLOCK)
        y = tl.load(tile + column, mask=column < columns, other=0.0).to(tl.float32) * scale
        if CAPPED:
            y = _capped(y, cap)
        gradient = share * tl.exp(y * rate - tl.load(lse + row))
        if TERMS == 2:
            gradient += second_share * tl.exp(y * second_rate - tl.load(lse + rows + row))
        if CAPPED:
            gradient *= 1 - (y / cap) * (y / cap)
        gradient = tl.where(column == tl.load(targets + row) - first, tl.load(at_target + row), gradient * scale)
        gradient *= tl.load(upstream + row)
        tl.store(tile + column, gradient.to(tile.dtype.element_ty), mask=column < columns)


@dataclass(frozen=True, eq=False)
class Dense:
    """y = c·tanh(γ·z/c) of z = h·Wᵀ + b, and what all of it has in common: a gradient Σ_τ share·softmax(y/τ).

    Args:
        scale: γ.
        cap: c, or None for ∞.
        terms: the share of each of one or two temperatures τ.
        hard: how much of the share of the first, then 1, is of labels: the gradient at a target is that much less.
        ignore: marks targets that do not count.
    """

    scale: float
    cap: float | None
    terms: Mapping[float, float]
    hard: float
    ignore: int

    def slopes(self, y: Tensor) -> Tensor | float:
        """y′."""
        return self.scale if self.cap is None else self.scale * (1 - (y / self.cap) ** 2)


def see(tile: Tensor, targets: Tensor, m: Tensor, s: Tensor, sums: Tensor | None, first: int, of: Dense) -> None:
    """Take some logits into account.

    Args:
        tile: [T, n, C]: h·Wᵀ + b of columns from `first` on; becomes e^{(y−m)/τ}·y′/γ, where `sums` are wanted.
        targets: [n].
        m: [n], the running maximum, and below sums relative to it; all change.
        s: [T, n].
        sums: [T, n, H], or None.
        first: of all columns, the tile's first.
        of: what is made of them.
    """
    if not on_triton(tile):
        _see_densely(tile, targets, m, s, sums, first, of)
        return
    rows, columns = tile.shape[1:]
    _online[(rows,)](
        tile,
        targets,
        m,
        s,
        sums,
        first,
        columns,
        tile.stride(1),
        tile.stride(0),
        s.stride(0),
        *((0, 0) if sums is None else (sums.shape[2], sums.stride(0))),
        of.scale,
        of.cap or 1.0,
        *first_two(1 / tau for tau in of.terms),
        CAPPED=of.cap is not None,
        TERMS=len(of.terms),
        GRADIENT=sums is not None,
        BLOCK=triton.next_power_of_2(columns),
        STEP=1024,
        num_warps=8,
    )


def _see_densely(
    tile: Tensor, targets: Tensor, m: Tensor, s: Tensor, sums: Tensor | None, first: int, of: Dense
) -> None:
    """`see` without a kernel."""
    y, slope = shaped(tile[0].to(m.dtype), of)
    row, column = _within(targets, first, y.shape[1])
    y[row, column] = -torch.inf
    after = torch.maximum(m, y.amax(1))
    if not torch.equal(after, m):  # as in nearly every piece but the first few
        for term, tau in enumerate(of.terms):
            shrunk = ((m - after) / tau).exp()
            s[term] *= shrunk
            if sums is not None:
                sums[term] *= shrunk[:, None]
        m.copy_(after)
    y -= m[:, None]
    for term, tau in reversed(list(enumerate(of.terms))):
        p = (y.div_(tau) if term == 0 else y / tau).exp_()
        s[term] += p.sum(1)
        if sums is not None:
            _put(tile[term], p if slope is None else p.mul_(slope))


def make_gradient(
    tile: Tensor, targets: Tensor, at_target: Tensor, lse: Tensor, upstream: Tensor, first: int, of: Dense
) -> None:
    """Make the loss's gradient, times what comes from above, of h·Wᵀ + b: over it, the teacher's tokens apart.

    Args:
        tile: [N, C], of columns from `first` on.
        targets: [N].
        at_target: [N], the gradient there.
        lse: [T, N].
        upstream: [N].
        first: of all columns, the tile's first.
        of: what is made of them.
    """
    rows, columns = tile.shape
    if not on_triton(tile):
        y, slope = shaped(tile.to(lse.dtype), of)
        parts = zip(of.terms.items(), lse, strict=True)
        gradient = sum((y / tau - total[:, None]).exp_().mul_(share * of.scale) for (tau, share), total in parts)
        assert isinstance(gradient, Tensor)
        if slope is not None:
            gradient *= slope
        row, column = _within(targets, first, columns)
        gradient[row, column] = at_target[row]
        tile.copy_(gradient.mul_(upstream[:, None]))
    elif rows:
        _differentiate[(rows,)](
            tile,
            targets,
            at_target,
            lse,
            upstream,
            first,
            columns,
            tile.stride(0),
            rows,
            of.scale,
            of.cap or 1.0,
            *first_two(1 / tau for tau in of.terms),
            *first_two(of.terms.values()),
            CAPPED=of.cap is not None,
            TERMS=len(of.terms),
            BLOCK=triton.next_power_of_2(columns),
            num_warps=8,
        )


def shaped(logits: Tensor, of: Dense) -> tuple[Tensor, Tensor | None]:
    """y of h·Wᵀ + b, over it, and y′/γ where that is not 1."""
    if of.scale != 1:
        logits *= of.scale
    if of.cap is None:
        return logits, None
    ratio = logits.div_(of.cap).tanh_()
    slope = 1 - ratio**2
    return ratio.mul_(of.cap), slope


def _within(targets: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """The rows whose target is among some columns, and which of them it is."""
    (row,) = ((targets >= first) & (targets < first + columns)).nonzero(as_tuple=True)
    return row, targets[row] - first


def _put(tile: Tensor, values: Tensor) -> None:
    if tile.data_ptr() != values.data_ptr():  # they may have been made in place
        tile.copy_(values)


def first_two(values: Iterable[float]) -> tuple[float, float]:
    """The first and the last of one or two."""
    first, *rest = values
    return first, (rest or [first])[0]


def on_triton(tensor: Tensor) -> bool:
    """Whether kernels compute on `tensor`, or PyTorch."""
    return runs_on_triton(tensor) and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """What sums are kept in."""
    return torch.promote_types(tensor.dtype, torch.float32)
