"""Tensors of a few levels as packed codes: made dense, and, where there are two levels, applied without being made so.

Source: Jie, Wang, Deng (ICCV 2023, arXiv 2307.16867), whose adapters keep for each number a code of b ∈ {1, 2, 4, 8}
bits, the first in the low bits of the first byte, and for each matrix 2^b levels, w = levels[code]. With one bit,

    W = low + (high − low)·bits        x·Wᵀ = (high − low)/2 · x·(2·bits)ᵀ + low · Σₖ xₖ

so that on a GPU the tensor cores multiply by 0 and 2, made of bits two at a time (see `kernels.ternary`). Sums are
float32.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kernels.dispatch import triton_is_there
from kernels.packed_bits import (
    PIECE,
    TILES,
    Product,
    check_bits,
    check_product,
    expand,
    flattened,
    in_blocks,
    launch_product,
    on_triton,
    rounded,
)

WIDTHS = (1, 2, 4, 8)  # b
_DECODED = 2048  # elements that one program makes dense

if triton_is_there():
    import triton
    import triton.language as tl

    from kernels.packed_bits import as_inputs, as_weights, multiplied, places, put, run_of_words

    @triton.jit  # type: ignore[untyped-decorator]
    def _look_up(content, levels, out, length, BITS: tl.constexpr, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
        each: tl.constexpr = 8 // BITS
        byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
        place = tl.arange(0, each)
        element = byte[:, None] * each + place[None, :]
        codes = tl.load(content + byte, mask=byte * each < length, other=0).to(tl.int32)
        code = (codes[:, None] >> (place * BITS)[None, :]) & (2**BITS - 1)
        tl.store(out + element, tl.load(levels + code), mask=element < length)

    @triton.jit  # type: ignore[untyped-decorator]
    def _multiply(  # type: ignore[no-untyped-def]
        x,
        bits,
        y,
        m,
        k,
        n,
        x_stride,
        runs,
        size,
        half,
        low_level,
        ADD: tl.constexpr,
        WHOLE: tl.constexpr,
        ROWS: tl.constexpr,
        TOKENS: tl.constexpr,
        WORDS: tl.constexpr,
        PARTS: tl.constexpr,
    ):
        sixteen: tl.constexpr = tl.bfloat16 if x.dtype.element_ty == tl.float32 else x.dtype.element_ty
        row, run = places(ROWS, PARTS)
        total = tl.zeros([PARTS, ROWS, TOKENS], tl.float32)
        # The tensor cores add up x, too: in all of 16 rows, as they have no fewer.
        full = tl.full([64 * PARTS, WORDS], 0xFFFFFFFF, tl.uint32)
        twos = as_weights(full, full, 0x4000, sixteen, 16, PARTS)
        sums = tl.zeros([PARTS, 16, TOKENS], tl.float32)
        for step in range(0, runs, 4 * PARTS):
            found = run_of_words(bits, row, step + run, m, k, runs, size, WHOLE, WORDS)
            # The bits 2q and 2q + 1 in the two halves of a word.
            low = (found & 0x5555) | ((found & 0xAAAA) << 15)
            high = ((found >> 16) & 0x5555) | ((found >> 1) & 0x55550000)
            weights = as_weights(low, high, 0x4000, sixteen, ROWS, PARTS)
            # Beyond the last column every weight is one of the next row's or 0; x is 0 there.
            inputs = as_inputs(x, step, k, n, x_stride, TOKENS, WORDS, PARTS, WHOLE)
            total = multiplied(weights, inputs, total)
            sums = multiplied(twos, inputs, sums)
        sum_of_x = tl.sum(tl.sum(sums, 0), 0) / 32
        put(y, tl.sum(total, 0) * half + sum_of_x[None, :] * low_level, m, n, ADD)


@dataclass(frozen=True, eq=False)
class PackedCodes:
    """Codes of b bits for the elements of a tensor.

    Args:
        shape: of the tensor, d elements.
        bits: b: 1, 2, 4 or 8.
        content: [⌈d·b/8⌉] bytes (uint8); what lies beyond the last code is not looked at.

    Raises:
        ValueError: there are no codes of so many bits, or the bytes are of another dtype or length.
    """

    shape: tuple[int, ...]
    bits: int
    content: Tensor

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"Codes have 1, 2, 4 or 8 bits, not {self.bits}.")
        if any(extent < 0 for extent in self.shape):
            raise ValueError(f"No tensor is of shape {self.shape}.")
        check_bits(self.content, -(-self.length * self.bits // 8), "The codes")

    @property
    def length(self) -> int:
        """d."""
        return prod(self.shape)


def decode_codes_reference(codes: PackedCodes, levels: Tensor) -> Tensor:
    """`decode_codes`, code by code."""
    first = torch.arange(codes.length, device=codes.content.device) * codes.bits
    code = (codes.content[first // 8].int() >> (first % 8)) & (2**codes.bits - 1)
    return levels.to(codes.content.device)[code].view(codes.shape)


def decode_codes(codes: PackedCodes, levels: Tensor) -> Tensor:
    """levels[code] for each code.

    Args:
        codes: of b bits.
        levels: [2^b], of the dtype that is wanted. On a GPU float32, bfloat16 and float16 are made by a kernel.

    Returns:
        A contiguous tensor of the codes' shape on their device.

    Raises:
        ValueError: there are not 2^b levels.
    """
    if levels.shape != (2**codes.bits,):
        raise ValueError(f"Codes of {codes.bits} bits need {2**codes.bits} levels, not {tuple(levels.shape)}.")
    levels = levels.detach().to(codes.content.device).contiguous()
    out = torch.empty(codes.length, dtype=levels.dtype, device=levels.device)
    if on_triton(codes.content, levels.dtype):
        _launch_look_up(codes, 0, levels, out)
    else:
        _expand_codes(codes, 0, out, _table(levels, codes.bits))
    return out.view(codes.shape)


def apply_binary_reference(x: Tensor, codes: PackedCodes, low: float, high: float) -> Tensor:
    """`apply_binary` with all of W in memory."""
    return x @ decode_codes_reference(codes, torch.tensor([low, high], dtype=torch.float64).to(x.dtype)).T


def apply_binary(x: Tensor, codes: PackedCodes, low: float, high: float) -> Tensor:
    """y = x·Wᵀ for W of two levels, as if W were in the dtype of x; a gradient flows to x.

    Args:
        x: [..., k], on the codes' device. On a GPU finite float32, bfloat16 and float16 are multiplied by a kernel.
        codes: of one bit, [m, k].
        low: what 0 stands for, rounded to the dtype of x.
        high: what 1 stands for, likewise.

    Returns:
        [..., m], of the dtype of x.

    Raises:
        ValueError: the codes are of more bits or no matrix, x has another number of columns, is on another device or
            of no floating dtype, or a level is not finite.
    """
    _check_binary(codes)
    check_product(x, codes.shape, codes.content.device)
    result: Tensor = Product.apply(  # type: ignore[no-untyped-call]
        x,
        codes.shape[0],
        lambda y, x: _multiply_by(codes, low, high, y, x, add=False),
        lambda dtype: decode_codes(codes, torch.tensor([low, high], dtype=torch.float64).to(dtype)),
    )
    return result


def add_binary_product(y: Tensor, x: Tensor, codes: PackedCodes, low: float, high: float) -> None:
    """y += x·Wᵀ for W of two levels, in place: `apply_binary` beside a base model's own product.

    Args:
        y: contiguous [..., m], of x's dtype and device.
        x: [..., k].
        codes: of one bit, [m, k].
        low: what 0 stands for.
        high: what 1 stands for.

    Raises:
        ValueError: as `apply_binary` does; y does not fit x, or a gradient would be lost.
    """
    _check_binary(codes)
    check_product(x, codes.shape, codes.content.device, y)
    _multiply_by(codes, low, high, y, x, add=True)


def _check_binary(codes: PackedCodes) -> None:
    if codes.bits != 1:
        raise ValueError(f"Only codes of one bit can be applied as they are; these have {codes.bits}: decode them.")


def _multiply_by(codes: PackedCodes, low: float, high: float, y: Tensor, x: Tensor, *, add: bool) -> None:
    """y = x·Wᵀ, or y += x·Wᵀ; y is contiguous."""
    low, high = rounded([low, high], x.dtype)
    x, y = flattened(x), flattened(y)
    if on_triton(codes.content, x.dtype) and len(x) <= TILES.most_tokens:
        launch_product(_multiply, y, x, (codes.content,), ((high - low) / 2, low), add=add)
        return
    levels = x.new_tensor([low, high])
    if on_triton(codes.content, x.dtype):
        in_blocks(y, x, lambda first, out: _launch_look_up(codes, first, levels, out), add=add)
    else:
        table = _table(levels, 1)
        in_blocks(y, x, lambda first, out: _expand_codes(codes, first, out, table), add=add)


def _launch_look_up(codes: PackedCodes, first: int, levels: Tensor, out: Tensor) -> None:
    """Fill `out` with the levels of as many elements, from the byte `first` on."""
    if not len(out):
        return
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        _look_up[(triton.cdiv(len(out), _DECODED),)](
            codes.content[first:], levels, out, len(out), BITS=codes.bits, BYTES=_DECODED * codes.bits // 8
        )


def _table(levels: Tensor, bits: int) -> Tensor:
    """[256, 8 / b]: the levels that a byte of codes stands for."""
    byte, place = torch.arange(256, device=levels.device)[:, None], torch.arange(8 // bits, device=levels.device)
    return levels[byte >> (bits * place) & (2**bits - 1)]


def _expand_codes(codes: PackedCodes, first: int, out: Tensor, table: Tensor) -> None:
    """Fill `out` with the levels of as many elements, from the byte `first` on."""
    each = table.shape[1]
    whole, rest = divmod(len(out), each)
    for byte in range(first, first + whole, PIECE):
        at = slice(byte, min(byte + PIECE, first + whole))
        expand(table, [codes.content[at]], out[each * (at.start - first) : each * (at.stop - first)])
    if rest:
        last = out.new_empty(each)
        _expand_codes(codes, first + whole, last, table)
        out[-rest:] = last[:rest]
