"""Pieces of the logits of a vocabulary's head: seen once for their softmax, or made their own gradient.

The loops and the equations are in `kernels.linear_cross_entropy`; here is what is done to a tile [n, C] of them, by
Triton kernels or without.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import runs_on_triton, triton_is_there

LOWEST = -3.4028234e38  # finite, so that −inf less it is −inf
WIDEST = 8192  # columns that one program of a kernel holds
_GATHERED = 1 << 22  # numbers of rows of W that are gathered at a time, without a kernel

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

    @triton.jit  # type: ignore[untyped-decorator]
    def _dot_entries(  # type: ignore[no-untyped-def]
        hidden, weight, tokens, products, entries, width, vocabulary, stride, weight_stride, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        entry = row * entries + tl.program_id(1)
        token = tl.load(tokens + entry)
        known = tl.minimum(tl.maximum(token, 0), vocabulary - 1)
        total = 0.0
        for begin in range(0, width, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            left = tl.load(hidden + row * stride + place, mask=place < width, other=0.0).to(tl.float32)
            right = tl.load(weight + known * weight_stride + place, mask=place < width, other=0.0).to(tl.float32)
            total += tl.sum(left * right, 0)
        # No token: its loss must not pass for one.
        tl.store(products + entry, tl.where(token == known, total, float("nan")))

    @triton.jit  # type: ignore[untyped-decorator]
    def _sum_up(  # type: ignore[no-untyped-def]
        sums,
        m,
        s,
        logits,
        targets,
        of_teacher,
        weight,
        tokens,
        gradient,
        width,
        sums_plane,
        s_plane,
        vocabulary,
        entries,
        weight_stride,
        stride,
        ignore,
        scale,
        cap,
        rate,
        second_rate,
        share,
        second_share,
        hard,
        CAPPED: tl.constexpr,
        TERMS: tl.constexpr,
        TAUGHT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = place < width
        counted = tl.where(tl.load(targets + row) == ignore, 0.0, 1.0)
        of_target = tl.load(logits + row * entries)
        most = tl.load(m + row)
        total = tl.zeros([BLOCK], tl.float32)
        of_entry = 0.0
        for term in tl.static_range(TERMS):
            by = second_rate if term else rate
            part = second_share if term else share
            of_label = 0.0 if term else hard
            d = tl.log(tl.load(s + term * s_plane + row)) + (most - of_target) * by
            rest = 1 / (1 + tl.exp(-d))
            of_entry += (part - of_label) * (1 - rest) - of_label * rest
            softplus = tl.maximum(d, 0.0) + tl.log(1 + tl.exp(-tl.abs(d)))
            norm = part * scale * tl.exp((most - of_target) * by - softplus) * counted
            total += tl.load(sums + term * sums_plane + row * width + place, mask=inside, other=0.0) * norm
        of_entry *= scale * counted
        if CAPPED:
            of_entry *= 1 - (of_target / cap) * (of_target / cap)
        token = tl.minimum(tl.maximum(tl.load(tokens + row * entries), 0), vocabulary - 1)
        total += of_entry * tl.load(weight + token * weight_stride + place, mask=inside, other=0.0).to(tl.float32)
        if TAUGHT:
            for entry in range(1, entries):
                token = tl.minimum(tl.maximum(tl.load(tokens + row * entries + entry), 0), vocabulary - 1)
                found = tl.load(weight + token * weight_stride + place, mask=inside, other=0.0).to(tl.float32)
                total += tl.load(of_teacher + row * (entries - 1) + entry - 1) * found
        tl.store(gradient + row * stride + place, total.to(gradient.dtype.element_ty), mask=inside)


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
    if not _on_triton(tile):
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
        *_two(1 / tau for tau in of.terms),
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
    y, slope = _shaped(tile[0].to(m.dtype), of)
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
    if not _on_triton(tile):
        y, slope = _shaped(tile.to(lse.dtype), of)
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
            *_two(1 / tau for tau in of.terms),
            *_two(of.terms.values()),
            CAPPED=of.cap is not None,
            TERMS=len(of.terms),
            BLOCK=triton.next_power_of_2(columns),
            num_warps=8,
        )


def entry_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, of: Dense, tokens: Tensor) -> Tensor:
    """y of some tokens of each row, [N, E], from products in float32."""
    rows, entries = tokens.shape
    products = hidden.new_empty((rows, entries), dtype=exact_dtype(hidden))
    if not _on_triton(hidden):
        for here in _gathers(rows, entries * hidden.shape[1]):
            found = weight[tokens[here]].to(products.dtype)
            products[here] = torch.bmm(found, hidden[here, :, None].to(products.dtype))[..., 0]
    elif rows:
        _dot_entries[(rows, entries)](
            hidden,
            weight,
            tokens,
            products,
            entries,
            hidden.shape[1],
            len(weight),
            hidden.stride(0),
            weight.stride(0),
            BLOCK=min(triton.next_power_of_2(hidden.shape[1]), 2048),
        )
    if bias is not None:
        products += bias[tokens]
    return _shaped(products, of)[0]


def put_gradient(
    gradient: Tensor,
    sums: Tensor,
    m: Tensor,
    s: Tensor,
    logits: Tensor,
    targets: Tensor,
    of_teacher: Tensor | None,
    weight: Tensor,
    tokens: Tensor,
    of: Dense,
) -> None:
    """The gradient of each loss, once all of the vocabulary has been seen.

    Args:
        gradient: [n, H], to be filled.
        sums: [T, n, H], of everything but targets; may be overwritten.
        m: [n], the maximum that they and `s` are relative to.
        s: [T, n].
        logits: [n, 1 + K], of targets and the teacher's tokens.
        targets: [n].
        of_teacher: [n, K], the teacher's part of the gradient of h·Wᵀ + b; 0 in rows that do not count.
        weight: W [V, H].
        tokens: [n, 1 + K].
        of: what is made of logits.
    """
    rows, entries = tokens.shape
    width = gradient.shape[1]
    if _on_triton(gradient):
        block = min(triton.next_power_of_2(width), 1024)
        _sum_up[(rows, triton.cdiv(width, block))](
            sums,
            m,
            s,
            logits,
            targets,
            of_teacher,
            weight,
            tokens,
            gradient,
            width,
            sums.stride(0),
            s.stride(0),
            len(weight),
            entries,
            weight.stride(0),
            gradient.stride(0),
            of.ignore,
            of.scale,
            of.cap or 1.0,
            *_two(1 / tau for tau in of.terms),
            *_two(of.terms.values()),
            of.hard,
            CAPPED=of.cap is not None,
            TERMS=len(of.terms),
            TAUGHT=of_teacher is not None,
            BLOCK=block,
        )
        return
    counted = targets != of.ignore
    lse = log_sums(m, s, logits[:, 0], of)
    for total, (tau, share), norm in zip(sums, of.terms.items(), lse, strict=True):
        total *= torch.where(counted, share * of.scale * (m / tau - norm).exp(), 0.0)[:, None]
    shares = torch.where(counted, at_target(m, s, logits[:, 0], of), 0.0)[:, None]
    if of_teacher is not None:
        shares = torch.cat([shares, of_teacher], dim=1)
    for here in _gathers(rows, entries * width):
        found = weight[tokens[here]].to(sums.dtype)
        gradient[here] = sums[:, here].sum(0) + torch.bmm(shares[here, None], found)[:, 0]


def odds(m: Tensor, s: Tensor, target: Tensor, of: Dense) -> Tensor:
    """d [T, n]: of everything but the target, against it, at each temperature, from its logits [n]."""
    return torch.stack([sums.log() + (m - target) / tau for sums, tau in zip(s, of.terms, strict=True)])


def log_sums(m: Tensor, s: Tensor, target: Tensor, of: Dense) -> Tensor:
    """log Σᵥ e^{y/τ} [T, n]."""
    found = functional.softplus(odds(m, s, target, of), threshold=50)
    return torch.stack([target / tau + each for each, tau in zip(found, of.terms, strict=True)])


def at_target(m: Tensor, s: Tensor, target: Tensor, of: Dense) -> Tensor:
    """The gradient of h·Wᵀ + b at the target [n], a teacher's part left out."""
    rest = torch.sigmoid(odds(m, s, target, of))
    first, *others = of.terms.values()
    found = (first - of.hard) * (1 - rest[0]) - of.hard * rest[0]
    for share, each in zip(others, rest[1:], strict=True):
        found += share * (1 - each)
    return found.mul_(of.slopes(target))


def _shaped(logits: Tensor, of: Dense) -> tuple[Tensor, Tensor | None]:
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


def _gathers(rows: int, of_row: int) -> list[slice]:
    """Rows for which so many numbers each may be gathered together."""
    most = max(_GATHERED // max(of_row, 1), 1)
    return [slice(start, min(start + most, rows)) for start in range(0, rows, most)]


def _two(values: Iterable[float]) -> tuple[float, float]:
    """The first and the last of one or two."""
    first, *rest = values
    return first, (rest or [first])[0]


def _on_triton(tensor: Tensor) -> bool:
    return runs_on_triton(tensor) and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """What sums are kept in."""
    return torch.promote_types(tensor.dtype, torch.float32)
