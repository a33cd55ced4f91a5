"""Single tokens of a vocabulary's head: the targets' logits, and what they and a teacher's add to a gradient.

A target is left out of the sums over all others (`kernels.linear_cross_entropy`), so that with d, their log-odds
against it, its loss is log(1 + e^d), and its own gradient −1/(1 + e^{−d}).
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import triton_is_there
from kernels.logit_tiles import Dense, exact_dtype, first_two, on_triton, shaped

_GATHERED = 1 << 22  # numbers of rows of W that are gathered at a time, without a kernel

if triton_is_there():
    import triton
    import triton.language as tl

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


def entry_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, of: Dense, tokens: Tensor) -> Tensor:
    """y of some tokens of each row, [N, E], from products in float32."""
    rows, entries = tokens.shape
    products = hidden.new_empty((rows, entries), dtype=exact_dtype(hidden))
    if not on_triton(hidden):
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
    return shaped(products, of)[0]


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
    if on_triton(gradient):
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
            *first_two(1 / tau for tau in of.terms),
            *first_two(of.terms.values()),
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


def _gathers(rows: int, of_row: int) -> list[slice]:
    """Rows for which so many numbers each may be gathered together."""
    most = max(_GATHERED // max(of_row, 1), 1)
    return [slice(start, min(start + most, rows)) for start in range(0, rows, most)]
