"""A linear layer with a low-rank update, forward and backward.

For x ∈ ℝ^{T×n}, a frozen W ∈ ℝ^{m×n} with bias b, trained A ∈ ℝ^{r×n} and B ∈ ℝ^{m×r}, a scale s and dropout's mask
D ∈ {0, 1}^{T×n}, which keeps with probability q,

    y = b + x·Wᵀ + h·Bᵀ              h = (s/q)·(D∘x)·Aᵀ          (Hu et al., arXiv 2106.09685)
    ∂x = g·W + D∘(k·A)               k = (s/q)·g·B
    ∂A = kᵀ·(D∘x)     ∂B = gᵀ·h

for the gradient g of y. The products with W take nearly all the arithmetic, everything else nearly only memory: so what
counts beside them is how often a tensor of T rows goes through memory. Here x and g are read twice each, and y and ∂x
written once before the product with W is added to them (cuBLAS's β = 1, where reading hides behind multiplying):

    forward    x → h; h → y = b + h·Bᵀ; y += x·Wᵀ          backward   g, h → k, ∂B; x, k → ∂x = D∘(k·A), ∂A; ∂x += g·W

Only x and h [T, r] are kept for the backward pass. D is drawn anew from its seed (Philox, Salmon et al., SC 2011: seven
rounds, 16 bits an element), so p is rounded to a multiple of 2⁻¹⁶. A and B are rounded to the dtype of x, as
torch.autocast rounds them; sums are float32, and are added in an order of their own: results are reproducible.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels.dispatch import runs_on_triton, triton_is_there

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # others are computed by PyTorch alone
LARGEST_RANK = 256  # of the kernels; beyond it the products are large enough for PyTorch's
_JOINT_RANK = 32  # up to it k and ∂B come from one reading of g: beyond, the parts of k would take as many bytes as g
_TOKENS = 64  # that a program takes at a time
_SCRATCH = 8192  # bytes of shared memory in which a program changes layouts


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel divides its work.

    Args:
        columns: that a program takes at a time.
        stages: how many times that is on its way from memory at once, and one.
        programs: how many keep a GPU busy; an H100 has 132 multiprocessors.
        warps: of a program.
    """

    columns: int
    stages: int
    programs: int
    warps: int = 4

    def fitted(self, rank: int, dtype: torch.dtype, dropout: bool, beside: int | None, memory: int) -> "Tile":
        """Narrower where a rank or a dtype is wide, more warps where registers must hold more, as many stages as fit.

        Args:
            rank: r.
            dtype: of all tensors.
            dropout: whether elements are dropped.
            beside: rows [r] that come from memory with each tile; None: as many as the tile has columns.
            memory: bytes that a program may share.
        """
        wide = rank > 64 or dtype.itemsize > 2
        columns = 64 if wide else self.columns
        padded = _padded(rank)
        stage = (_TOKENS * columns + padded * (beside or columns)) * dtype.itemsize
        room = (memory - padded * columns * dtype.itemsize - _SCRATCH) // stage
        return replace(
            self,
            columns=columns,
            stages=max(min(self.stages, room, 2 if dtype.itemsize > 2 else room), 1),
            warps=8 if rank > 32 or dropout else self.warps,
        )


# For 16-bit numbers and ranks up to 64. `python -m benchmarks.kernels.fused_lora --sweep` times others.
SHRINK = Tile(columns=128, stages=4, programs=132)
EXPAND = Tile(columns=128, stages=3, programs=1056)
BOTH = Tile(columns=128, stages=3, programs=264)  # an expansion and a gradient, or a gradient alone
JOINT = Tile(columns=256, stages=3, programs=132)  # k and ∂B

if triton_is_there():
    import triton
    import triton.language as tl

    from kernels.dispatch import interpreted

    _INTERPRETED = tl.constexpr(interpreted())

    @triton.jit
    def _dot(left, right, total):  # type: ignore[no-untyped-def]
        if _INTERPRETED:  # the interpreter multiplies bfloat16 as if its bits were integers
            left, right = left.to(tl.float32), right.to(tl.float32)
        return tl.dot(left, right, total, input_precision="tf32x3")

    @triton.jit  # type: ignore[untyped-decorator]
    def _place(c, r, columns, rank, BY_RANK: tl.constexpr):  # type: ignore[no-untyped-def]
        """Where a factor [r, c] has its elements [c, r]: those of a row one after the other, or those of a column."""
        return r[None, :] * columns + c[:, None] if BY_RANK else c[:, None] * rank + r[None, :]

    @triton.jit  # type: ignore[untyped-decorator]
    def _kept(seed, tokens, first, threshold, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
        """D [tokens, COLUMNS] from the column `first`, a multiple of 8; the same for an element, whatever the tiles."""
        eight = first // 8 + tl.arange(0, COLUMNS // 8)
        column = tokens[:, None] * 0 + eight[None, :]
        token = tokens[:, None] + eight[None, :] * 0
        a, b, c, d = tl.philox(seed, column, token, column * 0, column * 0, 7)
        words = tl.join(tl.join(a, b), tl.join(c, d))
        halves = tl.join(words & 0xFFFF, words >> 16)
        return halves.reshape(tokens.shape[0], COLUMNS) >= threshold

    # Batches differ in their tokens: a kernel is not to be compiled again for that.
    @triton.jit(do_not_specialize=["tokens", "threshold"])  # type: ignore[untyped-decorator]
    def _shrink(  # type: ignore[no-untyped-def]
        z,
        factor,
        seed,
        out,
        tokens,
        columns,
        rank,
        z_stride,
        part,
        scale,
        threshold,
        DROPOUT: tl.constexpr,
        BY_RANK: tl.constexpr,
        RANK: tl.constexpr,
        TOKENS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """out[part, t, :] = scale·(D∘z)·factorᵀ over a part of the columns."""
        t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        r = tl.arange(0, RANK)
        begin = tl.program_id(1) * part
        total = tl.zeros([TOKENS, RANK], tl.float32)
        for first in range(begin, min(begin + part, columns), COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            tile = tl.load(
                z + t.to(tl.int64)[:, None] * z_stride + c[None, :],
                mask=(t < tokens)[:, None] & (c < columns)[None, :],
                other=0.0,
            )
            if DROPOUT:
                tile = tl.where(_kept(tl.load(seed), t, first, threshold, COLUMNS), tile, 0.0)
            rows = tl.load(
                factor + _place(c, r, columns, rank, BY_RANK),
                mask=(c < columns)[:, None] & (r < rank)[None, :],
                other=0.0,
            )
            total = _dot(tile, rows, total)
        place = (tl.program_id(1).to(tl.int64) * tokens + t)[:, None] * rank + r[None, :]
        tl.store(
            out + place,
            (total * scale).to(out.dtype.element_ty),
            mask=(t < tokens)[:, None] & (r < rank)[None, :],
        )

    @triton.jit(do_not_specialize=["tokens", "part", "threshold"])  # type: ignore[untyped-decorator]
    def _stripe(  # type: ignore[no-untyped-def]
        z,
        factor,
        h,
        bias,
        seed,
        expanded,
        shrunk,
        gradient,
        tokens,
        columns,
        rank,
        z_stride,
        part,
        scale,
        threshold,
        EXPAND: tl.constexpr,
        SHRINK: tl.constexpr,
        GRADIENT: tl.constexpr,
        BIAS: tl.constexpr,
        DROPOUT: tl.constexpr,
        BY_RANK: tl.constexpr,
        RANK: tl.constexpr,
        TOKENS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """Of a stripe of columns c and a part of the tokens t, in one reading of z, whichever of

        expanded[t, c] = bias + D∘(h·factor),  shrunk[c, t, :] = scale·z·factorᵀ,  gradient[t] = hᵀ·(D∘z).
        """
        first = tl.program_id(0) * COLUMNS
        c = first + tl.arange(0, COLUMNS)
        r = tl.arange(0, RANK)
        within = (c < columns)[:, None] & (r < rank)[None, :]
        at = _place(c, r, columns, rank, BY_RANK)
        begin = tl.program_id(1) * part
        total = tl.zeros([COLUMNS, RANK], tl.float32)
        if EXPAND or SHRINK:
            rows = tl.load(factor + at, mask=within, other=0.0)
        if BIAS:
            shift = tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)
        for start in range(begin, min(begin + part, tokens), TOKENS):
            t = start + tl.arange(0, TOKENS)
            there = (t < tokens)[:, None] & (c < columns)[None, :]
            of_rank = (t < tokens)[:, None] & (r < rank)[None, :]
            place = t.to(tl.int64)[:, None] * rank + r[None, :]
            if DROPOUT:
                kept = _kept(tl.load(seed), t, first, threshold, COLUMNS)
            if EXPAND or GRADIENT:
                low = tl.load(h + place, mask=of_rank, other=0.0)
            if SHRINK or GRADIENT:
                tile = tl.load(z + t.to(tl.int64)[:, None] * z_stride + c[None, :], mask=there, other=0.0)
                if DROPOUT:
                    tile = tl.where(kept, tile, 0.0)
            if EXPAND:
                update = _dot(low, rows.trans(), tl.zeros([TOKENS, COLUMNS], tl.float32))
                if BIAS:
                    update += shift[None, :]
                if DROPOUT:
                    update = tl.where(kept, update, 0.0)
                at_token = t.to(tl.int64)[:, None] * columns + c[None, :]
                tl.store(expanded + at_token, update.to(expanded.dtype.element_ty), mask=there)
            if SHRINK:
                product = _dot(tile, rows, tl.zeros([TOKENS, RANK], tl.float32)) * scale
                tl.store(shrunk + tl.program_id(0).to(tl.int64) * tokens * rank + place, product, mask=of_rank)
            if GRADIENT:
                total = _dot(tile.trans(), low, total)
        if GRADIENT:
            tl.store(gradient + tl.program_id(1).to(tl.int64) * rank * columns + at, total, mask=within)


@dataclass(frozen=True, slots=True)
class _Dropout:
    """D: of each element's 16 bits, drawn from the seed [1] on the device, those below the threshold are dropped."""

    seed: Tensor
    threshold: int

    @classmethod
    def drawn(cls, p: float, device: torch.device) -> "_Dropout | None":
        """With the probability p, its seed from the device's generator; None where nothing is dropped."""
        threshold = min(round(p * 2**16), 2**16 - 1)
        return cls(torch.randint(2**62, (1,), device=device), threshold) if threshold else None

    @property
    def share_kept(self) -> float:
        """q."""
        return 1 - self.threshold / 2**16


class _OnTriton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
    ) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        low_A, low_B = (factor.to(x.dtype).contiguous() for factor in (A, B))
        ctx.dropout = _Dropout.drawn(p, x.device)
        ctx.scale = scale / ctx.dropout.share_kept if ctx.dropout else scale
        ctx.dtypes = A.dtype, B.dtype
        h = shrink(x, low_A, ctx.scale, ctx.dropout)
        y = expand(h, low_B.T, bias)
        ctx.save_for_backward(x, W, low_A, low_B, h)
        return y.addmm_(x, W.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        to_x, _, _, to_A, to_B, _, _ = ctx.needs_input_grad
        g = upstream[0] if upstream[0].stride(1) == 1 else upstream[0].contiguous()
        k, of_B = shrink_with_gradient(g, B.T, h, ctx.scale, wanted=to_B)
        of_x, of_A = expand_with_gradient(k, A, x, ctx.dropout, wanted=(to_x, to_A))
        if of_x is not None:
            of_x.addmm_(g, W)
        return (
            of_x,
            None,
            None,
            None if of_A is None else of_A.to(ctx.dtypes[0]),
            None if of_B is None else of_B.T.to(ctx.dtypes[1]),
            None,
            None,
        )


class _InPytorch(torch.autograd.Function):
    """The same equations as products that are added where their sum goes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
    ) -> Tensor:
        low_A, low_B = A.to(x.dtype), B.to(x.dtype)
        ctx.scale, ctx.p, ctx.dtypes = scale, p, (A.dtype, B.dtype)
        ctx.random = _generator(x.device).get_state() if p else None
        dropped = x * _noise(x, p, _generator(x.device)) if p else x
        h = (dropped @ low_A.T).mul_(scale)
        y = functional.linear(x, W, bias).addmm_(h, low_B.T)
        ctx.save_for_backward(x, W, low_A, low_B, h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        to_x, _, _, to_A, to_B, _, _ = ctx.needs_input_grad
        (g,) = upstream
        k = (g @ B).mul_(ctx.scale)
        noise = None
        if ctx.p:
            generator = torch.Generator(x.device)
            generator.set_state(ctx.random)
            noise = _noise(x, ctx.p, generator)
        of_x = None
        if to_x:
            of_x = g @ W
            if noise is None:
                of_x.addmm_(k, A)
            else:
                of_x.addcmul_(k @ A, noise)
        of_A = (k.T @ (x if noise is None else x * noise)).to(ctx.dtypes[0]) if to_A else None
        of_B = (g.T @ h).to(ctx.dtypes[1]) if to_B else None
        return of_x, None, None, of_A, of_B, None, None


def fused_lora_reference(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """`fused_lora`, term by term."""
    update = functional.dropout(x, dropout) @ A.to(x.dtype).T @ B.to(x.dtype).T
    return functional.linear(x, W, bias) + scale * update


def fused_lora(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """y = b + x·Wᵀ + s·dropout(x)·Aᵀ·Bᵀ, with gradients for x, A and B; W and b are frozen.

    Computed in the dtype of x, whatever torch.autocast says.

    Args:
        x: [..., n], of any strides.
        W: [m, n], of x's dtype and any strides: a transposed one is as fast.
        bias: [m] of x's dtype, or None.
        A: [r, n], of any floating dtype, as is B.
        B: [m, r].
        scale: s.
        dropout: p, the probability with which each element of x is dropped on its way to A; whether a model is in
            training is the caller's to know. The mask is drawn from the generator of x's device.

    Returns:
        [..., m], contiguous, of x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, W or b wants a gradient, or dropout is not in [0, 1).
    """
    check_lora(x, W, bias, A, B, dropout)
    function = _OnTriton if _fits_kernels(x, A, B) else _InPytorch
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = function.apply(  # type: ignore[no-untyped-call]
            x.reshape(prod(x.shape[:-1]), x.shape[-1]), W, bias, A, B, scale, dropout
        )
    return y.view(*x.shape[:-1], len(W))


def _fits_kernels(x: Tensor, A: Tensor, B: Tensor) -> bool:
    return (
        runs_on_triton(x)
        and x.dtype in KERNEL_DTYPES
        and 1 <= len(A) <= LARGEST_RANK
        and x.numel() > 0
        and len(B) > 0
        and max(x.numel() // x.shape[-1], A.numel(), B.numel()) < 2**31  # places that are counted in 32 bits
    )


def check_lora(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, dropout: float) -> None:
    """Refuse what is no LoRA of a linear layer for x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, W or b wants a gradient, or dropout is not in [0, 1).
    """
    if x.ndim == 0 or W.ndim != 2 or x.shape[-1] != W.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}, which no W of shape {tuple(W.shape)} can be applied to.")
    m, n = W.shape
    if A.ndim != 2 or A.shape[1] != n or B.shape != (m, len(A)):
        raise ValueError(
            f"W {m} × {n} needs A of shape (r, {n}) and B of shape ({m}, r), not {tuple(A.shape)} and {tuple(B.shape)}."
        )
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"The bias of {m} outputs is not of shape {tuple(bias.shape)}.")
    if not {x.dtype, A.dtype, B.dtype} <= {*KERNEL_DTYPES, torch.float64}:
        raise ValueError(f"x, A and B cannot be {x.dtype}, {A.dtype} and {B.dtype}: only floats of 16 to 64 bits.")
    if any(tensor.dtype != x.dtype for tensor in (W, bias) if tensor is not None):
        raise ValueError(f"W and its bias must be of x's dtype, {x.dtype}; W is {W.dtype}.")
    if any(tensor.device != x.device for tensor in (W, bias, A, B) if tensor is not None):
        raise ValueError(f"x is on {x.device}, but not all of W, its bias, A and B.")
    if W.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("W and its bias are frozen here: they get no gradient.")
    if not 0 <= dropout < 1:
        raise ValueError(f"Dropout is a probability below 1, not {dropout}.")


def _generator(device: torch.device) -> torch.Generator:
    """The one that PyTorch's own dropout draws from."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def _noise(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """D/q, drawn as `functional.dropout` draws it on the CPU."""
    noise = torch.empty_like(x, memory_format=torch.contiguous_format)
    return noise.bernoulli_(1 - p, generator=generator).div_(1 - p)


# -- the passes over memory, each by itself ----------------------------------------------------------------------------


def shrink(z: Tensor, factor: Tensor, scale: float, dropout: _Dropout | None = None) -> Tensor:
    """scale·(D∘z)·factorᵀ for z [T, c] and a factor [r, c]: [T, r], of z's dtype."""
    (tokens, columns), rank = z.shape, len(factor)
    tile = SHRINK.fitted(rank, z.dtype, dropout is not None, None, _shared_memory(z.device))
    programs = triton.cdiv(tokens, _TOKENS)
    # Few tokens: the columns are divided among several programs, whose sums are added afterwards.
    parts = max(min(tile.programs // programs, triton.cdiv(columns, 4 * tile.columns)), 1)
    part = triton.cdiv(triton.cdiv(columns, tile.columns), parts) * tile.columns
    parts = triton.cdiv(columns, part)
    out = torch.empty(parts, tokens, rank, dtype=z.dtype if parts == 1 else torch.float32, device=z.device)
    with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
        _shrink[(programs, parts)](
            z,
            factor,
            dropout.seed if dropout else z,
            out,
            tokens,
            columns,
            rank,
            z.stride(0),
            part,
            scale,
            dropout.threshold if dropout else 0,
            DROPOUT=dropout is not None,
            BY_RANK=_by_rank(factor),
            RANK=_padded(rank),
            TOKENS=_TOKENS,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out[0] if parts == 1 else out.sum(0).to(z.dtype)


def expand(h: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """bias + h·factor for h [T, r] and a factor [r, c]: [T, c], of h's dtype."""
    out = h.new_empty(len(h), factor.shape[1])
    _launch_stripes(EXPAND, None, factor, h, expanded=out, bias=bias)
    return out


def expand_with_gradient(
    k: Tensor, factor: Tensor, z: Tensor, dropout: _Dropout | None, wanted: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """D∘(k·factor), of k's dtype, and kᵀ·(D∘z), float32 in the factor's strides, in one reading of z [T, c]."""
    out = torch.empty_like(z, memory_format=torch.contiguous_format) if wanted[0] else None
    return out, _launch_stripes(BOTH, z, factor, k, expanded=out, gradient=wanted[1], dropout=dropout)


def shrink_with_gradient(
    z: Tensor, factor: Tensor, h: Tensor, scale: float, *, wanted: bool = True
) -> tuple[Tensor, Tensor | None]:
    """scale·z·factorᵀ, of z's dtype, and hᵀ·z, float32 in the factor's strides: of low rank, in one reading of z."""
    if not wanted:
        return shrink(z, factor, scale), None
    if len(factor) > _JOINT_RANK or z.dtype.itemsize > 2:
        return shrink(z, factor, scale), _launch_stripes(BOTH, z, factor, h, gradient=True)
    stripes = triton.cdiv(z.shape[1], JOINT.columns)
    shrunk = torch.empty(stripes, len(z), len(factor), dtype=torch.float32, device=z.device)
    gradient = _launch_stripes(JOINT, z, factor, h, shrunk=shrunk, gradient=True, scale=scale)
    return shrunk.sum(0).to(z.dtype), gradient


def _launch_stripes(
    tile: Tile,
    z: Tensor | None,
    factor: Tensor,
    h: Tensor,
    *,
    expanded: Tensor | None = None,
    shrunk: Tensor | None = None,
    gradient: bool = False,
    bias: Tensor | None = None,
    dropout: _Dropout | None = None,
    scale: float = 1.0,
) -> Tensor | None:
    """Launch `_stripe` for what is given to be filled; the gradient, where it is wanted, is returned."""
    (rank, columns), tokens = factor.shape, len(h)
    if not columns or not (expanded is not None or gradient):
        return torch.zeros_like(factor, dtype=torch.float32) if gradient else None
    tile = tile.fitted(rank, h.dtype, dropout is not None, _TOKENS, _shared_memory(h.device))
    stripes = triton.cdiv(columns, tile.columns)
    # Each part of the tokens has a gradient of its own, which are added afterwards.
    part = triton.cdiv(triton.cdiv(tokens, max(tile.programs // stripes, 1)), _TOKENS) * _TOKENS
    parts = triton.cdiv(tokens, part)
    sums = _like(factor, parts) if gradient else None
    with torch.cuda.device_of(h):  # type: ignore[no-untyped-call]
        _stripe[(stripes, parts)](
            h if z is None else z,
            factor,
            h,
            h if bias is None else bias,
            dropout.seed if dropout else h,
            h if expanded is None else expanded,
            h if shrunk is None else shrunk,
            h if sums is None else sums,
            tokens,
            columns,
            rank,
            0 if z is None else z.stride(0),
            part,
            scale,
            dropout.threshold if dropout else 0,
            EXPAND=expanded is not None,
            SHRINK=shrunk is not None,
            GRADIENT=gradient,
            BIAS=bias is not None,
            DROPOUT=dropout is not None,
            BY_RANK=_by_rank(factor),
            RANK=_padded(rank),
            TOKENS=_TOKENS,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return None if sums is None else sums.sum(0)


def _like(factor: Tensor, parts: int) -> Tensor:
    """[parts, *shape], float32, each part with the strides of the factor, which has no gaps."""
    empty = torch.empty(parts, factor.numel(), dtype=torch.float32, device=factor.device)
    return empty.as_strided((parts, *factor.shape), (factor.numel(), *factor.stride()))


def _by_rank(factor: Tensor) -> bool:
    """Whether a factor [r, c] has its rows one after the other, as A has, and not its columns, as Bᵀ."""
    return factor.is_contiguous()


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may share: 227 KiB on an H100, 99 KiB on GPUs for desktops."""
    if device.type != "cuda":
        return 2**30
    found: int = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return found


def _padded(rank: int) -> int:
    return max(1 << (rank - 1).bit_length(), 16)
