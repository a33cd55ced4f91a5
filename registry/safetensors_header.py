"""The header of a safetensors file, read as something untrusted. No tensor is loaded and no tensor library is imported.

Format: https://github.com/huggingface/safetensors#format. A little-endian 64-bit length N, then N bytes of JSON
`{NAME: {"dtype": …, "shape": […], "data_offsets": [BEGIN, END]}, "__metadata__": {TEXT: TEXT}}`, then the data, which
the tensors must tile without gap or overlap up to the file's last byte. What is accepted here the library accepts too;
this is stricter about duplicate keys, names and unknown fields.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from infra.errors import CorruptArtifact

LONGEST_HEADER = 100_000_000  # bytes; the library's own limit
MOST_ELEMENTS = 2**63 - 1
_CODES_BY_BITS = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "U16 I16 F16 BF16",
    32: "U32 I32 F32",
    64: "U64 I64 F64 C64",
}
DTYPE_BITS = {code: bits for bits, codes in _CODES_BY_BITS.items() for code in codes.split()}
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,1024}")


@dataclass(frozen=True)
class Tensor:
    """One tensor's place: safetensors dtype code, shape, and the file offsets [begin, end) of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name, in the order of their bytes.

    Raises:
        CorruptArtifact: the file is truncated, has bytes to spare, or its header is malformed or contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = _header_length(file, size, path)
        text = file.read(length)
    try:
        entries = _parse(text)
        tensors = {name: _tensor(name, entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"}
        _check_metadata(entries.get("__metadata__", {}))
        ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
        _check_tiling(ordered, 8 + length, size)
    except _MalformedError as problem:
        raise CorruptArtifact(f"{path} is not a sound safetensors file: {problem}.", REMEDY) from None
    return ordered


def tensor_sha256(path: Path, tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in _slice(file, tensor.begin, tensor.end):
            digest.update(chunk)
    return digest.hexdigest()


REMEDY = "Copy or download it again; if it was trained here, store it again."


class _MalformedError(Exception):
    """What is wrong with a header, as the end of a sentence."""


def _header_length(file: BinaryIO, size: int, path: Path) -> int:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8:
        raise CorruptArtifact(f"{path} is not a safetensors file: it has only {len(prefix)} bytes.", REMEDY)
    if length > LONGEST_HEADER or length > size - 8:
        raise CorruptArtifact(
            f"{path} is truncated or not a safetensors file: it announces a header of {length:,} bytes, "
            f"{size - 8:,} follow, and {LONGEST_HEADER:,} are allowed.",
            REMEDY,
        )
    return length


def _parse(text: bytes) -> dict[str, object]:
    if not text.startswith(b"{"):
        raise _MalformedError("its header does not begin with '{'")
    try:
        return strict_json_object(text)
    except ValueError as error:
        raise _MalformedError(f"its header is not a JSON object ({error})") from None


def strict_json_object(text: bytes) -> dict[str, object]:
    """A JSON object in UTF-8, without duplicate keys, NaN or infinities.

    Raises:
        ValueError: anything else, however deep or long; says what.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice!r:.100} appears twice")
        return result

    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not JSON")

    def integer(digits: str) -> int | float:
        return -0.0 if digits == "-0" else int(digits)  # what safetensors' own reader takes it for

    try:
        document = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_int=integer)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("it holds another kind of value")
    return document


def _tensor(name: str, entry: object, data_begin: int) -> Tensor:
    if not _NAME.fullmatch(name):
        raise _MalformedError(f"the tensor name {name!r:.200} holds other characters than letters, digits and . _ : -")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _MalformedError(f"{name} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _MalformedError(f"{name} has the unknown dtype {dtype!r:.50}")
    if not _are_counts(shape):
        raise _MalformedError(f"{name} has the impossible shape {shape!r:.200}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _MalformedError(f"{name} has the impossible data_offsets {offsets!r:.200}")
    elements = 1
    for extent in shape:
        elements *= extent
        if elements > MOST_ELEMENTS:
            raise _MalformedError(f"{name} claims more than 2^63 elements")
    bits = elements * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _MalformedError(
            f"{name} ({dtype}, shape {list(shape)!r:.200}) takes {bits / 8:,g} bytes, "
            f"but {offsets[1] - offsets[0]:,} are set aside for it"
        )
    return Tensor(dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MOST_ELEMENTS for item in value)


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _MalformedError("its __metadata__ is not a mapping of texts")
    try:
        "".join([*metadata, *metadata.values()]).encode()
    except UnicodeEncodeError:
        raise _MalformedError("its __metadata__ holds half a character") from None


def _check_tiling(ordered: dict[str, Tensor], begin: int, size: int) -> None:
    for name, tensor in ordered.items():
        if tensor.begin != begin:
            kind = "overlap those before it" if tensor.begin < begin else "leave a gap before it"
            raise _MalformedError(f"the bytes of {name} {kind}")
        begin = tensor.end
    if begin != size:
        kind = "is truncated" if begin > size else "has bytes to spare"
        raise _MalformedError(f"the file {kind}: its tensors end at byte {begin:,} and the file at {size:,}")


def _slice(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    file.seek(begin)
    while begin < end and (chunk := file.read(min(1 << 20, end - begin))):
        begin += len(chunk)
        yield chunk
