"""ComPEFT: the largest entries of a task vector, as signs and one common magnitude.

Source: Yadav, Choshen, Raffel, Bansal, "ComPEFT: Compression for Communicating Parameter Efficient Updates via
Sparsification and Quantization" (arXiv 2311.13171). With τ = θ − θ_init over all tensors together:

    γ = sign(τ) where |τ| is among the ⌊k·d⌋ largest, else 0;   s = α·σ(τ);   θ̃ = θ_init + s·γ

θ_init is 0 for a LoRA's factors, 1 for the vectors of (IA)³, the base's weights where these were trained.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor

from infra.documents import Section, told
from infra.errors import CorruptArtifact, InvalidInput
from kernels.ternary import decode_ternary
from training.compression import container, sparse_layouts
from training.compression.codec import Codec, Origin, pieces
from training.compression.container import REMEDY, Packed
from training.compression.largest import Choice, Numbers, survey
from training.compression.recompression import ternary_scale
from training.compression.rounding import moved
from training.compression.ternary import Ternary

_BASE = "Is it the base model that the adapter was trained on?"


class ComPEFTOptions(Section):
    """How much is kept, how large it becomes, and how it lies in the file."""

    density: float = Field(0.05, gt=0, le=1, description="k: the fraction of all entries that is kept")
    alpha: float = Field(1.0, gt=0, allow_inf_nan=False, description="α: what is kept becomes ±α·σ(τ)")
    layout: Literal["golomb", "bitmask"] = Field(
        "golomb", description="golomb: smallest; bitmask: two bits an entry, for arithmetic without decoding"
    )


class _Details(Section):
    """Of one tensor: s; its origin, or that one's sha256; of each piece (golomb): places, b, bytes of quotients."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    scale: float = Field(ge=0)
    origin: float | str
    pieces: list[list[int]]


class ComPEFT(Codec[ComPEFTOptions]):
    """Top-k sparsification over all tensors together, ternary values, one scalar."""

    name = "compeft"
    options_type = ComPEFTOptions
    takes_origins = True

    def pack(
        self, tensors: Mapping[str, Tensor], options: ComPEFTOptions, origins: Mapping[str, Origin]
    ) -> Iterator[Packed]:
        """Three passes: σ and the threshold; the threshold's lower half; the places and signs.

        Of magnitudes that tie at the threshold the first are kept, in the order of the tensors' names. A vector that is
        ternary already, with no more non-zeros than may be kept, keeps its scale.

        Raises:
            InvalidInput: an origin is of another shape or not finite, or α·σ overflows a tensor's dtype.
        """
        sources = {name: (tensors[name], _origin(name, tensors[name], origins.get(name))) for name in sorted(tensors)}
        wanted = int(Fraction(repr(options.density)) * sum(tensor.numel() for tensor in tensors.values()))
        found = survey(lambda: (piece for source in sources.values() for piece in _residuals(*source)), wanted)
        scale = ternary_scale(list(sources.values()), wanted) if found.nonzero <= wanted else None
        if scale is None:
            scale = _sixteen_bits(options.alpha * found.deviation, {tensor.dtype for tensor in tensors.values()})
        choice = Choice(found)
        for name, (tensor, origin) in sources.items():
            chosen = ((choice.among(piece), np.signbit(piece)) for piece in _residuals(tensor, origin))
            content, counts = (
                sparse_layouts.golomb(chosen) if options.layout == "golomb" else (sparse_layouts.bitmask(chosen), [])
            )
            details = _Details(scale=scale, origin=_identity(origin), pieces=counts)
            yield Packed(name, tensor.dtype, tuple(tensor.shape), content, details.model_dump())

    def unpack(self, packed: Packed, options: ComPEFTOptions, origin: Origin | None) -> Tensor:
        """θ_init + s·γ."""
        details = _details(packed)
        start = _same_origin(packed, details, origin)
        if options.layout == "golomb":
            placed = sparse_layouts.from_golomb(packed, details.pieces)
        else:
            ternary = sparse_layouts.from_bitmask(packed)
            if not isinstance(start, Tensor):
                return _dense(packed, ternary, details.scale, start)
            placed = sparse_layouts.places(ternary)
        if isinstance(start, Tensor):
            flat = start.flatten().clone()
            for places, negative in placed:
                where, sign = torch.from_numpy(places), 1 - 2 * torch.from_numpy(negative).int()
                flat[where] = moved(flat[where], sign, details.scale)
        else:
            flat = torch.full((packed.elements,), start, dtype=packed.dtype)
            pair = moved(flat.new_full((2,), start), torch.tensor([1, -1]), details.scale)
            for places, negative in placed:
                flat[torch.from_numpy(places)] = pair[torch.from_numpy(negative).int()]
        return flat.reshape(packed.shape)


def _dense(packed: Packed, ternary: Ternary, scale: float, start: float) -> Tensor:
    try:
        return decode_ternary(ternary.packed(packed.shape), scale, packed.dtype, start)
    except ValueError as error:
        raise CorruptArtifact(f"{packed.name} cannot be what it says: {error}", REMEDY) from None


def masks(data: bytes) -> tuple[float, dict[str, Ternary]]:
    """s and γ, tensor by tensor, of a file in the layout `bitmask`; the masks are views of `data`.

    Raises:
        CorruptArtifact: the file is damaged.
        InvalidInput: it is of another codec or layout.
    """
    held = container.read(data)
    if held.codec != ComPEFT.name or held.options.get("layout") != "bitmask":
        raise InvalidInput("The adapter is not compressed to bit masks.", "Compress it with compeft:layout=bitmask")
    packed = [each for each in held.tensors if each.details is not None]
    scale = _details(packed[0]).scale if packed else 0.0
    return scale, {each.name: sparse_layouts.from_bitmask(each) for each in packed}


def _origin(name: str, tensor: Tensor, origin: Origin | None) -> Origin:
    """What the tensor is measured from, in its own dtype."""
    if not isinstance(origin, Tensor):
        return float(torch.tensor(origin or 0.0, dtype=tensor.dtype))
    if origin.shape != tensor.shape:
        raise InvalidInput(f"{name} is {tuple(tensor.shape)}, its origin {tuple(origin.shape)}.", _BASE)
    return origin.detach().to("cpu", tensor.dtype)


def _residuals(tensor: Tensor, origin: Origin) -> Iterator[Numbers]:
    """τ = θ − θ_init, a piece at a time."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if isinstance(origin, Tensor):
        for piece, start in zip(pieces(tensor), pieces(origin), strict=True):
            yield (piece.to(wide) - start.to(wide)).float().numpy()
    else:
        for piece in pieces(tensor):
            yield (piece.to(wide) - origin).float().numpy() if origin else piece.float().numpy()


def _sixteen_bits(scale: float, dtypes: set[torch.dtype]) -> float:
    """The nearest number that bfloat16 and all the dtypes can hold."""
    for dtype in (torch.bfloat16, *dtypes):
        scale = float(torch.tensor(scale, dtype=torch.float64).to(dtype))
        if math.isinf(scale):
            raise InvalidInput(f"α·σ(τ) is too large a number for {dtype}.", "Choose a smaller alpha.")
    return scale


def _identity(origin: Origin) -> float | str:
    """What the file says of an origin: the number itself, or the sha256 of the tensor's elements."""
    if not isinstance(origin, Tensor):
        return origin
    digest = hashlib.sha256()
    for piece in pieces(origin):
        digest.update(piece.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _same_origin(packed: Packed, details: _Details, origin: Origin | None) -> Origin:
    if not isinstance(details.origin, str):
        return details.origin
    if not isinstance(origin, Tensor):
        raise InvalidInput(
            f"{packed.name} is stored as the difference from a base model's tensor.", "Give that tensor as its origin."
        )
    if tuple(origin.shape) != packed.shape:
        raise InvalidInput(f"{packed.name} is {packed.shape}, its origin {tuple(origin.shape)}.", _BASE)
    start = origin.detach().to("cpu", packed.dtype)
    if _identity(start) != details.origin:
        raise InvalidInput(f"{packed.name} is the difference from another tensor than the one given.", _BASE)
    return start


def _details(packed: Packed) -> _Details:
    try:
        return _Details.model_validate(packed.details)
    except ValidationError as error:
        raise CorruptArtifact(f"{packed.name} is not described soundly: {told(error)}.", REMEDY) from None
