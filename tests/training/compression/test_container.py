"""Headers that were made to do damage are refused before anything is taken for granted."""

import json
import tracemalloc
import zlib
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest
import torch

from infra.errors import CorruptArtifact, InvalidInput
from tests.training.compression.adapters import numbers
from training.compression import compress, container, decompress

LINES = ("compeft", "compeft:layout=bitmask", "codebook:bits=1", "groups:bits=2", "groups:bits=8,symmetric=false")
Change = Callable[[dict[str, Any]], object]


def forged(line: str, change: Change, extra: bytes = b"", form: str = container.FORMAT) -> bytes:
    """A file whose description was changed, and its checksum with it."""
    data = compress({"a": numbers("normal", (30, 40), torch.float32, 0)}, line)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    content = data[8 + length :]
    description, streams = (
        content[slice(*header[name]["data_offsets"])] for name in (container.DESCRIPTION, container.STREAMS)
    )
    told, streams = json.loads(zlib.decompress(description)), streams + extra
    told["tensors"][0]["size"] = len(streams)
    change(told)
    description = zlib.compress(json.dumps(told).encode())
    rows = {container.DESCRIPTION: description, container.STREAMS: streams}
    places = [(name, "U8", (len(row),), len(row)) for name, row in rows.items()]
    checksum = sha256(description + streams).hexdigest()
    return container._header(checksum, places, form) + description + streams


def test_forging_without_a_change_gives_a_sound_file() -> None:
    for line in LINES:
        assert decompress(forged(line, lambda description: None))["a"].shape == (30, 40)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("shape", [[10**6, 10**6], [10**12], [2**62, 2**62], [1, 1300], [30, 30], [0], [-30, -40]])
def test_a_shape_that_the_bytes_do_not_bear_out_takes_no_memory(line: str, shape: list[int]) -> None:
    data = forged(line, lambda description: description["tensors"][0].update(shape=shape))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptArtifact):
            decompress(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("line", LINES)
def test_elements_are_bounded_by_bytes_even_where_all_are_zero(line: str) -> None:
    data = compress({"a": torch.zeros(1 << 20)}, line)
    length = int.from_bytes(data[:8], "little")
    assert (len(data) - 8 - length) * 8 * 1024 >= 1 << 20


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(codec="pickle"),
        lambda d: d.update(options={"density": 2}),
        lambda d: d.update(options={"unknown": 1}),
        lambda d: d.update(unknown=1),
        lambda d: d.pop("tensors"),
        lambda d: d.update(tensors=[]),
        lambda d: d["tensors"].append(d["tensors"][0]),
        lambda d: d["tensors"][0].update(dtype="F7"),
        lambda d: d["tensors"][0].update(dtype="I64"),
        lambda d: d["tensors"][0].update(shape=[30.0, 40]),
        lambda d: d["tensors"][0].update(shape=[True]),
        lambda d: d["tensors"][0].update(size=10**12),
        lambda d: d["tensors"][0].update(size=-1),
        lambda d: d["tensors"][0].update(name="../a b"),
        lambda d: d["tensors"][0].update(details=None),
        lambda d: d["tensors"][0].update(details={}),
        lambda d: d["tensors"][0]["details"].update(scale=-1.0),
        lambda d: d["tensors"][0]["details"].update(scale="nan"),
        lambda d: d["tensors"][0]["details"].update(pieces=[]),
        lambda d: d["tensors"][0]["details"].update(pieces=[[1, 2]]),
        lambda d: d["tensors"][0]["details"].update(pieces=[[10**15, 4, 10**15]]),
        lambda d: d["tensors"][0]["details"].update(pieces=[[60, 64, 10**15]]),
        lambda d: d["tensors"][0]["details"].update(pieces=[[60, -1, 10]]),
        lambda d: d["tensors"][0]["details"]["pieces"][0].__setitem__(0, 61),
        lambda d: d["tensors"][0]["details"]["pieces"][0].__setitem__(1, 5),
        lambda d: d["tensors"][0]["details"]["pieces"].append([0, 0, 0]),
    ],
)
def test_a_description_that_contradicts_the_bytes_is_refused(change: Change) -> None:
    with pytest.raises(CorruptArtifact):
        decompress(forged("compeft", change))


def test_packed_streams_of_other_codecs_are_checked_too() -> None:
    with pytest.raises(CorruptArtifact, match="exponent"):
        decompress(forged("groups:bits=2", lambda d: d["tensors"][0].update(details={"exponent": 10**9})))
    for line in ("codebook:bits=1", "groups:bits=2", "compeft:layout=bitmask"):
        with pytest.raises(CorruptArtifact, match="a "):
            decompress(forged(line, lambda d: None, extra=b"\0"))
    infinite = torch.tensor([torch.inf]).numpy().tobytes()
    data = compress({"a": torch.zeros(8)}, "codebook:bits=1")
    changed = data[:-4] + infinite
    with pytest.raises(CorruptArtifact, match="has changed since"):
        decompress(changed)


def test_masks_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(CorruptArtifact, match="that agree"):
        decompress(forged("compeft:layout=bitmask", lambda d: d["tensors"][0].update(shape=[30, 40 - 1, 1])))


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"{}",
        b'{"__metadata__":{}}',
        b'{"__metadata__":{"regraft":"{}"}}',
        b'{"__metadata__":{"regraft":1}}',
        b'{"__metadata__":null}',
        b"\xff\xfe",
        b"1" * 5000,
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
        b'{"__metadata__":{"regraft":"1","sha256":1}}',
    ],
)
def test_a_header_that_is_none_is_refused(header: bytes) -> None:
    with pytest.raises(CorruptArtifact):
        decompress(len(header).to_bytes(8, "little") + header)


def test_a_description_that_inflates_without_end_is_refused_and_takes_no_memory() -> None:
    bomb = zlib.compress(b" " * (4 * container.LONGEST_DESCRIPTION), 9)
    places = [(container.DESCRIPTION, "U8", (len(bomb),), len(bomb)), (container.STREAMS, "U8", (0,), 0)]
    data = container._header(sha256(bomb).hexdigest(), places) + bomb
    with pytest.raises(CorruptArtifact, match="longer than it may be"):
        decompress(data)


def test_a_later_format_says_so() -> None:
    with pytest.raises(CorruptArtifact, match="is of format '2'; this version of Regraft reads 1"):
        decompress(forged("compeft", lambda description: None, form="2"))


def test_every_error_says_what_to_do() -> None:
    with pytest.raises(CorruptArtifact) as caught:
        decompress(b"")
    assert caught.value.remedy == container.REMEDY


def test_a_name_may_be_as_long_as_safetensors_checks_allow() -> None:
    name = "a" * 1024
    assert list(decompress(compress({name: torch.ones(3)}, "groups"))) == [name]
    with pytest.raises(InvalidInput):
        compress({name + "a": torch.ones(3)}, "groups")


def test_a_large_tensor_is_packed_in_pieces() -> None:
    """NumPy's share of the working set stays below 12 MiB for a tensor of 16 MiB, streams included."""
    tensor = torch.zeros(8 << 20, dtype=torch.bfloat16)
    tensor[::20] = 1
    tracemalloc.start()
    try:
        data = compress({"a": tensor}, "compeft")
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
        tracemalloc.reset_peak()
        decompress(data)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()
