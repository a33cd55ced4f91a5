"""Codebook quantisation: each number of a matrix becomes the nearest of 2^b levels of its standardised distribution.

Source: Jie, Wang, Deng, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy"
(ICCV 2023, arXiv 2307.16867). A matrix of n numbers takes ⌈n·b/8⌉ + 8 bytes: the codes, then μ and σ as float32. They
are those of the matrix before it was quantised: w̃ = c[code]·σ + μ, and is never standardised again.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from infra.documents import Section
from infra.errors import CorruptArtifact, InvalidInput
from kernels.codebook import PackedCodes, decode_codes
from training.compression import codes
from training.compression.codec import Codec, Origin, pieces
from training.compression.container import REMEDY, Packed
from training.compression.levels import cells, levels, standardised
from training.compression.recompression import affine

LOOK = 1 << 14  # elements that are looked at together for how many different values there are


class CodebookOptions(Section):
    """How many levels there are."""

    bits: Literal[1, 2, 4, 8] = Field(4, description="b: of a number; 2^b levels")


class Codebook(Codec[CodebookOptions]):
    """Levels for a normal distribution, one mean and one deviation for each tensor."""

    name = "codebook"
    options_type = CodebookOptions

    def pack(
        self, tensors: Mapping[str, Tensor], options: CodebookOptions, origins: Mapping[str, Origin]
    ) -> Iterator[Packed]:
        """Each tensor by itself; one that a codebook of so many bits gave back keeps its μ and σ.

        Only 256 levels in 16-bit dtypes are not always recognised, as they may lie as close as the dtype's own numbers.

        Raises:
            InvalidInput: a level would be beyond a tensor's dtype.
        """
        del origins
        for name, tensor in tensors.items():
            content = _known(tensor, options.bits) or _estimated(name, tensor, options.bits)
            yield Packed(name, tensor.dtype, tuple(tensor.shape), content, {})

    def unpack(self, packed: Packed, options: CodebookOptions, origin: Origin | None) -> Tensor:
        """w̃ = c[code]·σ + μ."""
        del origin
        size = codes.packed_size(packed.elements, options.bits)
        if packed.details or len(packed.content) != size + 8:
            raise CorruptArtifact(
                f"{packed.name} has {len(packed.content):,} bytes; {packed.elements:,} codes of {options.bits} bits "
                f"and two numbers take {size + 8:,}.",
                REMEDY,
            )
        content = np.frombuffer(packed.content, np.uint8)
        mean, deviation = torch.from_numpy(content[size:].copy().view("<f4").astype(np.float32))
        if not (mean.isfinite() and deviation.isfinite()):
            raise CorruptArtifact(f"{packed.name} has a mean or a deviation that is no number.", REMEDY)
        values = _values(options.bits, mean, deviation, packed.dtype)
        return decode_codes(PackedCodes(packed.shape, options.bits, torch.from_numpy(content[:size].copy())), values)


def _values(bits: int, mean: Tensor, deviation: Tensor, dtype: torch.dtype) -> Tensor:
    """What each of the codes stands for."""
    return (levels(bits).float() * deviation + mean).to(dtype)


def _moments(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """`levels.moments`, without a gradient and a piece at a time."""
    number = max(tensor.numel(), 1)
    mean = sum(float(piece.double().sum()) for piece in pieces(tensor)) / number
    squares = sum(float((piece.double() - mean).square().sum()) for piece in pieces(tensor))
    both = torch.tensor([mean, (squares / max(number - 1, 1)) ** 0.5], dtype=torch.float64).float()
    return both[0], both[1]


def _estimated(name: str, tensor: Tensor, bits: int) -> bytes:
    """The codes of a tensor that has not been through a codebook, μ and σ behind them."""
    mean, deviation = _moments(tensor)
    if not _values(bits, mean, deviation, tensor.dtype).isfinite().all():
        raise InvalidInput(
            f"{name} holds numbers too large for levels of {tensor.dtype}.",
            "Is it the adapter of a run that diverged?",
        )
    parts = (cells(standardised(piece, mean, deviation), bits) for piece in pieces(tensor))
    return _joined(parts, bits, mean, deviation)


def _known(tensor: Tensor, bits: int) -> bytes | None:
    """The codes that the tensor came from; None if it is of no codebook of so many bits."""
    values = tensor.new_empty(0, device="cpu")
    for piece in pieces(tensor):
        for part in torch.split(piece, LOOK):
            values = torch.cat([values, part]).unique()  # type: ignore[no-untyped-call]
            if len(values) > 2**bits:
                return None
    found = affine(values, levels(bits), *_moments(tensor)) if len(values) else None
    if found is None:
        return None
    own, mean, deviation = found
    return _joined((own[torch.searchsorted(values, piece)] for piece in pieces(tensor)), bits, mean, deviation)


def _joined(parts: Iterator[Tensor], bits: int, mean: Tensor, deviation: Tensor) -> bytes:
    packed = [codes.packed(part.to(torch.uint8).numpy(), bits).tobytes() for part in parts]
    return b"".join([*packed, torch.stack([mean, deviation]).numpy().astype("<f4").tobytes()])
