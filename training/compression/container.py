"""The file of a compressed adapter: a safetensors file whose tensors are packed bytes, and which trusts nothing.

Each original tensor is one tensor of the file, under its own name: a row of bytes (U8) that a codec packed, or, where
it was kept as it is, itself. `__metadata__` holds two texts: `regraft`, the format's number, the codec, its options and
what belongs to each tensor (in the order of their names), as JSON; and `sha256`, of that JSON and the names. Each
tensor's own sha256 is of the bytes as they lie in the file, not of what they decode to: so damage is found before
anything is decoded, at the price of the small side, and decoding depends on nothing but those bytes and the JSON.
"""

import hashlib
import io
import json
import math
import re
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor

from infra.documents import Section, told
from infra.errors import CorruptArtifact, InvalidInput

FORMAT = "1"
DESCRIPTION, STREAMS = "regraft.description", "regraft.streams"
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
LONGEST_DESCRIPTION = 16_000_000  # bytes; of a hundred thousand tensors
MOST_ELEMENTS = 2**63 - 1
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
NAME = re.compile(r"[A-Za-z0-9_.:-]{1,1024}")
REMEDY = "Copy it again from where it came, or compress the adapter again."


@dataclass(frozen=True)
class Packed:
    """One tensor as it lies in the file.

    Args:
        name: of the tensor.
        dtype: of the original.
        shape: of the original.
        content: the packed bytes; of a tensor that is kept, its own.
        details: what the codec needs beside them, JSON-like; None for a tensor that is kept.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    content: memoryview | bytes
    details: dict[str, Any] | None

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Container:
    """What a file holds, checked but not decoded; `tensors` are in the order of their names."""

    codec: str
    options: dict[str, Any]
    tensors: tuple[Packed, ...]


class _Described(Section):
    model_config = ConfigDict(strict=True)

    name: str
    shape: list[int]
    dtype: str
    size: int = Field(ge=0)
    details: dict[str, Any] | None


class _Description(Section):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    codec: str
    options: dict[str, Any]
    tensors: list[_Described]


class _Place(Section):
    model_config = ConfigDict(strict=True)

    dtype: str
    shape: list[int]
    data_offsets: list[int] = Field(min_length=2, max_length=2)

    @property
    def size(self) -> int:
        return self.data_offsets[1] - self.data_offsets[0]


def kept(name: str, tensor: Tensor) -> Packed:
    """A tensor that goes into the file as it is.

    Raises:
        InvalidInput: safetensors has no code for its dtype.
    """
    if tensor.dtype not in CODES:
        raise InvalidInput(f"{name} is of {tensor.dtype}, which no safetensors file holds.", "Convert or drop it.")
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return Packed(name, tensor.dtype, tuple(tensor.shape), content, None)


def restored(packed: Packed) -> Tensor:
    """The tensor that was kept; a copy."""
    tensor = torch.empty(packed.shape, dtype=packed.dtype)
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(packed.content, np.uint8)
    return tensor


def write(codec: str, options: Mapping[str, Any], tensors: Iterable[Packed]) -> bytes:
    """The file's bytes: the same for the same tensors, in whatever order they come.

    Raises:
        InvalidInput: a name cannot stand in the file.
    """
    ordered = sorted(tensors, key=lambda packed: packed.name)
    for packed in ordered:
        if not NAME.fullmatch(packed.name) or packed.name in (DESCRIPTION, STREAMS):
            raise InvalidInput(
                f"The tensor name {packed.name!r:.200} cannot stand in a compressed adapter.",
                "Use at most 1024 letters, digits and . _ : -",
            )
    described = [
        {
            "name": packed.name,
            "shape": packed.shape,
            "dtype": CODES[packed.dtype],
            "size": len(packed.content),
            "details": packed.details,
        }
        for packed in ordered
    ]
    content = {"codec": codec, "options": options, "tensors": described}
    description = zlib.compress(json.dumps(content, separators=(",", ":"), sort_keys=True, allow_nan=False).encode(), 9)
    beside = sorted(
        (packed for packed in ordered if packed.details is None),
        key=lambda packed: (-packed.dtype.itemsize, packed.name),
    )
    streams = sum(len(packed.content) for packed in ordered if packed.details is not None)
    places = [(packed.name, CODES[packed.dtype], packed.shape, len(packed.content)) for packed in beside]
    places += [(DESCRIPTION, "U8", (len(description),), len(description)), (STREAMS, "U8", (streams,), streams)]
    parts: deque[Packed | bytes] = deque([*beside, description])
    parts += [packed for packed in ordered if packed.details is not None]
    ordered.clear()
    beside.clear()
    data, digest = io.BytesIO(), hashlib.sha256()
    data.write(_header("0" * 64, places))
    while parts:  # each goes as soon as it is written
        part = parts.popleft()
        own = part.content if isinstance(part, Packed) else part
        digest.update(own)
        data.write(own)
    data.seek(0)
    data.write(_header(digest.hexdigest(), places))
    return data.getvalue()


def read(data: bytes) -> Container:
    """Inverse of `write`: what is in the file, after every check that needs no decoding.

    The header is accepted only where writing what was read gives the very same header again. So offsets and order need
    no rules of their own, and no length is believed that the file's size does not bear out.

    Raises:
        CorruptArtifact: it is truncated, damaged, contradicts itself, or is of a later format.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, LONGEST_HEADER):
        raise CorruptArtifact("The compressed adapter is truncated, or is no safetensors file.", REMEDY)
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__")
        form, checksum = metadata["regraft"], metadata["sha256"]
        places = {name: _Place.model_validate(place) for name, place in header.items()}
        again = _header(checksum, [(name, at.dtype, at.shape, at.size) for name, at in places.items()], form)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CorruptArtifact("The header of the compressed adapter cannot be read.", REMEDY) from None
    if form != FORMAT and isinstance(form, str):
        raise CorruptArtifact(
            f"The compressed adapter is of format {form!r:.20}; this version of Regraft reads {FORMAT}.",
            "Use the version of Regraft that wrote it, or a newer one.",
        )
    if again != data[: 8 + length] or not {DESCRIPTION, STREAMS} <= places.keys():
        raise CorruptArtifact("The header of the compressed adapter is not as it was written.", REMEDY)
    content = memoryview(data)[8 + length :]
    if sum(place.size for place in places.values()) != len(content):
        raise CorruptArtifact("The compressed adapter is truncated, or has bytes to spare.", REMEDY)
    if hashlib.sha256(content).hexdigest() != checksum:
        raise CorruptArtifact("The compressed adapter has changed since it was written.", REMEDY)
    rows = {name: content[slice(*place.data_offsets)] for name, place in places.items()}
    if any((places[row].dtype, places[row].shape) != ("U8", [len(rows[row])]) for row in (DESCRIPTION, STREAMS)):
        raise CorruptArtifact("The header of the compressed adapter is not as it was written.", REMEDY)
    found = _described(rows.pop(DESCRIPTION))
    return Container(found.codec, found.options, _tensors(found.tensors, rows.pop(STREAMS), rows, places))


def _described(deflated: memoryview) -> _Description:
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(deflated, LONGEST_DESCRIPTION)
        if not unpacking.eof or unpacking.unused_data:
            raise ValueError("it is longer than it may be, or does not end where it should")
        return _Description.model_validate_json(text)
    except ValidationError as error:
        raise CorruptArtifact(f"The compressed adapter is not described soundly: {told(error)}.", REMEDY) from None
    except (zlib.error, ValueError) as error:
        raise CorruptArtifact(f"The compressed adapter's description cannot be read: {error}.", REMEDY) from None


def _tensors(
    described: list[_Described], streams: memoryview, beside: dict[str, memoryview], places: dict[str, _Place]
) -> tuple[Packed, ...]:
    names = [about.name for about in described]
    if names != sorted(set(names)) or beside.keys() != {about.name for about in described if about.details is None}:
        raise CorruptArtifact("The compressed adapter's tensors are not those of its description.", REMEDY)
    tensors, begin = [], 0
    for about in described:
        if not NAME.fullmatch(about.name) or about.dtype not in DTYPES:
            raise CorruptArtifact(f"The compressed adapter holds {about.name!r:.200} as {about.dtype!r:.20}.", REMEDY)
        if any(extent < 0 for extent in about.shape) or math.prod(e for e in about.shape if e) > MOST_ELEMENTS:
            raise CorruptArtifact(f"{about.name} has the impossible shape {about.shape!r:.200}.", REMEDY)
        if about.details is None:
            own, place = beside[about.name], places[about.name]
            size = math.prod(about.shape) * DTYPES[about.dtype].itemsize
            if (place.dtype, place.shape, len(own), about.size) != (about.dtype, about.shape, size, size):
                raise CorruptArtifact(f"{about.name} is not as its description says.", REMEDY)
        else:
            own = streams[begin : begin + about.size]
            begin += about.size
        tensors.append(Packed(about.name, DTYPES[about.dtype], tuple(about.shape), own, about.details))
    if begin != len(streams):
        raise CorruptArtifact("The compressed adapter's streams are not as long as its description says.", REMEDY)
    return tuple(tensors)


def _header(checksum: str, places: Iterable[tuple[str, str, Iterable[int], int]], form: str = FORMAT) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"regraft": form, "sha256": checksum}}
    begin = 0
    for name, code, shape, size in places:
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
