"""Group quantisation: each run of neighbouring numbers is rounded to a grid of its own.

symmetric: x̃ = s·q, q = −m … m with m = 2^{b−1} − 1, s = max|x| / m.
asymmetric: x̃ = s·(q − z), q = 0 … N with N = 2^b − 1; of all whole z the one that allows the finest s,

    s = max(max(−x, 0) / z, max(x, 0) / (N − z)),

so that both ends of the group are on the grid, 0 is too, and nothing is cut off: |x − x̃| ≤ s/2, apart from what the
tensor's own dtype rounds (much, of float16 below 10⁻⁴). s is a float16 times a power of two that the tensor's numbers
share. A matrix is read along its longer side: a LoRA's factors then have groups within one of their r directions, whose
sizes differ much after an SVD.

Most codes of a group are near 0, so the packed codes are Huffman-coded (as deflate, RFC 1951, without its matches):
within 0.04 bits of their entropy.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from infra.documents import Section, told
from infra.errors import CorruptArtifact
from training.compression import codes
from training.compression.codec import PIECE, Codec, Origin, pieces
from training.compression.container import REMEDY, Packed

ROUNDS = 16
MOST_INFLATED = 8  # bytes that a byte can stand for: a Huffman code has one bit at least


class GroupsOptions(Section):
    """How fine the grids are, and how far each reaches."""

    bits: Literal[2, 4, 8] = Field(4, description="b: of a number")
    levels: int | None = Field(
        None, ge=3, le=255, description="points of a symmetric grid, an odd number. Default: 2^bits − 1"
    )
    size: int = Field(64, ge=8, le=65536, multiple_of=8, description="numbers that share a grid; the last may be fewer")
    symmetric: bool = Field(True, description="the grid is centred on 0; otherwise a zero point of 8 bits is stored")

    @model_validator(mode="after")
    def _levels_fit(self) -> "GroupsOptions":
        if self.levels is not None:
            if not self.symmetric:
                raise ValueError("levels are those of a symmetric grid")
            if self.levels % 2 == 0 or self.levels > 2**self.bits - 1:
                raise ValueError(f"levels must be odd, and no more than {2**self.bits - 1} with {self.bits} bits")
        return self


class _Details(Section):
    model_config = ConfigDict(strict=True)

    exponent: int = Field(ge=-200, le=200)


class Groups(Codec[GroupsOptions]):
    """Grids of 2^b points for groups of numbers."""

    name = "groups"
    options_type = GroupsOptions

    def pack(
        self, tensors: Mapping[str, Tensor], options: GroupsOptions, origins: Mapping[str, Origin]
    ) -> Iterator[Packed]:
        """Codes of a tensor (Huffman-coded), then its scales (float16), then its zero points (a byte each)."""
        del origins
        for name, tensor in tensors.items():
            exponent = _exponent(tensor, options)
            parts: tuple[list[bytes], ...] = ([], [], [])
            deflating = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)  # nothing repeats; 20 times as fast
            for piece in pieces(_laid(tensor), _piece(options)):
                rows = _rows(piece, options.size)
                scale, zero, rows = _grid(rows, options, exponent, tensor.dtype)
                step = torch.where(scale > 0, scale * 2.0**exponent, 1.0)
                code = ((rows / step[:, None]).round() + zero[:, None]).clamp(0, _top(options))
                flat = code.flatten()[: len(piece)].to(torch.uint8).numpy()
                parts[0].append(deflating.compress(codes.packed(flat, options.bits).data))
                parts[1].append(scale.half().numpy().astype("<f2").tobytes())
                parts[2].append(b"" if options.symmetric else zero.to(torch.uint8).numpy().tobytes())
            parts[0].append(deflating.flush())
            content = b"".join(part for each in parts for part in each)
            yield Packed(
                name, tensor.dtype, tuple(tensor.shape), content, _Details(exponent=exponent).model_dump(mode="json")
            )

    def unpack(self, packed: Packed, options: GroupsOptions, origin: Origin | None) -> Tensor:
        """s·(q − z)."""
        del origin
        try:
            details = _Details.model_validate(packed.details)
        except ValidationError as error:
            raise CorruptArtifact(f"{packed.name} is not described soundly: {told(error)}.", REMEDY) from None
        number = -(-packed.elements // options.size)
        size = len(packed.content) - number * (2 if options.symmetric else 3)
        if size <= 0:
            raise CorruptArtifact(
                f"{packed.name} has {len(packed.content):,} bytes, too few for its shape and options.", REMEDY
            )
        own_codes = _inflated(packed, size, codes.packed_size(packed.elements, options.bits))
        content = np.frombuffer(packed.content, np.uint8)[size:]
        scales = torch.from_numpy(content[: 2 * number].copy().view("<f2").astype(np.float64))
        if not scales.isfinite().all() or (scales < 0).any():
            raise CorruptArtifact(f"{packed.name} has a scale that is no positive number.", REMEDY)
        if options.symmetric:
            zeros = torch.full((number,), _middle(options), dtype=torch.float64)
        else:
            zeros = torch.from_numpy(content[2 * number :].astype(np.float64))
        flat, piece = torch.empty(packed.elements, dtype=packed.dtype), _piece(options)
        for begin in range(0, packed.elements, piece):
            part = flat[begin : begin + piece]
            own = own_codes[begin * options.bits // 8 : (begin + piece) * options.bits // 8]
            rows = _rows(torch.from_numpy(codes.unpacked(own, len(part), options.bits).copy()), options.size)
            at = slice(begin // options.size, begin // options.size + len(rows))
            values = (rows - zeros[at, None].float()) * (scales[at, None] * 2.0**details.exponent).float()
            part.copy_(_rounded(values, packed.dtype).flatten()[: len(part)])
        if _lies_across(packed.shape):
            return flat.reshape(packed.shape[::-1]).T.contiguous()
        return flat.reshape(packed.shape)


def _lies_across(shape: Sequence[int]) -> bool:
    """Whether a tensor is read column by column, since its columns are longer than its rows."""
    return len(shape) == 2 and shape[0] > shape[1]


def _laid(tensor: Tensor) -> Tensor:
    return tensor.T if _lies_across(tensor.shape) else tensor


def _inflated(packed: Packed, size: int, expected: int) -> NDArray[np.uint8]:
    """The packed codes, which take `expected` bytes, of the first `size` bytes of the content."""
    damaged = CorruptArtifact(f"{packed.name} has another number of codes than its shape and options take.", REMEDY)
    if expected > MOST_INFLATED * size:
        raise damaged
    inflating = zlib.decompressobj()
    try:
        found = inflating.decompress(packed.content[:size], expected + 1)
    except zlib.error as error:
        raise CorruptArtifact(f"{packed.name} has codes that cannot be read: {error}.", REMEDY) from None
    if len(found) != expected or not inflating.eof or inflating.unused_data:
        raise damaged
    return np.frombuffer(found, np.uint8)


def _grid(rows: Tensor, options: GroupsOptions, exponent: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scale (of float16, without the exponent) and zero point of each group; float64, [groups].

    What the ends of a group decode to should give the same grid again; where the dtype rounds them off it, they are
    moved to what they decode to, until they stay. The rows come back with their ends moved so, float64.

    Args:
        rows: [groups, size] (float32).
        options: of the codec.
        exponent: that the scales share.
        dtype: that is decoded to.
    """
    low, high = (-rows.amin(dim=1)).clamp(min=0).double(), rows.amax(dim=1).clamp(min=0).double()
    scale, zero = _fitted(low, high, options, exponent)
    for _ in range(ROUNDS):
        step = torch.where(scale > 0, scale * 2.0**exponent, 1.0)
        ends = torch.stack(
            [-(low / step).round().clamp(max=zero), (high / step).round().clamp(max=_top(options) - zero)]
        )
        decoded = _rounded((ends * (scale * 2.0**exponent)).float(), dtype).double()
        low, high = -decoded[0], decoded[1]
        again, zero_again = _fitted(low, high, options, exponent)
        if torch.equal(again, scale) and torch.equal(zero_again, zero):
            break
        scale, zero = again, zero_again
    lowest, highest = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    ends = torch.where((rows == highest) & (highest > 0), high[:, None], rows.double())
    ends = torch.where((rows == lowest) & (lowest < 0), -low[:, None], ends)
    return scale, zero, torch.maximum(torch.minimum(ends, high[:, None]), -low[:, None])


def _fitted(low: Tensor, high: Tensor, options: GroupsOptions, exponent: int) -> tuple[Tensor, Tensor]:
    """The finest scale, and the zero point, with which −low … high is within the grid."""
    if options.symmetric:
        zero = torch.full_like(low, _middle(options))
        wanted = torch.maximum(low, high) / _middle(options)
    else:
        top = _top(options)
        exact = torch.where(low + high > 0, low / (low + high), 0.0) * top
        below = exact.floor().clamp(max=top - 1)
        candidates = torch.stack([below, below + 1])
        steps = torch.maximum(_over(low, candidates), _over(high, top - candidates))
        finest = steps.argmin(dim=0, keepdim=True)
        wanted, zero = steps.gather(0, finest)[0], candidates.gather(0, finest)[0]
    wanted = wanted * 2.0**-exponent
    nearest = wanted.half()
    larger = torch.nextafter(nearest, torch.full_like(nearest, math.inf))
    return torch.where(nearest.double() < wanted * (1 - 2**-10), larger, nearest).double(), zero


def _over(extent: Tensor, steps: Tensor) -> Tensor:
    return torch.where(extent > 0, extent / steps, 0.0)


def _exponent(tensor: Tensor, options: GroupsOptions) -> int:
    """Of the power of two that brings the largest scale near to 1; 0 where the dtype has no finer numbers itself."""
    if tensor.dtype == torch.float16 or not tensor.numel():
        return 0
    largest = max(float(piece.abs().max()) for piece in pieces(tensor))
    return max(math.frexp(largest / _top(options))[1], -100) if largest else 0


def _rows(piece: Tensor, size: int) -> Tensor:
    """[groups, size] in float32; the last is filled up with zeros."""
    return torch.nn.functional.pad(piece.float(), (0, -len(piece) % size)).reshape(-1, size)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.double().clamp(-limit, limit).to(dtype)


def _piece(options: GroupsOptions) -> int:
    return max(PIECE // options.size, 1) * options.size


def _middle(options: GroupsOptions) -> int:
    return (options.levels or 2**options.bits - 1) // 2


def _top(options: GroupsOptions) -> int:
    return 2 * _middle(options) if options.symmetric else int(2**options.bits - 1)
