"""Tensors of −1, 0 and 1 in two bit masks: made dense, added to another, and applied without being made dense.

Source: ComPEFT (arXiv 2311.13171), whose task vectors are s·γ with γ ∈ {−1, 0, 1}^d in "two binary masks". Of d
elements, in the order of a contiguous tensor, the first mask has a bit for each that is not 0, the second for each that
is −1 (P = nonzero & ¬negative, N = negative), the first element in the lowest bit of the first byte:

    W = s·(P − N) ∈ ℝ^{m×k}          y = x·Wᵀ          y ← y + x·Wᵀ

Two bits a weight are read where bfloat16 has sixteen. On a GPU few tokens cost what their weights take to be read, so
the product is written for that: numbers are made of bits two at a time, in the registers of the thread that has read
them, which are also those that the tensor cores read. 2.0 is a single bit in bfloat16 and in float16, the one below the
sign; so one shift brings nonzero and negative of two elements to where two numbers have them, and the tensor cores
multiply by 2·γ. All sums are float32. Many tokens are multiplied by a W that is made dense a few rows at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kernels.dispatch import triton_is_there
from kernels.packed_bits import (
    PIECE,
    TILES,
    Product,
    as_words,
    check_bits,
    check_product,
    expand,
    flattened,
    in_blocks,
    launch_product,
    on_triton,
    rounded,
)

_DECODED = 64  # words that one program makes dense

if triton_is_there():
    import triton
    import triton.language as tl

    from kernels.packed_bits import as_inputs, as_weights, multiplied, places, put, run_of_words, words

    @triton.jit  # type: ignore[untyped-decorator]
    def _expand(  # type: ignore[no-untyped-def]
        nonzero,
        negative,
        out,
        length,
        size,
        minus,
        zero,
        plus,
        ADD: tl.constexpr,
        WHOLE: tl.constexpr,
        WORDS: tl.constexpr,
    ):
        word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
        inside = word * 32 < length
        kept = words(nonzero, word * 32, inside, size, WHOLE)[:, None]
        signs = words(negative, word * 32, inside, size, WHOLE)[:, None]
        place = tl.arange(0, 32)[None, :]
        element = word[:, None] * 32 + place
        sign = tl.where((signs >> place.to(tl.uint32)) & 1 != 0, minus, plus)
        value = tl.where((kept >> place.to(tl.uint32)) & 1 != 0, sign, zero)
        if ADD:
            value += tl.load(out + element, mask=element < length, other=0.0).to(tl.float32)
        tl.store(out + element, value.to(out.dtype.element_ty), mask=element < length)

    @triton.jit  # type: ignore[untyped-decorator]
    def _multiply(  # type: ignore[no-untyped-def]
        x,
        nonzero,
        negative,
        y,
        m,
        k,
        n,
        x_stride,
        runs,
        size,
        scale,
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
        for step in range(0, runs, 4 * PARTS):
            kept = run_of_words(nonzero, row, step + run, m, k, runs, size, WHOLE, WORDS)
            signs = run_of_words(negative, row, step + run, m, k, runs, size, WHOLE, WORDS)
            # Each element's two bits side by side; then, of the elements 2q and 2q + 1, in the two halves of a word.
            even = (kept & 0x55555555) | ((signs << 1) & 0xAAAAAAAA)
            odd = ((kept >> 1) & 0x55555555) | (signs & 0xAAAAAAAA)
            low, high = (even & 0xFFFF) | (odd << 16), (even >> 16) | (odd & 0xFFFF0000)
            weights = as_weights(low, high, 0xC000, sixteen, ROWS, PARTS)
            # Beyond the last column lie bits of the next row; x is 0 there.
            inputs = as_inputs(x, step, k, n, x_stride, TOKENS, WORDS, PARTS, WHOLE)
            total = multiplied(weights, inputs, total)
        put(y, tl.sum(total, 0) * (scale / 2), m, n, ADD)


@dataclass(frozen=True, eq=False)
class TernaryTensor:
    """γ ∈ {−1, 0, 1} of any shape, in two bit masks on one device.

    Whether the masks agree is checked once, here; on a GPU that waits for its answer.

    Args:
        shape: of γ, d elements.
        nonzero: [⌈d/8⌉] bytes (uint8); the bits of elements that are not 0.
        negative: the same; of those that are −1.

    Raises:
        ValueError: a mask is of another dtype, length or device, has a bit beyond d, or −1 stands where 0 does.
    """

    shape: tuple[int, ...]
    nonzero: Tensor
    negative: Tensor

    def __post_init__(self) -> None:
        if any(extent < 0 for extent in self.shape):
            raise ValueError(f"No tensor is of shape {self.shape}.")
        size = -(-self.length // 8)
        check_bits(self.nonzero, size, "The mask of what is not 0")
        check_bits(self.negative, size, "The mask of what is −1")
        if self.nonzero.device != self.negative.device:
            raise ValueError(f"The masks are on {self.nonzero.device} and {self.negative.device}.")
        contradicted = self.negative & ~self.nonzero
        if self.length % 8:
            contradicted[-1:] |= self.nonzero[-1:] >> (self.length % 8)
        if bool(contradicted.any()):
            raise ValueError("The masks contradict each other, or have bits beyond the last element.")

    @property
    def length(self) -> int:
        """d."""
        return prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the masks are."""
        return self.nonzero.device

    def to(self, device: torch.device | str) -> "TernaryTensor":
        """The same on another device."""
        return TernaryTensor(self.shape, self.nonzero.to(device), self.negative.to(device))


def decode_ternary_reference(
    ternary: TernaryTensor, scale: float, dtype: torch.dtype = torch.float32, start: float = 0.0
) -> Tensor:
    """`decode_ternary`, bit by bit."""
    place = torch.arange(ternary.length, device=ternary.device)
    bits = [(mask[place // 8] >> (place % 8)) & 1 for mask in (ternary.nonzero, ternary.negative)]
    kept, negative = (each.double() for each in bits)
    return (start + scale * (kept - 2 * negative)).to(dtype).view(ternary.shape)


def decode_ternary(
    ternary: TernaryTensor, scale: float, dtype: torch.dtype = torch.float32, start: float = 0.0
) -> Tensor:
    """start + scale·γ, computed in float64 and rounded once to `dtype`.

    Args:
        ternary: γ.
        scale: s; of ComPEFT, α·σ(τ).
        dtype: a floating dtype. On a GPU float32, bfloat16 and float16 are made by a kernel.
        start: what γ is measured from; of ComPEFT, θ_init where that is one number.

    Returns:
        A contiguous tensor of γ's shape on its device.

    Raises:
        ValueError: the dtype is not a floating one, or scale or start is not finite.
    """
    levels = rounded([start - scale, start, start + scale], dtype)
    out = torch.empty(ternary.length, dtype=dtype, device=ternary.device)
    if on_triton(ternary.nonzero, dtype):
        _launch_expand(ternary, 0, out, levels, add=False)
    else:
        _expand_bits(ternary, 0, out, _table(out, levels))
    return out.view(ternary.shape)


def add_ternary(tensor: Tensor, ternary: TernaryTensor, scale: float) -> None:
    """tensor += scale·γ in place; 16-bit dtypes are added in float32 and rounded once.

    Args:
        tensor: contiguous, of a floating dtype, γ's number of elements in any shape, on its device.
        ternary: γ.
        scale: s.

    Raises:
        ValueError: the tensor has another number of elements, gaps, or is on another device; the scale is not finite.
    """
    if tensor.numel() != ternary.length:
        raise ValueError(f"γ has {ternary.length:,} elements, the tensor {tensor.numel():,}.")
    if tensor.device != ternary.device:
        raise ValueError(f"The tensor is on {tensor.device}, γ on {ternary.device}.")
    if not tensor.is_contiguous():
        raise ValueError("The tensor must be contiguous.")
    rounded([scale], tensor.dtype)  # refuses what the dtype cannot hold; what is added is the scale itself
    flat = tensor.detach().view(-1)
    if on_triton(ternary.nonzero, tensor.dtype):
        _launch_expand(ternary, 0, flat, [-scale, 0.0, scale], add=True)
        return
    piece = torch.empty(min(8 * PIECE, len(flat)), dtype=tensor.dtype, device=tensor.device)
    table = _table(piece, [-1.0, 0.0, 1.0])
    for begin in range(0, len(flat), 8 * PIECE):
        part = flat[begin : begin + 8 * PIECE]
        own = piece[: len(part)]
        _expand_bits(ternary, begin // 8, own, table)
        part.add_(own, alpha=scale)


def apply_ternary_reference(x: Tensor, ternary: TernaryTensor, scale: float) -> Tensor:
    """`apply_ternary` with all of W in memory."""
    return x @ decode_ternary_reference(ternary, scale, x.dtype).T


def apply_ternary(x: Tensor, ternary: TernaryTensor, scale: float) -> Tensor:
    """y = x·Wᵀ for W = s·γ, as if W were in the dtype of x; a gradient flows to x.

    On a GPU up to 64 tokens are multiplied without anything made dense. Otherwise a few rows at a time are, and stay in
    the cache.

    Args:
        x: [..., k], on γ's device. On a GPU finite float32, bfloat16 and float16 are multiplied by a kernel.
        ternary: γ, [m, k].
        scale: s; rounded to the dtype of x, as the entries of a dense W would be.

    Returns:
        [..., m], of the dtype of x.

    Raises:
        ValueError: γ is no matrix, x has another number of columns, is on another device or of no floating dtype, or
            the scale is not finite.
    """
    check_product(x, ternary.shape, ternary.device)
    result: Tensor = Product.apply(  # type: ignore[no-untyped-call]
        x,
        ternary.shape[0],
        lambda y, x: _multiply_by(ternary, scale, y, x, add=False),
        lambda dtype: decode_ternary(ternary, scale, dtype),
    )
    return result


def add_ternary_product(y: Tensor, x: Tensor, ternary: TernaryTensor, scale: float) -> None:
    """y += x·Wᵀ for W = s·γ, in place: `apply_ternary` beside a base model's own product.

    Args:
        y: contiguous [..., m], of x's dtype and device.
        x: [..., k].
        ternary: γ, [m, k].
        scale: s.

    Raises:
        ValueError: as `apply_ternary` does; y does not fit x, or a gradient would be lost.
    """
    check_product(x, ternary.shape, ternary.device, y)
    _multiply_by(ternary, scale, y, x, add=True)


def _multiply_by(ternary: TernaryTensor, scale: float, y: Tensor, x: Tensor, *, add: bool) -> None:
    """y = x·Wᵀ, or y += x·Wᵀ; y is contiguous."""
    (s,) = rounded([scale], x.dtype)
    x, y = flattened(x), flattened(y)
    if not on_triton(ternary.nonzero, x.dtype):
        table = _table(x, [-s, 0.0, s])
        in_blocks(y, x, lambda first, out: _expand_bits(ternary, first, out, table), add=add)
    elif len(x) > TILES.most_tokens:
        in_blocks(y, x, lambda first, out: _launch_expand(ternary, first, out, [-s, 0.0, s], add=False), add=add)
    else:
        launch_product(_multiply, y, x, (ternary.nonzero, ternary.negative), (s,), add=add)


def _launch_expand(ternary: TernaryTensor, first: int, out: Tensor, levels: Sequence[float], *, add: bool) -> None:
    """Fill `out` with the levels of as many elements, from the byte `first` on; or add them."""
    masks = ternary.nonzero[first:], ternary.negative[first:]
    if not len(out):
        return
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        _expand[(triton.cdiv(len(out), 32 * _DECODED),)](
            *masks,
            out,
            len(out),
            len(masks[0]),
            *levels,
            ADD=add,
            WHOLE=as_words(len(masks[0]) * 8, *masks),
            WORDS=_DECODED,
        )


def _table(like: Tensor, levels: Sequence[float]) -> Tensor:
    """[256, 4]: the levels that 4 bits of `nonzero`, and above them 4 bits of `negative`, stand for."""
    index, bit = torch.arange(256, device=like.device)[:, None], torch.arange(4, device=like.device)
    gamma = (index >> bit & 1) * (1 - 2 * (index >> (4 + bit) & 1))
    return torch.tensor(levels, dtype=like.dtype, device=like.device)[gamma + 1]


def _expand_bits(ternary: TernaryTensor, first: int, out: Tensor, table: Tensor) -> None:
    """Fill `out` with the levels of as many elements, from the byte `first` on."""
    whole, rest = divmod(len(out), 8)
    for byte in range(first, first + whole, PIECE):
        at = slice(byte, min(byte + PIECE, first + whole))
        kept, negative = ternary.nonzero[at], ternary.negative[at]
        halves = (kept & 0x0F) | (negative << 4), (kept >> 4) | (negative & 0xF0)
        expand(table, halves, out[8 * (at.start - first) : 8 * (at.stop - first)])
    if rest:
        last = out.new_empty(8)
        _expand_bits(ternary, first + whole, last, table)
        out[-rest:] = last[:rest]
