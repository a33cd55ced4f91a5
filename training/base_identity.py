"""What a base model *is*: a digest of its content, whatever its name, its folder or the way its weights are sharded."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import CorruptArtifact, InvalidInput, NotFound

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
# Where a file came from and who wrote it, not what it is.
_NOISE = {"transformers_version", "_name_or_path", "name_or_path", "_model_name_or_path", "torch_dtype", "dtype"}
# Names under which a checkpoint may or may not repeat its embedding; a byte-identical repetition counts once.
_TIED = ("lm_head.weight", "embed_out.weight", "coder.embed_tokens.weight", "predictions.decoder.weight")
_ITEM_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
_ITEM_BITS |= {"U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64}
_BLOCK = 1 << 22  # bytes hashed at a time
_LONGEST_HEADER = 100_000_000  # the safetensors format's own limit, in bytes


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """Which base model this is.

    Args:
        sha256: digest of weights, configuration and tokenizer; two bases are the same if and only if it is equal.
        family: `model_type` of its configuration: llama, gemma3_text, gpt2, bert, …
        parameters: number of weights; those stored twice count once.
        revision: where it came from (hub commit, digest of the GGUF file), or None. No part of equality.
    """

    sha256: str
    family: str
    parameters: int
    revision: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.family}, {self.parameters / 1e6:.1f} M, identity {self.sha256[:4]}…{self.sha256[-2:]}"


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int  # bytes from the start of the file
    end: int


def identify(directory: Path, cache: Path, revision: str | None = None) -> BaseIdentity:
    """Identity of the model in `directory`, remembered in `cache` until one of its files changes.

    sha256 over the sorted tensors (name, dtype, shape, sha256 of the bytes), the configuration and the tokenizer files.
    JSON files count by content (key order and formatting do not matter) and without what says where they came from.

    Raises:
        NotFound: no such directory.
        InvalidInput: no config.json, or weights that are not safetensors.
        CorruptArtifact: a truncated or malformed file.
    """
    files = [directory / "config.json", *weight_files(directory), *_tokenizer_files(directory)]
    found = remembered(cache, f"identity {directory.resolve()}", files, lambda: _identity(directory))
    return BaseIdentity(found["sha256"], found["family"], found["parameters"], revision)


def remembered(
    cache: Path, subject: str, files: Iterable[Path], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """`compute()`, or what it returned last time if no file has changed since (size and times to the nanosecond).

    Kept in `cache` and not beside the files, which may belong to somebody else or be read-only.
    """
    stamp = []
    for file in files:
        status = file.stat()
        stamp.append([file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    record = cache / "remembered" / f"{hashlib.sha256(subject.encode()).hexdigest()}.json"
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        if content["stamp"] == stamp:
            return dict(content["value"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never computed, or a damaged note: compute it
    value = compute()
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"subject": subject, "stamp": stamp, "value": value}), encoding="utf-8")
    partial.replace(record)
    return value


def file_sha256(file: Path) -> str:
    """sha256 of a file's bytes, as 64 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the model: the single file, else the shards that the index names.

    Raises:
        NotFound: no such directory, or a shard that is not there.
        InvalidInput: no config.json, no safetensors.
    """
    if not directory.is_dir():
        raise NotFound(f"Base model folder {directory} is not there.", "Check the path.")
    if not (directory / "config.json").is_file():
        raise InvalidInput(
            f"{directory} is not a model folder: it has no config.json.",
            "Give the folder that save_pretrained wrote (config.json, model.safetensors, tokenizer.json).",
        )
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted({directory / Path(name).name for name in read_json(index)["weight_map"].values()})
        except (KeyError, TypeError, AttributeError):
            raise CorruptArtifact(f"{index} is not an index of safetensors shards.", "Fetch the model again.") from None
        for shard in shards:
            if not shard.is_file():
                raise NotFound(f"{shard}, a shard of the base model, is not there.", "Fetch the model again.")
        return shards
    others = sorted(directory.glob("*.safetensors"))
    if len(others) == 1:
        return others
    pickled = [*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]
    if pickled:
        raise InvalidInput(
            f"{directory} holds pickled weights ({pickled[0].name}), which can run code when read. They are refused.",
            "Convert them where you trust them: model.save_pretrained(folder) writes safetensors.",
        )
    raise InvalidInput(f"{directory} has no model.safetensors.", "Give a folder whose weights are safetensors.")


def read_json(file: Path) -> Any:
    """The JSON value in a file of a model folder.

    Raises:
        CorruptArtifact: not UTF-8 JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise CorruptArtifact(f"{file} is not valid JSON.", "Fetch the model again.") from None


def _tokenizer_files(directory: Path) -> list[Path]:
    return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]


def _identity(directory: Path) -> dict[str, Any]:
    config = _without_noise(read_json(directory / "config.json"))
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InvalidInput(f"{directory / 'config.json'} names no model_type.", "Is it a transformers model?")
    tensors = _distinct(stored for file in weight_files(directory) for stored in _read_header(file))
    content = {
        "tensors": [[tensor.name, tensor.dtype, tensor.shape, digest] for tensor, digest in tensors],
        "config": config,
        "tokenizer": {file.name: _content_digest(file) for file in _tokenizer_files(directory)},
    }
    return {
        "sha256": _digest(content),
        "family": config["model_type"],
        "parameters": sum(math.prod(tensor.shape) for tensor, _ in tensors if "F" in tensor.dtype),
    }


def _distinct(tensors: Iterable[_StoredTensor]) -> list[tuple[_StoredTensor, str]]:
    """Tensors with the sha256 of their bytes, by name; an output head that repeats the embedding is left out."""
    stored = sorted(tensors, key=lambda tensor: tensor.name)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        digests = list(pool.map(_tensor_digest, stored))
    sources = {
        (tensor.dtype, tensor.shape, digest)
        for tensor, digest in zip(stored, digests, strict=True)
        if not tensor.name.endswith(_TIED)
    }
    return [
        (tensor, digest)
        for tensor, digest in zip(stored, digests, strict=True)
        if not (tensor.name.endswith(_TIED) and (tensor.dtype, tensor.shape, digest) in sources)
    ]


def _tensor_digest(tensor: _StoredTensor) -> str:
    digest = hashlib.sha256()
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        left = tensor.end - tensor.begin
        while left and (block := stream.read(min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _read_header(file: Path) -> list[_StoredTensor]:
    """The tensors of a safetensors file: 8 bytes of header length, a JSON header, the bytes without gap or overlap."""
    broken = CorruptArtifact(f"{file} is truncated or not a safetensors file.", "Fetch or save the model again.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise broken
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            start = 8 + length
            tensors = [
                _StoredTensor(
                    name, entry["dtype"], tuple(entry["shape"]), file, *(start + n for n in entry["data_offsets"])
                )
                for name, entry in header.items()
            ]
            position = start
            for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
                wanted = math.prod(tensor.shape) * _ITEM_BITS[tensor.dtype]
                if tensor.begin != position or (tensor.end - tensor.begin) * 8 != wanted:
                    raise broken
                position = tensor.end
        except (ValueError, KeyError, TypeError, AttributeError):
            raise broken from None
    if position != size:
        raise broken
    return tensors


def _content_digest(file: Path) -> str:
    if file.suffix == ".json":
        return _digest(_without_noise(read_json(file)))
    return file_sha256(file)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _without_noise(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_noise(value) for key, value in content.items() if key not in _NOISE}
    if isinstance(content, list):
        return [_without_noise(value) for value in content]
    return content
