"""What kernels over packed bits share: how bits are read, how bytes become many numbers at once, what is refused.

Bits lie in bytes, the first in the lowest (NumPy's `bitorder="little"`), row after row with nothing between rows.
"""

from collections.abc import Callable, Sequence
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import interpreted, runs_on_triton, triton_is_there

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of numbers; others are computed by PyTorch alone
PIECE = 1 << 15  # bytes of packed bits that PyTorch expands at a time: what comes of them stays in the cache
_BLOCK_ELEMENTS = 1 << 20  # of a matrix that is expanded and multiplied at a time: fewer would cost calls
# Of a product on a GPU: rows and words of columns that a program multiplies at a time, and the most tokens; how many
# programs keep a GPU busy, and the fewest steps that are worth one.
_ROWS, _WORDS, _TOKEN_BYTES = 128, 4, 128
_PROGRAMS, _LEAST_STEPS = 256, 4
_WARPS, _STAGES = 4, 3
_WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # by bytes

if triton_is_there():
    import triton
    import triton.language as tl

    _INTERPRETED = tl.constexpr(interpreted())

    @triton.jit  # type: ignore[untyped-decorator]
    def words(mask, bit, inside, size, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
        """The 32 bits (uint32) from each position `bit` on, of a mask of `size` bytes; 0 where not `inside`.

        WHOLE: the mask may be read as 32-bit words, and every position is the first of one.
        """
        if WHOLE:
            pointer = mask.to(tl.pointer_type(tl.uint32))
            found = tl.load(pointer + (bit >> 5), mask=inside, other=0)
        else:
            first = bit >> 3
            shift = (bit & 7).to(tl.uint32)
            found = tl.load(mask + first, mask=inside, other=0).to(tl.uint32) >> shift
            for place in tl.static_range(1, 4):
                byte = tl.load(mask + first + place, mask=inside & (first + place < size), other=0).to(tl.uint32)
                found |= byte << (8 * place - shift)
            # Two steps, as a shift by 32 (where shift = 0) is not defined.
            byte = tl.load(mask + first + 4, mask=inside & (first + 4 < size), other=0).to(tl.uint32)
            found |= (byte << (31 - shift)) << 1
        return found

    @triton.jit
    def rotated(word, by):  # type: ignore[no-untyped-def]
        """`word` (uint32) rotated to the right by 0 … 31 bits: so written, it becomes one instruction (SHF.R.U64)."""
        twice = word.to(tl.uint64) | (word.to(tl.uint64) << 32)
        return (twice >> by).to(tl.uint32)

    @triton.jit  # type: ignore[untyped-decorator]
    def paired(pairs, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
        """Numbers of 16 bits from words [M, W, 16] that hold two each: [M, 32·W], for a product with `as_paired`.

        In which order a product sums does not matter. This one gives each of the four threads that share a row in the
        tensor cores' layout a word of its own, so that by how much it is shifted is known when the kernel is compiled.
        """
        low = (pairs & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
        high = (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
        fours = tl.join(low, high).reshape(pairs.shape[0], pairs.shape[1] // 4, 4, 16, 2)
        return fours.permute(0, 1, 3, 2, 4).reshape(pairs.shape[0], pairs.shape[1] * 32)

    @triton.jit
    def as_paired(x):  # type: ignore[no-untyped-def]
        """x [N, 32·W] as [32·W, N], its columns where `paired` has them if word j of 16 holds bits j and j + 16."""
        fours = x.reshape(x.shape[0], x.shape[1] // 128, 4, 2, 16)
        return fours.permute(0, 1, 4, 2, 3).reshape(x.shape[0], x.shape[1]).trans()

    @triton.jit
    def multiplied(weights, x, total):  # type: ignore[no-untyped-def]
        """total [M, N] + weights [M, K] · x [K, N], to the precision of float32.

        The weights are small integers in 16 bits, hence exact. x in float32 is three bfloat16 numbers one after the
        other (8 bits each), so that its 24 bits, too, go through the tensor cores.
        """
        if x.dtype == tl.float32:
            first = x.to(tl.bfloat16)
            rest = x - first.to(tl.float32)
            second = rest.to(tl.bfloat16)
            third = (rest - second.to(tl.float32)).to(tl.bfloat16)
            total = _dot(weights, third, total)
            total = _dot(weights, second, total)
            total = _dot(weights, first, total)
        else:
            total = _dot(weights, x, total)
        return total

    @triton.jit
    def _dot(weights, x, total):  # type: ignore[no-untyped-def]
        if _INTERPRETED:  # the interpreter multiplies bfloat16 as if its bits were integers
            weights, x = weights.to(tl.float32), x.to(tl.float32)
        return tl.dot(weights, x, total)

    @triton.jit  # type: ignore[untyped-decorator]
    def put(y, result, rows, tokens, m, n, ADD: tl.constexpr):  # type: ignore[no-untyped-def]
        """y[token, row] = (or +=) result [rows, tokens], where there is such a row and token; y is [n, m]."""
        place = tokens[None, :] * m + rows[:, None]
        there = (rows < m)[:, None] & (tokens < n)[None, :]
        if ADD:
            result += tl.load(y + place, mask=there, other=0.0).to(tl.float32)
        tl.store(y + place, result.to(y.dtype.element_ty), mask=there)


def check_bits(bits: Tensor, size: int, what: str) -> None:
    """Refuse what is not `size` bytes in a row.

    Raises:
        ValueError: another dtype than uint8, more than one dimension, another length, or gaps between the bytes.
    """
    if bits.dtype != torch.uint8 or bits.ndim != 1:
        raise ValueError(f"{what} must be a vector of uint8, not {tuple(bits.shape)} of {bits.dtype}.")
    if len(bits) != size:
        raise ValueError(f"{what} must be {size:,} bytes long, not {len(bits):,}.")
    if not bits.is_contiguous():
        raise ValueError(f"{what} must be contiguous.")


def flattened(x: Tensor) -> Tensor:
    """[..., k] as [n, k], without its gradient."""
    return x.detach().reshape(prod(x.shape[:-1]), x.shape[-1])


def check_product(x: Tensor, shape: Sequence[int], device: torch.device, y: Tensor | None = None) -> None:
    """Refuse what is no x [..., k] for a matrix [m, k], and no y [..., m] for that x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; y is not contiguous.
    """
    if len(shape) != 2:
        raise ValueError(f"Only a matrix can be applied, not a tensor of shape {tuple(shape)}.")
    if x.ndim == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}; a matrix {tuple(shape)} needs {shape[1]:,} columns.")
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating dtype, not {x.dtype}.")
    if x.device != device:
        raise ValueError(f"x is on {x.device}, the packed matrix on {device}.")
    if y is None:
        return
    if y.shape != (*x.shape[:-1], shape[0]):
        raise ValueError(f"y is {tuple(y.shape)} where x {tuple(x.shape)} gives {(*x.shape[:-1], shape[0])}.")
    if (y.dtype, y.device) != (x.dtype, x.device):
        raise ValueError(f"y is {y.dtype} on {y.device}, x {x.dtype} on {x.device}.")
    if not y.is_contiguous():
        raise ValueError("y must be contiguous.")
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        raise ValueError("What is added in place has no gradient: apply and add, or do without (torch.no_grad).")


def on_triton(packed: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel, not PyTorch, turns these bits into numbers of that dtype."""
    return dtype in KERNEL_DTYPES and runs_on_triton(packed)


def as_words(columns: int, *bits: Tensor) -> bool:
    """Whether rows of so many columns begin with whole 32-bit words, in memory, too."""
    return columns % 32 == 0 and all(each.data_ptr() % 4 == 0 for each in bits)


def expand(table: Tensor, indices: Sequence[Tensor], out: Tensor) -> None:
    """out[(n·P + p)·e + i] = table[indices[p][n], i]: from each byte the numbers that its parts stand for.

    Up to 16 bytes of a table's row move as one wide number: on the CPU four times as fast as rows of several.

    Args:
        table: [256, e], e a power of two.
        indices: P of [bytes], uint8.
        out: contiguous [bytes·P·e].
    """
    wide = _WIDE[min(table.shape[1] * table.element_size(), 16)]
    columns = table.view(wide).T.contiguous()
    places = out.view(wide).view(-1, len(indices), len(columns))
    for part, index in enumerate(indices):
        narrow = index.int()
        for number, column in enumerate(columns):
            torch.index_select(column, 0, narrow, out=places[:, part, number])


def in_blocks(y: Tensor, x: Tensor, fill: Callable[[int, Tensor], None], *, add: bool) -> None:
    """y [n, m] = (or +=) x [n, k] · Wᵀ with a few rows of W in memory at a time.

    Args:
        y: contiguous.
        x: of y's dtype.
        fill: writes rows of W to the second argument, contiguous [rows·k], from the byte on in which the bits of their
            elements begin when W takes one bit an element; always a byte's first bit.
        add: whether to add to y.
    """
    m, k = y.shape[1], x.shape[1]
    each = max(_BLOCK_ELEMENTS // max(k, 1) // 8, 1) * 8
    block = x.new_empty(min(each, m), k)
    for begin in range(0, m, each):
        W = block[: m - begin]
        fill(begin * k // 8, W.view(-1))
        at = y[:, begin : begin + each]
        if add:
            at.addmm_(x, W.T)
        else:
            torch.mm(x, W.T, out=at)


class Product(torch.autograd.Function):
    """y = x·Wᵀ with a gradient for x, of a W that is never seen whole on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: int,
        multiply: Callable[[Tensor, Tensor], None],
        dense: Callable[[torch.dtype], Tensor],
    ) -> Tensor:
        """x [..., k] to y [..., rows]: `multiply(y, x)` fills y; `dense(dtype)` gives W [rows, k]."""
        ctx.dense = dense
        y = x.new_empty(*x.shape[:-1], rows)
        multiply(y, x)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        """∂/∂x = ∂/∂y · W."""
        return upstream[0] @ ctx.dense(upstream[0].dtype), None, None, None


def rounded(numbers: Sequence[float], dtype: torch.dtype) -> list[float]:
    """The numbers as `dtype` has them.

    Raises:
        ValueError: it is no floating dtype, or a number is not finite, or too large for it.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"Numbers must be made in a floating dtype, not {dtype}.")
    found: list[float] = torch.tensor(numbers, dtype=torch.float64).to(dtype).tolist()
    for number, result in zip(numbers, found, strict=True):
        if not isfinite(result):
            raise ValueError(f"{number:g} is no number that {dtype} has.")
    return found


def launch_product(
    kernel: Any, y: Tensor, x: Tensor, bits: Sequence[Tensor], numbers: Sequence[float], *, add: bool
) -> None:
    """Launch `kernel` for y [n, m] = (or +=) x [n, k] times a packed matrix.

    Where rows and tokens alone make too few programs for a GPU, the columns are divided among several, whose sums are
    added afterwards, always in the same order: what comes out does not depend on which program ends first.

    Args:
        kernel: takes x, the bits, y, m, k, n, x's stride, bytes of the bits, columns of a part, the numbers; ADD,
            WHOLE, ROWS, WORDS and TOKENS.
        y: contiguous.
        x: of any strides.
        bits: masks of one length.
        numbers: for the kernel.
        add: whether to add to y.
    """
    (n, k), m = x.shape, y.shape[1]
    if not n or not m:
        return
    if not k:
        if not add:
            y.zero_()
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens = min(max(triton.next_power_of_2(n), 16), _TOKEN_BYTES // x.element_size())
    programs = triton.cdiv(m, _ROWS) * triton.cdiv(n, tokens)
    steps = triton.cdiv(k, 32 * _WORDS)
    parts = max(min(_PROGRAMS // programs, steps // _LEAST_STEPS), 1)
    part = triton.cdiv(steps, parts) * 32 * _WORDS
    parts = triton.cdiv(k, part)
    target = y if parts == 1 else torch.empty(parts, n, m, dtype=torch.float32, device=y.device)
    # A kernel is launched on the current device, whatever its arguments are on.
    with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
        kernel[(triton.cdiv(m, _ROWS), triton.cdiv(n, tokens), parts)](
            x,
            *bits,
            target,
            m,
            k,
            n,
            x.stride(0),
            len(bits[0]),
            part,
            *numbers,
            ADD=add and parts == 1,
            WHOLE=as_words(k, *bits),
            ROWS=_ROWS,
            WORDS=_WORDS,
            TOKENS=tokens,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
    if parts > 1:
        total = target.sum(0)
        y.copy_(total + y if add else total)
