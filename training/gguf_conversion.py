"""GGUF files, de-quantised once into a cache of safetensors folders that load in half a second."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as remembering
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from infra.errors import CorruptArtifact, InvalidInput, NotFound, RegraftError
from training.base_identity import file_sha256, remembered

log = logging.getLogger(__name__)


def converted_folder(gguf: Path, cache: Path) -> tuple[Path, str]:
    """The safetensors folder of a GGUF file, converted if this content never was.

    Returns:
        the folder (config, float32 weights, generation config, tokenizer with its chat template) and the file's sha256.

    Raises:
        NotFound: no such file.
        InvalidInput: not a GGUF file, or an architecture that transformers cannot read.
        CorruptArtifact: a damaged GGUF file.
    """
    if not gguf.is_file():
        raise NotFound(f"GGUF file {gguf} is not there.", "Check the path.")
    found = remembered(cache, f"gguf {gguf.resolve()}", [gguf], lambda: {"sha256": file_sha256(gguf)})
    return convert_once(found["sha256"], cache, lambda scratch: gguf), found["sha256"]


def convert_once(sha256: str, cache: Path, obtain: Callable[[Path], Path]) -> Path:
    """The folder for the GGUF file with this sha256; `obtain(scratch)` says where the file is, if it is needed.

    Whoever holds the lock converts into a scratch folder and renames it into place, so that a folder which is there is
    whole: others wait and find it, and what a killed conversion left behind is swept away by the next one.
    """
    root = cache / "gguf"
    folder = root / sha256
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{sha256}.lock"):
        if not folder.is_dir():
            scratch = root / f"{sha256}.partial"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                _convert(obtain(scratch), scratch / "model")
                _flush(scratch / "model")
                (scratch / "model").rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(gguf: Path, target: Path) -> None:
    with gguf.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InvalidInput(f"{gguf} is not a GGUF file.", "Give a .gguf file, or path:FOLDER for safetensors.")
    log.info("De-quantising %s: done once, then cached.", gguf.name)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with without_loading_bars(), _read_once():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),  # a plain model, which can be saved
            )
    except Exception as error:  # its readers raise whatever they trip over, bare Exception among it
        if "not supported" in str(error):
            raise InvalidInput(f"{gguf}: {error}", "Give the safetensors of this model instead.") from error
        raise CorruptArtifact(f"{gguf} cannot be read: {error}", "Is it whole? Fetch it again.") from error
    try:
        with without_loading_bars():
            model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except (OSError, SafetensorError) as error:  # a full disk, above all
        raise RegraftError(
            f"The converted weights of {gguf.name} cannot be written to {target.parent.parent}: {error}",
            "Free disk space (float32 weights take 4 bytes a parameter), or choose another disk with REGRAFT_HOME.",
        ) from error


@contextmanager
def _read_once() -> Iterator[None]:
    """Within it, transformers parses a file's header once and fast: thrice is half a minute for a large vocabulary."""
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        """Reads plain memory: every slice of a `memmap` becomes a `memmap`, which takes three times as long."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    usual = gguf.GGUFReader
    gguf.GGUFReader = remembering(Reader)
    try:
        yield
    finally:
        gguf.GGUFReader = usual


def _flush(folder: Path) -> None:
    """Have the files on the disk before the folder gets its name: a power cut must not leave a hollow model."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """transformers draws a bar for every load; half a second needs none."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
