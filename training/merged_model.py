"""A model with an adapter folded in, as a folder that transformers loads without knowing of adapters."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import logging

from infra.errors import InvalidInput, NotMergeable
from infra.files import require_free, whole_folder
from training.interchange.merge_proof import MergeProof, prove
from training.interchange.probes import Probe, probes
from training.interchange.weight_changes import base_tensors, parameters_of
from training.methods.contract import Adapted
from training.methods.targets import output_embeddings

SHARD_SIZE = "5GB"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def write_merged_model(
    adapted: Adapted,
    tokenizer: Any,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_size: str = SHARD_SIZE,
) -> MergeProof:
    """Write the merged model and its tokenizer or image processor; the folder is there when all of it is, and proven.

    Args:
        adapted: left as it was; needs memory for two more base models.
        tokenizer: of the base, or None where it has none.
        directory: new or empty.
        dtype: of the written weights; none given: in which `adapted` is.
        shard_size: the most that one file takes ("5GB"); see `shard_bytes`.

    Raises:
        InvalidInput: no such shard size.
        NotMergeable: the update is no change of weights, or one that the architecture, loaded anew, has no place for;
            or what was written is not the base with the adapter folded in.
        Conflict: the directory holds something, or is none.
    """
    require_free(directory)
    most = shard_bytes(shard_size)
    merged: Any = adapted.merge()
    dtype = dtype or next(p.dtype for p in merged.parameters() if p.is_floating_point())
    before = base_tensors(adapted)
    moved = {
        name for name, new in parameters_of(merged).items() if name in before and not torch.equal(new, before[name])
    }
    _cast(merged, dtype)
    if getattr(merged.config, "tie_word_embeddings", False) and not _tied(merged):
        merged.config.tie_word_embeddings = False  # or it would be tied again when it is loaded
    with _quiet(), whole_folder(directory) as written:
        merged.save_pretrained(written, max_shard_size=most)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        loaded = type(merged).from_pretrained(written, dtype="auto").eval()
        lost = _lost(merged, loaded)
        if lost:
            raise NotMergeable(
                f"Adapter '{adapted.name}', merged, changes what {type(merged).__name__} does not store: "
                f"{', '.join(lost[:3])}{' and more' if len(lost) > 3 else ''}.",
                "Export it without --to merged. Trained without biases (ssf: shift: false, hydra: bias: false), it "
                "would merge.",
            )
        return prove(adapted, loaded, moved, written, _probes(merged, tokenizer))


def shard_bytes(size: str) -> int:
    """Bytes of a size like 500MB, in powers of ten.

    Raises:
        InvalidInput: no such size, or none at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", size.strip(), re.IGNORECASE)
    count = int(float(found[1]) * 1000 ** ("KMGT".index(found[2].upper()) + 1)) if found else 0
    if count < 1:
        raise InvalidInput(f"{size!r} is not the size of a file.", "Write it like 5GB, 500MB or 40KB.")
    return count


def stored_dtype(directory: Path) -> torch.dtype | None:
    """The dtype in which a model folder holds most of its weights, by the headers of its safetensors."""
    held: dict[str, int] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                held[part.get_dtype()] = held.get(part.get_dtype(), 0) + prod(part.get_shape())
    most = max(held, key=lambda code: held[code], default="")
    return FLOATS.get(most)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: tied ones stay tied, and what a model computes with beside them (rotations) stays exact."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    config: Any = model.config
    config.dtype = dtype


def _probes(model: nn.Module, tokenizer: Any) -> list[Probe] | None:
    try:
        return probes(model, tokenizer)
    except InvalidInput:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its report of what it did not find, which `_lost` reads better."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _tied(model: Any) -> bool:
    output = output_embeddings(model)
    return output is None or getattr(output, "weight", None) is model.get_input_embeddings().weight


def _lost(model: nn.Module, loaded: nn.Module) -> list[str]:
    """The tensors of `model` that are missing, or others, in what transformers loads from where it was written."""
    stored = loaded.state_dict()
    return [
        name
        for name, tensor in model.state_dict().items()
        if name not in stored or not torch.equal(stored[name], tensor.cpu())
    ]
