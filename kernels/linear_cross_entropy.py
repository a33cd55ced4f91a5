"""Cross-entropy of a vocabulary's head on hidden states, whose logits are never in memory together.

For hidden states h ∈ ℝ^{N×H}, a head W ∈ ℝ^{V×H}, b ∈ ℝ^V and targets t ∈ {0…V−1, ignore}^N, with γ > 0 and c of
architectures that scale or cap their logits (γ = 1, c = ∞ elsewhere):

    yₙᵥ = c·tanh(γ·(hₙ·Wᵥ + bᵥ)/c)        ℓₙ = log Σᵥ e^{yₙᵥ} − yₙ,ₜₙ        gₙᵥ = softmaxᵥ(yₙ) − [v = tₙ]
    ∂ℓₙ/∂hₙ = Σᵥ gₙᵥ·y′ₙᵥ·Wᵥ        ∂ℓₙ/∂Wᵥ = gₙᵥ·y′ₙᵥ·hₙ        y′ = γ·(1 − (y/c)²)

The gradient of hₙ is attention over the vocabulary, with W as keys and as values; so it is made like attention (Dao et
al., arXiv 2205.14135): one pass over pieces of W, each multiplied twice while its logits are in the cache, with a
running maximum m and sum s (Milakov & Gimelshein, arXiv 1805.02867), by which Σ e^{y−m}·y′·W is divided at the end.
The target is left out of it, and comes in last: with d = log Σ_{v≠t} e^{yᵥ} − yₜ, ℓ = log(1 + e^d) and gₜ =
−1/(1 + e^{−d}), neither of which is a difference of two numbers close to each other.

Rows scale apart from each other, so whatever comes from above multiplies ∂ℓₙ/∂hₙ afterwards. A gradient of W or b,
where one is wanted, takes a second pass, in the backward: of each piece all rows at once, so that it is summed in
float32 and rounded once, without a buffer beside it.

With a teacher's K most probable tokens (see `SoftTargets`) the loss is (1 − w)·ℓₙ + w·τ²·KL(p_τ ‖ q_τ), q_τ =
softmax(y/τ), of gradient (1 − w)·g + w·τ·(q_τ − p_τ): a second sum at temperature τ in the same pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels.cross_entropy import IGNORE, require_targets, require_tokens
from kernels.logit_entries import at_target, entry_logits, log_sums, odds, put_gradient
from kernels.logit_tiles import LOWEST, WIDEST, Dense, exact_dtype, make_gradient, see

_CPU_TILE = 1024  # rows, and columns, of the logits that are in the cache together
# Bytes of working memory on a GPU where the hidden states themselves take less: with 8 MiB an H200 waits for launches.
_LEAST = 192 << 20


@dataclass(frozen=True, eq=False)
class Head:
    """What makes logits of hidden states: y = c·tanh(γ·(h·Wᵀ + b)/c).

    Args:
        weight: W [V, H], rows contiguous.
        bias: b [V], or None.
        scale: γ.
        cap: c, or None for logits that are not capped.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def shaped(self, logits: Tensor) -> Tensor:
        """y of h·Wᵀ + b."""
        logits = self.scale * logits
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """A teacher's opinion: p_τ = softmax(logits/τ), over the K tokens of each row that it finds most probable.

    Args:
        tokens: [N, K], int64.
        logits: [N, K].
        temperature: τ > 0.
        weight: w, from 0 (the targets alone) to 1 (the teacher alone).
    """

    tokens: Tensor
    logits: Tensor
    temperature: float
    weight: float


def linear_cross_entropy_reference(
    hidden: Tensor, head: Head, targets: Tensor, soft: SoftTargets | None = None, ignore: int = IGNORE
) -> Tensor:
    """`linear_cross_entropy` with all logits in memory."""
    logits = head.shaped(functional.linear(hidden, head.weight, head.bias))
    logits = logits.to(exact_dtype(hidden))
    hard = functional.cross_entropy(logits, targets, ignore_index=ignore, reduction="none")
    if soft is None:
        return hard
    return torch.where(targets == ignore, 0.0, (1 - soft.weight) * hard + soft.weight * divergence(logits, soft))


def divergence(logits: Tensor, soft: SoftTargets) -> Tensor:
    """τ²·KL(p_τ ‖ q_τ) [N] of a student's logits [N, V], all in memory."""
    teacher = (soft.logits.to(logits.dtype) / soft.temperature).log_softmax(-1)
    student = (logits / soft.temperature).log_softmax(-1).gather(-1, soft.tokens)
    return soft.temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def linear_cross_entropy(
    hidden: Tensor, head: Head, targets: Tensor, soft: SoftTargets | None = None, ignore: int = IGNORE
) -> Tensor:
    """The loss of each row, float32 (float64 of float64) [N]; gradients flow to `hidden`, the weight and the bias.

    Under autocast its dtype is computed in, as by a linear layer. On a GPU nothing waits for the device, so a token
    that is out of range gives NaN there; elsewhere an error.

    Args:
        hidden: [N, H], of a floating dtype.
        head: of the same dtype and device.
        targets: [N], int64; `ignore` marks rows that do not count.
        soft: what is learnt beside the targets.
        ignore: the mark.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a token is out of range, γ, c, τ or w makes no sense.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        bias = head.bias if head.bias is None else head.bias.to(dtype)
        hidden, head = hidden.to(dtype), Head(head.weight.to(dtype), bias, head.scale, head.cap)
    _check(hidden, head, targets, soft, ignore)
    targets = targets.contiguous()
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, _Loss(head.scale, head.cap, ignore, soft), targets, wanted
    )
    return result


@dataclass(frozen=True, eq=False)
class _Loss:
    """What is made of h·Wᵀ + b.

    Args:
        scale: γ.
        cap: c, or None.
        ignore: marks targets that do not count.
        soft: what is learnt beside them.
    """

    scale: float
    cap: float | None
    ignore: int
    soft: SoftTargets | None

    @property
    def hard(self) -> float:
        """1 − w."""
        return 1.0 if self.soft is None else 1 - self.soft.weight

    @property
    def dense(self) -> Dense:
        """(1 − w)·softmax(y) + w·τ·softmax(y/τ), what is 0 of it left out."""
        terms = {1.0: self.hard} if self.hard else {}
        if self.soft is not None and self.soft.weight:
            temperature = float(self.soft.temperature)
            terms[temperature] = terms.get(temperature, 0.0) + self.soft.weight * temperature
        return Dense(self.scale, self.cap, terms, self.hard, self.ignore)

    def entries(self, targets: Tensor) -> Tensor:
        """[N, 1 + K]: the tokens whose gradient has a part of its own: the target, then the teacher's."""
        known = torch.where(targets == self.ignore, 0, targets)[:, None]
        return known if self.soft is None else torch.cat([known, self.soft.tokens], dim=1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, of: _Loss, targets: Tensor, wanted: bool
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):  # type: ignore[no-untyped-call]
            loss, lse, shares, gradient = _stream(hidden, weight, bias, of, targets, wanted)
        ctx.of = of
        trained = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(gradient, *((hidden, weight, bias, targets, lse, shares) if trained else ()))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *rest = ctx.saved_tensors
        of_hidden, of_weight, of_bias = None, None, None
        with torch.autocast(upstream.device.type, enabled=False), torch.cuda.device_of(upstream):  # type: ignore[no-untyped-call]
            if rest:
                of_weight, of_bias = _of_head(rest, ctx.of, upstream.contiguous(), *ctx.needs_input_grad[1:3])
            if gradient is not None:
                # Not in place: a graph that is kept comes here again.
                of_hidden = gradient * upstream[:, None].to(gradient.dtype)
        return of_hidden, of_weight, of_bias, None, None, None


def _stream(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, of: _Loss, targets: Tensor, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Loss [N], lse [T, N], the entries' parts of the gradient of h·Wᵀ + b [N, 1 + K] and, if wanted, that of h."""
    rows, exact, dense = len(hidden), exact_dtype(hidden), of.dense
    tokens = of.entries(targets)
    logits = entry_logits(hidden, weight, bias, dense, tokens)
    cross, of_teacher = _of_teacher(of, logits, targets)
    terms = len(dense.terms)
    most, columns = _tile(hidden, terms, wanted)
    m = hidden.new_full((rows,), LOWEST, dtype=exact)
    s = hidden.new_zeros((terms, rows), dtype=exact)
    gradient = torch.empty_like(hidden) if wanted else None
    tiles = hidden.new_empty((terms if wanted else 1, most, columns))
    sums = hidden.new_empty((terms, most, hidden.shape[1]), dtype=exact) if wanted else None
    pieces = _pieces(weight, bias, columns)
    for start in range(0, rows, most):
        here = slice(start, min(start + most, rows))
        h, of_block = hidden[here], (targets[here], m[here], s[:, here])
        total = None if sums is None else sums[:, : len(h)].zero_()
        for first, piece, piece_bias in pieces:
            tile = tiles[:, : len(h), : len(piece)]
            _multiply(h, piece, piece_bias, tile[0])
            see(tile, *of_block, total, first, dense)
            if total is not None:
                for term in range(terms):
                    _accumulate(total[term], tile[term], piece)
        if gradient is not None and total is not None:
            part = None if of_teacher is None else of_teacher[here]
            seen = m[here], s[:, here], logits[here], targets[here]
            put_gradient(gradient[here], total, *seen, part, weight, tokens[here], dense)
    counted, target = targets != of.ignore, logits[:, 0]
    lse = log_sums(m, s, target, dense)
    loss = torch.zeros_like(m)
    if of.hard:
        loss = of.hard * functional.softplus(odds(m, s, target, dense)[0], threshold=50)
    if of.soft is not None and cross is not None:
        loss = loss + of.soft.weight * of.soft.temperature**2 * (cross + lse[-1])
    shares = torch.where(counted, at_target(m, s, target, dense), 0.0)[:, None]
    if of_teacher is not None:
        shares = torch.cat([shares, of_teacher], dim=1)
    return torch.where(counted, loss, 0.0), torch.where(counted, lse, torch.inf), shares, gradient


def _of_teacher(of: _Loss, logits: Tensor, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Σₖ pₖ·(log pₖ − yₖ/τ) [N], and the teacher's part of the gradient of h·Wᵀ + b at its tokens [N, K]."""
    if of.soft is None:
        return None, None
    tau, student = of.soft.temperature, logits[:, 1:]
    teacher = (of.soft.logits.to(logits.dtype) / tau).log_softmax(-1)
    part = -of.soft.weight * tau * teacher.exp() * of.dense.slopes(student)
    cross = (teacher.exp() * (teacher - student / tau)).sum(-1)
    return cross, torch.where((targets != of.ignore)[:, None], part, 0.0)


def _of_head(
    saved: Sequence[Any], of: _Loss, upstream: Tensor, weight_wanted: bool, bias_wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of W and b under `upstream` [N]: of a piece of the vocabulary at a time."""
    hidden, weight, bias, targets, lse, shares = saved
    of_weight = torch.empty_like(weight) if weight_wanted else None
    of_bias = torch.empty_like(bias) if bias_wanted and bias is not None else None
    columns = _columns_of_all(hidden)
    tile = hidden.new_empty((len(hidden), columns))
    first_share, tokens = shares[:, 0].contiguous(), None if of.soft is None else of.soft.tokens
    for first, piece, piece_bias in _pieces(weight, bias, columns):
        part, here = tile[:, : len(piece)], slice(first, first + len(piece))
        _multiply(hidden, piece, piece_bias, part)
        make_gradient(part, targets, first_share, lse, upstream, first, of.dense)
        if tokens is not None:
            inside = (tokens >= first) & (tokens < here.stop)
            added = torch.where(inside, shares[:, 1:] * upstream[:, None], 0.0).to(part.dtype)
            part.scatter_add_(1, (tokens - first).clamp(0, len(piece) - 1), added)
        if of_weight is not None:
            torch.mm(part.T, hidden, out=of_weight[here])
        if of_bias is not None:
            of_bias[here] = part.sum(0, dtype=lse.dtype)
    return of_weight, of_bias


def _tile(hidden: Tensor, terms: int, wanted: bool) -> tuple[int, int]:
    """Rows and columns of logits that are made at a time."""
    rows, width = hidden.shape
    if not hidden.is_cuda:
        return max(min(rows, _CPU_TILE), 1), _CPU_TILE
    columns = WIDEST
    of_row = columns * hidden.element_size() + (4 * width if wanted else 0)
    blocks = -(-rows * of_row * (terms if wanted else 1) // _working_memory(hidden))
    return _whole(-(-rows // max(blocks, 1)), 64), columns


def _columns_of_all(hidden: Tensor) -> int:
    """How many columns of logits are made at a time where that is done for all rows together."""
    rows = max(len(hidden), 1)
    if not hidden.is_cuda:
        return max(_CPU_TILE**2 // rows, 64)
    return min(_whole(_working_memory(hidden) // (rows * hidden.element_size()), 128), WIDEST)


def _working_memory(hidden: Tensor) -> int:
    """Bytes that may be taken beside results."""
    return max(hidden.numel() * hidden.element_size(), _LEAST)


def _whole(number: int, unit: int) -> int:
    """The largest multiple of `unit` that is not more than `number`, but one unit at least."""
    return max(number // unit, 1) * unit


def _pieces(weight: Tensor, bias: Tensor | None, columns: int) -> list[tuple[int, Tensor, Tensor | None]]:
    """Some rows of the head at a time, and where they begin."""
    weights: Sequence[Tensor] = torch.split(weight, columns)
    biases: Sequence[Tensor | None] = [None] * len(weights)
    if bias is not None:
        biases = torch.split(bias, columns)
    return [(number * columns, *both) for number, both in enumerate(zip(weights, biases, strict=True))]


def _multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = h·Wᵀ + b."""
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left·right, in the dtype of the total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _check(hidden: Tensor, head: Head, targets: Tensor, soft: SoftTargets | None, ignore: int) -> None:
    if hidden.ndim != 2 or head.weight.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(f"Hidden states {tuple(hidden.shape)} do not fit a head {tuple(head.weight.shape)}.")
    rows, vocabulary = len(hidden), len(head.weight)
    if not hidden.is_floating_point():
        raise ValueError(f"Hidden states are floating-point numbers, not {hidden.dtype}.")
    parts = {"weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
    for name, part in parts.items():
        if part.dtype != hidden.dtype:
            raise ValueError(f"The {name} is {part.dtype}, the hidden states are {hidden.dtype}.")
    if not vocabulary or (head.bias is not None and head.bias.shape != (vocabulary,)):
        raise ValueError(f"A head of {vocabulary} tokens has another bias, or none at all.")
    if head.weight.stride(-1) != 1:
        raise ValueError("The rows of the weight must be contiguous.")
    if not 0 < head.scale < float("inf") or not (head.cap is None or 0 < head.cap < float("inf")):
        raise ValueError(f"Logits are scaled and capped by positive numbers, not {head.scale} and {head.cap}.")
    require_targets(targets, rows, vocabulary, ignore)
    others = {**parts, "targets": targets}
    if soft is not None:
        if soft.tokens.ndim != 2 or len(soft.tokens) != rows or not soft.tokens.shape[1]:
            raise ValueError(f"{rows} rows need as many rows of the teacher's tokens, not {tuple(soft.tokens.shape)}.")
        if soft.tokens.dtype != torch.int64 or soft.logits.shape != soft.tokens.shape:
            raise ValueError("The teacher's tokens are int64, and each has a logit.")
        if not 0 < soft.temperature < float("inf") or not 0 <= soft.weight <= 1:
            raise ValueError(f"A temperature of {soft.temperature} and a weight of {soft.weight} make no loss.")
        require_tokens(soft.tokens, vocabulary)
        others |= {"teacher's tokens": soft.tokens, "teacher's logits": soft.logits}
    for name, part in others.items():
        if part.device != hidden.device:
            raise ValueError(f"The {name} are on {part.device}, the hidden states on {hidden.device}.")
