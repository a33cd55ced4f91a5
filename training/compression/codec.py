"""The codec contract: what turns named tensors into the bytes of a file, and back."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from infra.documents import Section, did_you_mean
from infra.errors import InvalidInput
from training.compression import container
from training.compression.container import Packed

COMPRESSIBLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PIECE = 1 << 18  # elements at a time
Origin = float | Tensor
_PATTERNS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}
_BEYOND_FLOAT32 = 2.0**128

Options = TypeVar("Options", bound=Section)


class Codec(ABC, Generic[Options]):
    """A lossy representation of floating-point tensors.

    What `unpack` gives is the codec's own kind of values: packing those again with the same options gives back exactly
    them; but for a codebook of 256 levels, which are too many to be recognised always.
    """

    name: ClassVar[str]
    options_type: type[Options]
    takes_origins: ClassVar[bool] = False

    @abstractmethod
    def pack(self, tensors: Mapping[str, Tensor], options: Options, origins: Mapping[str, Origin]) -> Iterator[Packed]:
        """Each of the tensors, packed, one after the other. They are finite, floating-point, and any may be empty.

        Args:
            tensors: by name.
            options: of the codec.
            origins: what a tensor is measured from; 0 where there is none.
        """

    @abstractmethod
    def unpack(self, packed: Packed, options: Options, origin: Origin | None) -> Tensor:
        """A tensor, on the CPU, in its own shape and dtype.

        Raises:
            CorruptArtifact: the bytes are not what shape, dtype and details say; found out before memory is taken.
            InvalidInput: an origin is missing, or another one.
        """


def encode(
    tensors: Mapping[str, Tensor],
    codec: Codec[Options],
    options: Options,
    dense: Collection[str] = (),
    origins: Mapping[str, Origin] | None = None,
) -> bytes:
    """The file of `tensors`, compressed.

    Args:
        tensors: by name; what is not floating-point (indices) goes in as it is.
        codec: how to compress the others.
        options: of the codec.
        dense: names of tensors that go in as they are (heads and norms that were trained in full).
        origins: what tensors are measured from: a number or a tensor of the same shape, by name; 0 where there is none.

    Raises:
        InvalidInput: a tensor holds NaN or infinity or has a name that cannot stand in the file; `dense` or `origins`
            name a tensor that is not there; the codec takes no origins.
    """
    origins = origins or {}
    for name in [*dense, *origins]:
        if name not in tensors:
            raise InvalidInput(f"There is no tensor {name!r} to compress.", did_you_mean(name, list(tensors)))
    if origins and not codec.takes_origins:
        raise InvalidInput(
            f"The codec {codec.name} compresses tensors themselves, not what sets them off from an origin.",
            "Use compeft, or give no origins.",
        )
    compressed = {
        name: tensor for name, tensor in tensors.items() if tensor.dtype in COMPRESSIBLE and name not in dense
    }
    for name, tensor in sorted(compressed.items()):
        check_finite(name, tensor)
    packed = [container.kept(name, tensor) for name, tensor in tensors.items() if name not in compressed]
    packed += codec.pack(compressed, options, origins)
    return container.write(codec.name, options.model_dump(mode="json"), packed)


def pieces(tensor: Tensor, size: int = PIECE) -> Iterator[Tensor]:
    """The tensor's elements in order, `size` at a time, on the CPU."""
    flat = tensor.detach().reshape(-1)
    return (flat[begin : begin + size].cpu() for begin in range(0, len(flat), size))


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `InvalidInput` where a floating-point tensor holds NaN or infinity, in float32 if it is a wider one."""
    bits, unsigned = _PATTERNS[tensor.dtype.itemsize]
    limit = _BEYOND_FLOAT32 if tensor.dtype == torch.float64 else torch.inf
    least = int(torch.tensor(limit, dtype=tensor.dtype).view(bits))
    without_sign = unsigned(2 ** (8 * tensor.dtype.itemsize - 1) - 1)
    for piece in pieces(tensor):
        if (piece.view(bits).numpy().view(unsigned) & without_sign).max() >= least:
            raise InvalidInput(
                f"{name} holds NaN, infinity or numbers beyond float32.", "Is it the adapter of a run that diverged?"
            )
