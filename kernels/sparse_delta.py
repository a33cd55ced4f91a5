"""A few entries of a weight that train: applied beside the weight, and their gradient without the weight's.

For W ∈ ℝ^{m×n} frozen, S = scatter(η, δ) with k distinct places η and values δ, x ∈ ℝ^{T×n}, g = ∂L/∂y ∈ ℝ^{T×m}:

    y = x(W + S)ᵀ + b,    ∂L/∂δ_e = Σ_t g[t, row_e]·x[t, col_e],    ∂L/∂x = g(W + S)

Source: SpIEL (arXiv 2401.16405), which takes the gradient of all of W and keeps k entries of it. Here only these are
computed, k·T products where that took m·n·T, by whichever of two is faster:

*entry by entry*: a *sampled* product. Tokens lie side by side in transposed copies of x and g, so that an entry reads
two rows of them; entries are sorted, so that those of one row of W read the same row of g. On a GPU programs share
out entries, not rows, as growth crowds them in a few rows, and go through the tokens in parts that the L2 cache holds;
the parts' sums are added in a fixed order. On the CPU it is torch's `sampled_addmm`.
*in blocks of rows*: a dense product of some rows of W at a time, of which k entries are kept. Tensor cores are so fast
that this wins from a few entries in a thousand on; no more than a block is ever in memory.

Forward, W + S is made for the product and dropped, which is cheap for many tokens; for few, x·Sᵀ is added to x·Wᵀ. All
sums are float32 (float64 for float64), in the same order in every run.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels.dispatch import triton_is_there
from kernels.packed_bits import flattened, on_triton
from kernels.sparse_plan import SparsePlan

Watch = Callable[[Tensor, Tensor], None]  # is shown [T, m] and [T, n], of which ∂L/∂W is the product, in backward

_DENSEST = {"cpu": 0.15, "cuda": 0.007}  # up to where entry by entry is faster
_CACHED = 24 << 20  # bytes of x and g that programs go through together
_TILE = 64  # of a transposition
_ENTRIES, _TOKENS, _WARPS = 16, 128, 4  # of the sampled product
_PRODUCT_ROWS, _PRODUCT_ELEMENTS = 16, 4096  # of the sparse product; rows × entries × tokens

if triton_is_there():
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def _transpose(  # type: ignore[no-untyped-def]
        x, out, tokens, features, padded, x_stride, x_step, TILE: tl.constexpr
    ):
        token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        feature = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
        there = (token < tokens)[:, None] & (feature < features)[None, :]
        tile = tl.load(x + token[:, None] * x_stride + feature[None, :] * x_step, mask=there, other=0.0)
        inside = (feature < features)[:, None] & (token < padded)[None, :]
        tl.store(out + feature[:, None] * padded + token[None, :], tile.trans(), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _sample(  # type: ignore[no-untyped-def]
        g, x, rows, columns, out, k, tokens, part, ENTRIES: tl.constexpr, TOKENS: tl.constexpr
    ):
        entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
        there = entry < k
        g += tl.load(rows + entry, mask=there, other=0).to(tl.int64)[:, None] * tokens
        x += tl.load(columns + entry, mask=there, other=0).to(tl.int64)[:, None] * tokens
        total = tl.zeros([ENTRIES, TOKENS], tl.float32)
        for begin in range(tl.program_id(1) * part, min(tokens, (tl.program_id(1) + 1) * part), TOKENS):
            token = begin + tl.arange(0, TOKENS)
            inside = there[:, None] & (token < tokens)[None, :]
            left = tl.load(g + token[None, :], mask=inside, other=0.0).to(tl.float32)
            total += left * tl.load(x + token[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(out + tl.program_id(1).to(tl.int64) * k + entry, tl.sum(total, 1), mask=there)

    @triton.jit  # type: ignore[untyped-decorator]
    def _add_product(  # type: ignore[no-untyped-def]
        x,
        values,
        order,
        columns,
        starts,
        y,
        m,
        tokens,
        x_stride,
        ROWS: tl.constexpr,
        ENTRIES: tl.constexpr,
        TOKENS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        first = tl.load(starts + row, mask=row < m, other=0)
        end = tl.load(starts + row + 1, mask=row < m, other=0)
        total = tl.zeros([ROWS, TOKENS], tl.float32)
        for begin in range(0, tl.max(end - first, 0), ENTRIES):
            entry = first[:, None] + begin + tl.arange(0, ENTRIES)[None, :]
            there = entry < end[:, None]
            column = tl.load(columns + entry, mask=there, other=0).to(tl.int64)
            value = tl.load(values + tl.load(order + entry, mask=there, other=0), mask=there, other=0.0)
            place = column[:, :, None] * x_stride + token[None, None, :]
            inside = there[:, :, None] & (token < tokens)[None, None, :]
            inputs = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(value.to(tl.float32)[:, :, None] * inputs, 1)
        place = token[None, :] * m + row[:, None]
        there = (row < m)[:, None] & (token < tokens)[None, :]
        total += tl.load(y + place, mask=there, other=0.0).to(tl.float32)
        tl.store(y + place, total.to(y.dtype.element_ty), mask=there)


# -- the gradient ------------------------------------------------------------------------------------------------------


def sparse_gradient_reference(g: Tensor, x: Tensor, plan: SparsePlan) -> Tensor:
    """`sparse_gradient` through all of ∂L/∂W."""
    dense = g.T.to(_sums(g)) @ x.to(_sums(g))
    return _as_given(dense[plan.rows, plan.columns], plan)


def sparse_gradient(g: Tensor, x: Tensor, plan: SparsePlan) -> Tensor:
    """∂L/∂δ_e = Σ_t g[t, row_e]·x[t, col_e], by the faster of the two ways.

    Args:
        g: ∂L/∂y [T, m], of x's dtype and device.
        x: [T, n], of any strides.
        plan: of k entries of a matrix m × n.

    Returns:
        [k] in the order in which the places were given; float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    sparse = plan.density <= _DENSEST.get(g.device.type, 0.0)
    if g.is_cuda and not on_triton(g, g.dtype):
        sparse = False
    return sampled_gradient(g, x, plan) if sparse else blocked_gradient(g, x, plan)


def sampled_gradient(g: Tensor, x: Tensor, plan: SparsePlan) -> Tensor:
    """`sparse_gradient` entry by entry; 16-bit numbers are multiplied in float32."""
    _check_pair(g, x, plan)
    sums, k = _sums(g), len(plan.order)
    if not k or not len(x):
        return torch.zeros(k, dtype=sums, device=g.device)
    if on_triton(g, g.dtype):
        return _as_given(_launch_sample(g, x, plan), plan)
    zeros = _compressed(plan, torch.zeros(k, dtype=sums, device=g.device))
    found = torch.sparse.sampled_addmm(zeros, g.T.to(sums), x.to(sums), beta=0.0)
    return _as_given(found.values(), plan)


def blocked_gradient(g: Tensor, x: Tensor, plan: SparsePlan) -> Tensor:
    """`sparse_gradient` in blocks of rows; what is kept of a block has the precision of the inputs."""
    _check_pair(g, x, plan)
    found = torch.zeros(len(plan.order), dtype=_sums(g), device=g.device)
    places = plan.places
    for block, (begin, end) in enumerate(pairwise(plan.bounds)):
        if begin < end:
            first = block * plan.block_rows
            dense = g[:, first : first + plan.block_rows].T @ x
            found[begin:end] = dense.view(-1)[places[begin:end] - first * plan.shape[1]]
    return _as_given(found, plan)


def _launch_sample(g: Tensor, x: Tensor, plan: SparsePlan) -> Tensor:
    """[k], sorted."""
    k = len(plan.order)
    with torch.cuda.device_of(g):  # type: ignore[no-untyped-call]
        left, right = _feature_major(g), _feature_major(x)
        tokens = left.shape[1]
        part = max(_CACHED // (sum(plan.shape) * g.element_size()) // _TOKENS, 1) * _TOKENS
        parts = triton.cdiv(tokens, part)
        found = torch.empty(parts, k, dtype=torch.float32, device=g.device)
        # Programs of one part of the tokens come first: what they read stays in the cache.
        _sample[(triton.cdiv(k, _ENTRIES), parts)](
            left,
            right,
            plan.rows,
            plan.columns,
            found,
            k,
            tokens,
            part,
            ENTRIES=_ENTRIES,
            TOKENS=_TOKENS,
            num_warps=_WARPS,
        )
    return found[0] if parts == 1 else found.sum(0)


def _feature_major(x: Tensor) -> Tensor:
    """[T, n] as [n, T'], T' the next multiple of 16, zeros beyond T: rows of it begin where 16 bytes do."""
    tokens, features = x.shape
    padded = -(-tokens // 16) * 16
    out = x.new_empty(features, padded)
    grid = triton.cdiv(padded, _TILE), triton.cdiv(features, _TILE)
    _transpose[grid](x, out, tokens, features, padded, *x.stride(), TILE=_TILE)
    return out


def _as_given(found: Tensor, plan: SparsePlan) -> Tensor:
    return torch.empty_like(found).scatter_(0, plan.order, found)


# -- the product -------------------------------------------------------------------------------------------------------


def add_sparse_product(y: Tensor, x: Tensor, values: Tensor, plan: SparsePlan) -> None:
    """y += x·Sᵀ in place, without a gradient.

    Args:
        y: [T, m], contiguous, of x's dtype and device.
        x: [T, n].
        values: δ [k], in the order in which the places were given.
        plan: of k entries of a matrix m × n.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; y has gaps.
    """
    _check_pair(y, x, plan, values)
    if not y.is_contiguous():
        raise ValueError("y must be contiguous.")
    if not len(plan.order) or not len(x):
        return
    if on_triton(y, y.dtype):
        _launch_product(y, x, values, plan)
        return
    S = _compressed(plan, values.detach()[plan.order].to(_sums(x)))
    with torch.autocast(y.device.type, enabled=False):  # which would multiply in a dtype that sparse products lack
        y += (S @ x.T.to(S.dtype)).T


def _launch_product(y: Tensor, x: Tensor, values: Tensor, plan: SparsePlan) -> None:
    m = plan.shape[0]
    tokens = min(triton.next_power_of_2(len(x)), 64)
    with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
        features = _feature_major(x)
        _add_product[(triton.cdiv(m, _PRODUCT_ROWS), triton.cdiv(len(x), tokens))](
            features,
            values.detach().contiguous(),
            plan.order,
            plan.columns,
            plan.starts,
            y,
            m,
            len(x),
            features.shape[1],
            ROWS=_PRODUCT_ROWS,
            ENTRIES=_PRODUCT_ELEMENTS // (_PRODUCT_ROWS * tokens),
            TOKENS=tokens,
        )


def summed(weight: Tensor, values: Tensor, plan: SparsePlan) -> Tensor:
    """A copy of W [m, n] with S added, in the wider of their dtypes and rounded once to W's."""
    flat = weight.detach().clone(memory_format=torch.contiguous_format).view(-1)
    place = plan.places
    both = flat[place] + values.detach()[plan.order]
    return flat.scatter_(0, place, both.to(flat.dtype)).view(weight.shape)


class _SparseLinear(torch.autograd.Function):
    """W + S is made again in backward instead of kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: SparsePlan,
        transposed: bool,
        watch: Watch | None,
    ) -> Tensor:
        ctx.save_for_backward(x, values, weight)
        ctx.plan, ctx.transposed, ctx.watch = plan, transposed, watch
        return _product(x, values, weight, plan, transposed, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, values, weight = ctx.saved_tensors
        for_x = for_values = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = _product(g, values, weight, ctx.plan, not ctx.transposed, None)
        if ctx.needs_input_grad[1]:
            left, right = (flattened(side) for side in ((x, g) if ctx.transposed else (g, x)))
            for_values = sparse_gradient(left, right, ctx.plan).to(values.dtype)
            if ctx.watch is not None:
                ctx.watch(left, right)
        if ctx.needs_input_grad[3]:
            for_bias = flattened(g).sum(0)
        return for_x, for_values, None, for_bias, None, None, None


def sparse_linear_reference(
    x: Tensor, values: Tensor, weight: Tensor, plan: SparsePlan, bias: Tensor | None = None
) -> Tensor:
    """`sparse_linear` with all of S in memory, left to autograd."""
    flat = torch.zeros_like(weight, dtype=values.dtype).index_put((plan.rows, plan.columns), values[plan.order])
    return functional.linear(x, (weight + flat).to(x.dtype), bias)


def sparse_linear(
    x: Tensor,
    values: Tensor,
    weight: Tensor,
    plan: SparsePlan,
    bias: Tensor | None = None,
    transposed: bool = False,
    watch: Watch | None = None,
) -> Tensor:
    """y = x(W + S)ᵀ + b; gradients reach x, δ and b, and W has none.

    Args:
        x: [..., n], of a floating dtype, in which products are taken.
        values: δ [k], in the order in which the places were given.
        weight: W [m, n], of any floating dtype.
        plan: of k entries of W.
        bias: [m].
        transposed: whether it is y = x(W + S) + b, of x [..., m] and b [n].
        watch: is shown g and x (transposed: x and g), flat, when the gradient of δ is taken.

    Returns:
        [..., m], of x's dtype (transposed: [..., n]).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if weight.shape != plan.shape:
        raise ValueError(f"The plan is for a matrix {plan.shape}, the weight is {tuple(weight.shape)}.")
    _check(x, plan, plan.shape[0 if transposed else 1], values)
    outputs = plan.shape[1 if transposed else 0]
    for name, part in {"weight": weight, **({} if bias is None else {"bias": bias})}.items():
        if not part.is_floating_point():
            raise ValueError(f"The {name} must be of a floating dtype, not {part.dtype}.")
        if part.device != x.device:
            raise ValueError(f"x is on {x.device}, the {name} on {part.device}.")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"The bias is {tuple(bias.shape)}; {outputs:,} outputs need as many numbers.")
    result: Tensor = _SparseLinear.apply(x, values, weight, bias, plan, transposed, watch)  # type: ignore[no-untyped-call]
    return result


def _product(
    x: Tensor, values: Tensor, weight: Tensor, plan: SparsePlan, transposed: bool, bias: Tensor | None
) -> Tensor:
    """x(W + S)ᵀ + b by the way that moves less: W + S costs m·n numbers, x·Sᵀ S itself and a part of it a token."""
    k, m = len(plan.order), plan.shape[1 if transposed else 0]
    flat = flattened(x)
    if 2 * k + len(flat) * (k / 3 + 4 * m) > weight.numel():
        whole = summed(weight, values, plan).to(x.dtype)
        return functional.linear(x, whole.T if transposed else whole, bias)
    y = functional.linear(flat, (weight.T if transposed else weight).to(x.dtype), bias)
    add_sparse_product(y, flat, values, plan.transposed if transposed else plan)
    return y.view(*x.shape[:-1], m)


def _compressed(plan: SparsePlan, values: Tensor) -> Tensor:
    """S with sorted `values`, as torch has it."""
    with catch_warnings():
        simplefilter("ignore")  # that the layout is new
        return torch.sparse_csr_tensor(plan.starts, plan.columns, values, plan.shape, check_invariants=False)


def _sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(x: Tensor, plan: SparsePlan, n: int, values: Tensor | None = None) -> None:
    """Refuse x [..., n] and δ [k] that do not go with a plan."""
    if x.ndim == 0 or x.shape[-1] != n:
        raise ValueError(f"x is {tuple(x.shape)}; beside a matrix {plan.shape} it needs {n:,} columns.")
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating dtype, not {x.dtype}.")
    if x.device != plan.order.device:
        raise ValueError(f"x is on {x.device}, the plan on {plan.order.device}.")
    if values is None:
        return
    if values.shape != plan.order.shape or not values.is_floating_point():
        raise ValueError(
            f"Values must be {len(plan.order):,} of a floating dtype, not {tuple(values.shape)} of {values.dtype}."
        )
    if values.device != x.device:
        raise ValueError(f"x is on {x.device}, the values on {values.device}.")


def _check_pair(y: Tensor, x: Tensor, plan: SparsePlan, values: Tensor | None = None) -> None:
    """Refuse what is no y (or g) [T, m] for x [T, n], as well."""
    _check(x, plan, plan.shape[1], values)
    if x.ndim != 2 or y.shape != (len(x), plan.shape[0]):
        raise ValueError(f"{tuple(y.shape)} and {tuple(x.shape)} are no two sides of a matrix {plan.shape}.")
    if (y.dtype, y.device) != (x.dtype, x.device):
        raise ValueError(f"One side is {y.dtype} on {y.device}, the other, x, {x.dtype} on {x.device}.")
