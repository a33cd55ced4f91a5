"""A model with an adapter folded in, as a folder that transformers loads without knowing of adapters."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from infra.errors import NotMergeable
from infra.folders import require_free
from training.methods.contract import Adapted
from training.methods.targets import output_embeddings


def write_merged_model(adapted: Adapted, tokenizer: Any, directory: Path) -> None:
    """Write the merged model and its tokenizer or image processor; the folder is there when all of it is.

    Args:
        adapted: left as it was; needs memory for two more base models.
        tokenizer: of the base, or None where it has none.
        directory: new or empty.

    Raises:
        NotMergeable: the update is no change of weights, or one that the architecture, loaded anew, has no place for.
        Conflict: the directory holds something, or is none.
    """
    require_free(directory)
    merged: Any = adapted.merge()
    if merged.config.tie_word_embeddings and not _tied(merged):
        merged.config.tie_word_embeddings = False  # or it would be tied again when it is loaded
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _quiet(), TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as staging:
        written = Path(staging) / "model"
        merged.save_pretrained(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        lost = _lost(merged, written)
        if lost:
            raise NotMergeable(
                f"Adapter '{adapted.name}', merged, changes what {type(merged).__name__} does not store: "
                f"{', '.join(lost[:3])}{' and more' if len(lost) > 3 else ''}.",
                "Export it without --merged. Trained without biases (ssf: shift: false, hydra: bias: false), it would "
                "merge.",
            )
        written.replace(directory)


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


def _lost(model: nn.Module, directory: Path) -> list[str]:
    """The tensors of `model` that are missing, or others, in what transformers loads from `directory`."""
    stored = type(model).from_pretrained(directory, dtype="auto").state_dict()  # type: ignore[attr-defined]
    return [
        name
        for name, tensor in model.state_dict().items()
        if name not in stored or not torch.equal(stored[name], tensor.cpu())
    ]
