"""The passes over memory of `kernels.fused_lora`: everything but the products with W.

Each reads or writes a tensor of T rows once: z → scale·(D∘z)·factorᵀ, and, stripe by stripe of its columns, whichever
of bias + D∘(h·factor), scale·z·factorᵀ and hᵀ·(D∘z) is wanted. A factor is [r, c], A or Bᵀ. Sums are float32, those of
several programs added afterwards.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from kernels.dispatch import interpreted, triton_is_there

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
BOTH = Tile(columns=128, stages=3, programs=264, warps=8)  # an expansion and a gradient, or a gradient alone
JOINT = Tile(columns=256, stages=3, programs=132)  # k and ∂B

if triton_is_there():
    import triton
    import triton.language as tl

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
class Dropout:
    """D: of each element's 16 bits, drawn from the seed [1] on the device, those below the threshold are dropped."""

    seed: Tensor
    threshold: int

    @classmethod
    def drawn(cls, p: float, device: torch.device) -> "Dropout | None":
        """With the probability p, its seed from the device's generator; None where nothing is dropped."""
        threshold = min(round(p * 2**16), 2**16 - 1)
        return cls(torch.randint(2**62, (1,), device=device), threshold) if threshold else None

    @property
    def share_kept(self) -> float:
        """q."""
        return 1 - self.threshold / 2**16


def shrink(z: Tensor, factor: Tensor, scale: float, dropout: Dropout | None = None) -> Tensor:
    """scale·(D∘z)·factorᵀ for z [T, c] and a factor [r, c]: [T, r], of z's dtype."""
    (tokens, columns), rank = z.shape, len(factor)
    if dropout is None and _is_for_cublas(z, rank):
        return torch.addmm(z.new_empty(()), z, factor.T, beta=0, alpha=scale)
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
    k: Tensor, factor: Tensor, z: Tensor, dropout: Dropout | None, wanted: tuple[bool, bool] = (True, True)
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
    if len(factor) > _JOINT_RANK and z.dtype.itemsize == 2 and _is_for_cublas(z, len(factor)):
        return shrink(z, factor, scale), torch.mm(h.T, z, out_dtype=torch.float32)
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
    dropout: Dropout | None = None,
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


def _is_for_cublas(z: Tensor, rank: int) -> bool:
    """Whether cuBLAS shrinks z, in rows that begin on 16 bytes, as fast as memory is read."""
    return z.is_cuda and (rank * z.element_size()) % 16 == 0


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
