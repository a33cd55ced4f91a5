"""What kernels over packed bits share: how bits are read, how bytes become many numbers at once, what is refused.

Bits lie in bytes, the first in the lowest (NumPy's `bitorder="little"`), row after row with nothing between rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import interpreted, runs_on_triton, triton_is_there

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of numbers; others are computed by PyTorch alone
PIECE = 1 << 15  # bytes of packed bits that PyTorch expands at a time: what comes of them stays in the cache
# Of a matrix that is expanded and multiplied at a time: fewer would cost calls, more would leave the cache.
_BLOCK_ELEMENTS, _CUDA_BLOCK_ELEMENTS = 1 << 20, 1 << 24
_WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # by bytes


@dataclass(frozen=True)
class Tile:
    """What one program of a product on a GPU multiplies.

    Args:
        rows: of the matrix: a multiple of 16.
        tokens: a multiple of 8. All of them are multiplied, whether they are there or not.
        words: of 32 columns that a thread reads at a time: 1, 2 or 4. Where rows have no such words, it reads fewer.
        warps: among which the columns are divided; fewer where there are fewer columns.
    """

    rows: int
    tokens: int
    words: int
    warps: int


@dataclass(frozen=True)
class Tiles:
    """By how many tokens there are: each number of tokens has the first tile that is for so many.

    One token costs least where many programs read a few rows each, as all its inputs are few bytes. Every program reads
    all inputs, so that the more tokens there are, the more rows it should have. Where a matrix has too few rows for a
    GPU to be busy, a tile has fewer, 16 at least. More tokens than all tiles are for are multiplied by PyTorch, by a
    matrix that is made dense piece by piece: its bytes are written and read in the cache.

    Args:
        by_tokens: the most tokens, and their tile; in ascending order.
        programs: that keep a GPU busy.
    """

    by_tokens: tuple[tuple[int, Tile], ...] = (
        (2, Tile(rows=16, tokens=8, words=4, warps=4)),
        (8, Tile(rows=32, tokens=8, words=4, warps=8)),
        (64, Tile(rows=64, tokens=16, words=2, warps=8)),
    )
    programs: int = 128

    @property
    def most_tokens(self) -> int:
        """That a tile is for."""
        return self.by_tokens[-1][0]


TILES = Tiles()

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

    @triton.jit  # type: ignore[untyped-decorator]
    def places(ROWS: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Rows of this program, and runs of words in them, of the first step: both [ROWS/8 · PARTS · 8 · 4, 1].

        Four threads share a row of the tensor cores' operands, eight times four are a warp, and PARTS warps have
        columns of their own. So each thread reads the words whose bits it multiplies by, and none passes on any.
        """
        place = tl.arange(0, ROWS * PARTS * 4)[:, None]
        row = place // (32 * PARTS) * 8 + place // 4 % 8
        return tl.program_id(0).to(tl.int64) * ROWS + row, place // 32 % PARTS * 4 + place % 4

    @triton.jit  # type: ignore[untyped-decorator]
    def run_of_words(mask, row, run, m, k, runs, size, WHOLE: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
        """The words […, WORDS] (uint32) of a mask in these rows and runs; 0 beyond the last row or column."""
        inside = (row < m) & (run < runs)
        if WHOLE:
            word = (row * runs + run) * WORDS + tl.arange(0, WORDS)[None, :]
            found = tl.load(mask.to(tl.pointer_type(tl.uint32)) + word, mask=inside, other=0)
        else:
            found = words(mask, row * k + 32 * run, inside, size, WHOLE)
        return found

    @triton.jit  # type: ignore[untyped-decorator]
    def as_weights(low, high, bits: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Weights [PARTS, ROWS, 128·WORDS] of 16 bits, of all `places`' words, [ROWS/8 · PARTS · 32, WORDS].

        The two halves of `low` have what belongs to the columns 2q and 2q + 1 of 32, for q = 0 … 7, those of `high` to
        16 + 2q and 17 + 2q. A shift to the left by 14 − 2q brings it to the `bits` of a weight that are not always 0.

        In which order a product sums does not matter: this one, also that of `as_inputs`, is such that every thread has
        all its weights and inputs where the tensor cores want them.
        """
        count: tl.constexpr = low.shape[1]
        shift = (14 - 2 * tl.arange(0, 8)).to(tl.uint32)[None, None, None, :]
        pairs = (tl.join(low, high)[:, :, :, None] << shift) & (bits | bits << 16)
        pairs = pairs.reshape(ROWS // 8, PARTS, 8, 4, count, 4, 2, 2).permute(1, 0, 2, 4, 5, 7, 3, 6)
        left = (pairs & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
        right = (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
        return tl.join(left, right).reshape(PARTS, ROWS, count * 128)

    @triton.jit  # type: ignore[untyped-decorator]
    def as_inputs(  # type: ignore[no-untyped-def]
        x,
        step,
        k,
        n,
        x_stride,
        TOKENS: tl.constexpr,
        WORDS: tl.constexpr,
        PARTS: tl.constexpr,
        WHOLE: tl.constexpr,
    ):
        """x [PARTS, 128·WORDS, TOKENS] of the runs from `step` on: the columns in the order of `as_weights`."""
        eights: tl.constexpr = 4 * WORDS  # of columns, in a run of words
        place = tl.arange(0, TOKENS * PARTS * 4 * eights)[:, None]
        token = place // 4 % 8
        eight = (place // 32 % PARTS * 4 + place % 4) * eights + place // (32 * PARTS) % eights
        token += place // (32 * PARTS * eights) * 8
        token += tl.program_id(1).to(tl.int64) * TOKENS
        first = 8 * (step * eights + eight)
        column = first + tl.arange(0, 8)[None, :]
        # Where rows are whole words, eight columns lie all in a row or all beyond it.
        inside = (token < n) & ((first if WHOLE else column) < k)
        found = tl.load(x + token * x_stride + column, mask=inside, other=0.0)
        found = found.reshape(TOKENS // 8, eights, PARTS, 8, 4, 2, 2, 2).permute(2, 1, 6, 4, 5, 7, 0, 3)
        return found.reshape(PARTS, 32 * eights, TOKENS)

    @triton.jit
    def multiplied(weights, x, total):  # type: ignore[no-untyped-def]
        """total [B, M, N] + weights [B, M, K] · x [B, K, N], to the precision of float32.

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
    def put(y, result, m, n, ADD: tl.constexpr):  # type: ignore[no-untyped-def]
        """y[token, row] = (or +=) result [ROWS, TOKENS] of this program, where there is such a row and token."""
        row = tl.program_id(0).to(tl.int64) * result.shape[0] + tl.arange(0, result.shape[0])[:, None]
        token = tl.program_id(1).to(tl.int64) * result.shape[1] + tl.arange(0, result.shape[1])[None, :]
        place, there = token * m + row, (row < m) & (token < n)
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
    elements = _CUDA_BLOCK_ELEMENTS if y.is_cuda else _BLOCK_ELEMENTS
    each = max(elements // max(k, 1) // 8, 1) * 8
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

    Args:
        kernel: takes x, the bits, y, m, k, n, x's stride, runs of words in a row, bytes of the bits, the numbers; ADD,
            WHOLE, and those of a `Tile`.
        y: contiguous.
        x: of any strides; at most `TILES.most_tokens` tokens.
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
    whole = as_words(k, *bits)
    # Inputs of 32 bits are three of 16 to the tensor cores, and a thread has no room for many.
    tile = tile_of(m, k, n, most_words=4 if whole and x.element_size() == 2 else 1)
    # A kernel is launched on the current device, whatever its arguments are on.
    with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
        kernel[(triton.cdiv(m, tile.rows), triton.cdiv(n, tile.tokens))](
            x,
            *bits,
            y,
            m,
            k,
            n,
            x.stride(0),
            triton.cdiv(k, 32 * tile.words),
            len(bits[0]),
            *numbers,
            ADD=add,
            WHOLE=whole,
            ROWS=tile.rows,
            TOKENS=tile.tokens,
            WORDS=tile.words,
            PARTS=tile.warps,
            num_warps=tile.warps,
            num_stages=1,  # threads read for themselves; how many there are hides how long that takes
        )


def tile_of(m: int, k: int, n: int, most_words: int) -> Tile:
    """The tile for n tokens and a matrix [m, k]: of `TILES`, smaller where m or k do not fill it.

    Args:
        m: rows.
        k: columns.
        n: tokens, at most `TILES.most_tokens`.
        most_words: that a thread may read at a time.
    """
    tile = next(tile for most, tile in TILES.by_tokens if n <= most)
    rows, words = tile.rows, min(tile.words, most_words)
    while rows > 16 and -(-m // rows) * -(-n // tile.tokens) < TILES.programs:
        rows //= 2
    while words > 1 and k % (32 * words):
        words //= 2
    warps = min(tile.warps, 1 << (-(-k // (128 * words)) - 1).bit_length())
    return replace(tile, rows=rows, words=words, warps=warps)
