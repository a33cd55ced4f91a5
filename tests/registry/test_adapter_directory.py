"""Adapter directories as something untrusted; safetensors' own reader is the oracle for headers."""

import hashlib
import json
import pickle
import struct
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from infra.errors import CorruptArtifact, InvalidInput, NotFound, RegraftError
from registry.adapter_directory import CONVERSION, inspect_adapter
from registry.safetensors_header import DTYPE_BITS, read_header

NUMPY_DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "bool"]
Description = dict[str, tuple[str, tuple[int, ...]]]


def tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "base_model.model.layers.0.q_proj.lora_A.weight": generator.standard_normal((8, 16)).astype(np.float32),
        "base_model.model.layers.0.q_proj.lora_B.weight": generator.standard_normal((16, 8)).astype(np.float16),
        "scale": np.array(2.0),
        "none": np.zeros((0, 3), np.int8),
    }


def promised(arrays: dict[str, np.ndarray], dtypes: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {
        name: {"dtype": dtypes[name], "shape": list(a.shape), "sha256": hashlib.sha256(a.tobytes()).hexdigest()}
        for name, a in arrays.items()
    }


CODES = dict(zip(tensors(), ["F32", "F16", "F64", "I8"], strict=True))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    save_file(tensors(), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "regraft.json").write_text(json.dumps({"tensors": promised(tensors(), CODES)}))
    return directory


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def ours(path: Path) -> Description:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in read_header(path).items()}


def theirs(path: Path) -> Description:
    with safe_open(path, "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 — not a mapping
        return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}


def test_a_sound_adapter_is_described(adapter: Path) -> None:
    (adapter / "kit").mkdir()
    (adapter / "kit" / "seeds.jsonl").write_text("{}")
    found = inspect_adapter(adapter)
    assert found.config == {"peft_type": "LORA", "r": 8}
    assert found.regraft is not None and set(found.regraft) == {"tensors"}
    assert found.tensors == {name: (CODES[name], array.shape) for name, array in tensors().items()}
    assert found.parameters == sum(array.size for array in tensors().values())
    assert found.files == ("adapter_config.json", "adapter_model.safetensors", "kit/seeds.jsonl", "regraft.json")
    (adapter / "regraft.json").unlink()
    assert inspect_adapter(adapter).regraft is None


@given(
    st.dictionaries(
        st.text("abcXYZ019_.", min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(NUMPY_DTYPES), st.lists(st.integers(0, 5), max_size=4)),
        max_size=6,
    ),
    st.none() | st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))),
)
@settings(deadline=None)
def test_what_safetensors_writes_is_read_as_safetensors_reads_it(
    contents: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None
) -> None:
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in contents.items()}
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(save(arrays, metadata or None))  # with neither, safetensors 0.8 writes what it cannot read
        assert ours(path) == theirs(path)
        for name, tensor in read_header(path).items():
            assert path.read_bytes()[tensor.begin : tensor.end] == arrays[name].tobytes()


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_takes_the_bytes_that_the_library_says(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    size = DTYPE_BITS[dtype]  # 8 elements
    header = {"x": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]}}
    path.write_bytes(with_header(header, bytes(size)))
    assert ours(path) == theirs(path) == {"x": (dtype, (2, 4))}
    path.write_bytes(with_header({"x": {**header["x"], "data_offsets": [0, size + 1]}}, bytes(size + 1)))
    with pytest.raises(CorruptArtifact):
        read_header(path)


SOUND = save(tensors(), {"format": "pt"})
HEADER_END = 8 + struct.unpack("<Q", SOUND[:8])[0]


@given(st.integers(0, HEADER_END - 1), st.integers(1, 255))
@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_byte_changed_in_the_header_never_passes_for_other_tensors(adapter: Path, position: int, change: int) -> None:
    content = bytearray(SOUND)
    content[position] ^= change
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(content)
    expected = {name: (CODES[name], array.shape) for name, array in tensors().items()}
    try:
        described = ours(weights)
    except RegraftError:
        described = None
    if described is not None:  # a changed name may be a sound header: the library reads it too, regraft.json tells
        assert described == theirs(weights)
    try:
        found = inspect_adapter(adapter)
    except RegraftError:
        return
    assert found.tensors == expected == described


@given(st.integers(0, len(SOUND) - 1))
@settings(deadline=None)
def test_no_truncation_passes(length: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(SOUND[:length])
        with pytest.raises(CorruptArtifact):
            read_header(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(["F32", "U8", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner)
    ),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", "F99"]) | JSON,
        "shape": st.lists(st.integers(-1, 4) | st.sampled_from([2**40, 2**63]), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 24), min_size=1, max_size=3) | JSON,
    }
)


@given(JSON | st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | JSON), st.integers(0, 24))
@settings(deadline=None, max_examples=400)
def test_any_header_is_refused_or_read_as_the_library_reads_it(header: object, size: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(with_header(header, bytes(size)))
        try:
            described = ours(path)
        except CorruptArtifact:
            return
        assert described == theirs(path)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_header_reader(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(content)
        try:
            read_header(path)
        except CorruptArtifact:
            return
        assert theirs(path) is not None


U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "only 0 bytes"),
        (b"1234567", "only 7 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "announces a header"),
        (struct.pack("<Q", 3) + b"{}", "announces a header"),
        (with_header(b'[{"a": 1}]'), "begin with"),
        (with_header(b"{"), "not a JSON object"),
        (with_header(b'{"a": ' * 100_000), "nested too deeply"),
        (with_header(b'{"a": \xff}'), "not UTF-8"),
        (with_header(b'{"__metadata__": {"x": NaN}}'), "NaN"),
        (with_header(f'{{"a": {json.dumps(U8)}, "a": {json.dumps(U8)}}}'.encode(), b"1234"), "'a' appears twice"),
        (with_header({"a": {**U8, "dtype": "F99"}}, b"1234"), "unknown dtype"),
        (with_header({"a": {**U8, "dtype": ["F32"]}}, b"1234"), "unknown dtype"),
        (with_header({"a": {**U8, "shape": [-4]}}, b"1234"), "impossible shape"),
        (with_header({"a": {**U8, "shape": [True, 4]}}, b"1234"), "impossible shape"),
        (with_header({"a": {**U8, "shape": [4.0]}}, b"1234"), "impossible shape"),
        (with_header(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "impossible shape"),
        (with_header({"a": {**U8, "shape": [2**32, 2**32, 0]}}, b"1234"), "2\\^63"),
        (with_header({"a": {**U8, "shape": [5]}}, b"1234"), "takes 5 bytes"),
        (with_header({"a": {**U8, "data_offsets": [4, 0]}}, b"1234"), "impossible data_offsets"),
        (with_header({"a": {**U8, "data_offsets": [0, 4, 4]}}, b"1234"), "impossible data_offsets"),
        (with_header({"a": U8, "b": U8}, b"1234"), "overlap"),
        (with_header({"a": {**U8, "data_offsets": [1, 5]}}, b"12345"), "gap"),
        (with_header({"a": U8}, b"123"), "truncated"),
        (with_header({"a": U8}, b"12345"), "bytes to spare"),
        (with_header({"a": {**U8, "extra": 1}}, b"1234"), "alone"),
        (with_header({"a": [1]}, b"1234"), "alone"),
        (with_header({"a b": U8}, b"1234"), "tensor name"),
        (with_header({"a/../../b": U8}, b"1234"), "tensor name"),
        (with_header({"é": U8}, b"1234"), "tensor name"),
        (with_header({"": U8}, b"1234"), "tensor name"),
        (with_header({"a": U8, "__metadata__": {"x": 1}}, b"1234"), "__metadata__"),
        (with_header({"a": U8, "__metadata__": {"x": "\ud800"}}, b"1234"), "half a character"),
        (with_header({}), "holds no tensor"),
    ],
)
def test_a_malformed_file_is_refused_with_the_reason(adapter: Path, content: bytes, words: str) -> None:
    (adapter / "regraft.json").unlink()
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(CorruptArtifact, match=words):
        inspect_adapter(adapter)


def test_a_header_of_hundred_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)  # a hole: no disk is used
    with pytest.raises(CorruptArtifact, match="100,000,000 are allowed"):
        read_header(path)
    with pytest.raises(SafetensorError):
        theirs(path)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter: Path, missing: str) -> None:
    (adapter / missing).unlink()
    with pytest.raises(InvalidInput, match=missing):
        inspect_adapter(adapter)


def test_a_missing_directory_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        inspect_adapter(tmp_path / "nowhere")


class Trap:
    """Unpickling this would touch a file."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.touched,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "x.PKL", "kit/d.ckpt", "training_args.bin", "no_suffix"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_is_refused_unopened(adapter: Path, tmp_path: Path, name: str, protocol: int) -> None:
    offered = adapter / name
    offered.parent.mkdir(exist_ok=True)
    offered.write_bytes(pickle.dumps(Trap(tmp_path / "touched"), protocol))
    with pytest.raises(CorruptArtifact, match="pickle") as caught:
        inspect_adapter(adapter)
    assert caught.value.remedy == f"The adapter does not need it; take it away: rm {offered}"  # not over the weights
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_a_pickle_under_the_name_of_the_weights_is_refused(adapter: Path, tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps(Trap(tmp_path / "touched"), protocol)
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(CorruptArtifact, match="pickle" if protocol else "safetensors"):
        inspect_adapter(adapter)
    with zipfile.ZipFile(adapter / "adapter_model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with pytest.raises(CorruptArtifact, match="pickle"):
        inspect_adapter(adapter)
    assert not (tmp_path / "touched").exists()


def test_the_conversion_that_is_advised_works(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.arange(6.0).reshape(2, 3)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "regraft.json").unlink()
    torch.save({"a": weight.T, "b": weight, "c": weight}, adapter / "adapter_model.bin")
    with pytest.raises(CorruptArtifact) as caught:
        inspect_adapter(adapter)
    advised = CONVERSION.format(source="adapter_model.bin")
    assert advised in caught.value.remedy
    monkeypatch.chdir(adapter)
    exec(advised, {})
    (adapter / "adapter_model.bin").unlink()
    assert inspect_adapter(adapter).tensors == {"a": ("F32", (3, 2)), "b": ("F32", (2, 3)), "c": ("F32", (2, 3))}


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickle_is_no_pickle(adapter: Path, length: int) -> None:
    header = json.dumps({"a": U8}).encode()
    (adapter / "regraft.json").unlink()
    (adapter / "adapter_model.safetensors").write_bytes(with_header(header.ljust(length), b"1234"))
    assert inspect_adapter(adapter).tensors == {"a": ("U8", (4,))}


@pytest.mark.parametrize(
    ("name", "content", "mode"),
    [
        ("modeling.py", b"x = 1", 0o644),
        ("lib.so", b"", 0o644),
        ("README.md", b"#!/bin/sh\n", 0o644),
        ("data", b"\x7fELF\x02", 0o644),
        ("data", b"MZ\x90\0\x03\0\0\0\x04\0", 0o644),
        ("run", b"echo", 0o755),
    ],
)
def test_a_program_is_refused(adapter: Path, name: str, content: bytes, mode: int) -> None:
    (adapter / name).write_bytes(content)
    (adapter / name).chmod(mode)
    with pytest.raises(CorruptArtifact, match="is a program"):
        inspect_adapter(adapter)


def test_data_marked_executable_by_its_file_system_is_accepted(adapter: Path) -> None:
    for path in adapter.iterdir():
        path.chmod(0o755)
    assert inspect_adapter(adapter).tensors


def test_text_that_only_begins_like_a_program_is_accepted(adapter: Path) -> None:
    (adapter / "README.md").write_text("MZ is the name of this adapter.")
    assert "README.md" in inspect_adapter(adapter).files


def test_every_safetensors_file_is_checked(adapter: Path) -> None:
    (adapter / "kit").mkdir()
    (adapter / "kit" / "discriminator.safetensors").write_bytes(SOUND[:-1])
    with pytest.raises(CorruptArtifact, match="discriminator"):
        inspect_adapter(adapter)


def test_a_link_is_refused(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInput, match="symbolic link"):
        inspect_adapter(adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "regraft.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a JSON object"),
        (b"[]", "another kind"),
        (b'{"r": 8, "r": 9}', "'r' appears twice"),
        (b'{"r": Infinity}', "Infinity"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
        (b"\xff\xfe", "UTF-8"),
        (b" " * (16 << 20) + b"{}", "are allowed"),
    ],
)
def test_a_bad_json_file_is_refused(adapter: Path, name: str, content: bytes, words: str) -> None:
    (adapter / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=words):
        inspect_adapter(adapter)


@pytest.mark.parametrize("spelling", ["{}", "torch.{}"])
def test_the_tensor_manifest_may_speak_of_dtypes_as_torch_does(adapter: Path, spelling: str) -> None:
    words = dict(zip(tensors(), ["float32", "float16", "float64", "int8"], strict=True))
    entries = promised(tensors(), {name: spelling.format(word) for name, word in words.items()})
    (adapter / "regraft.json").write_text(json.dumps({"tensors": entries}))
    assert inspect_adapter(adapter).parameters == 257


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entries: entries.pop("scale"), "has besides scale"),
        (lambda entries: entries.update(extra={"dtype": "F32", "shape": []}), "lacks extra"),
        (lambda entries: entries["scale"].update(dtype="F32"), "is F64"),
        (lambda entries: entries["scale"].update(shape=[1]), "says F64 \\[1\\]"),
        (lambda entries: entries["scale"].update(sha256="0" * 64), "fails its checksum"),
        (lambda entries: entries["scale"].update(sha256=None), "fails its checksum"),
    ],
)
def test_weights_that_are_not_those_of_the_tensor_manifest_are_refused(adapter: Path, change: Any, words: str) -> None:
    entries = promised(tensors(), CODES)
    change(entries)
    (adapter / "regraft.json").write_text(json.dumps({"tensors": entries}))
    with pytest.raises(CorruptArtifact, match=words):
        inspect_adapter(adapter)


@pytest.mark.parametrize("entries", [[], 3, None, {**promised(tensors(), CODES), "scale": []}])
def test_a_malformed_tensor_manifest_is_refused(adapter: Path, entries: object) -> None:
    (adapter / "regraft.json").write_text(json.dumps({"tensors": entries}))
    with pytest.raises(InvalidInput, match="tensors"):
        inspect_adapter(adapter)
