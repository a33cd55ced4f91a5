"""peft's old adapter_model.bin, converted to safetensors without running what may hide in it.

torch's restricted unpickler (`weights_only=True`, torch ≥ 2.6) knows tensors and plain containers and calls nothing
else, so reading such a file is safe enough to do unasked; one that asks for more is refused, and says for what. Before
it is opened at all, it must be an uncompressed zip archive of torch's, so that it cannot unfold to more than its own
size; after, a flat mapping of names to dense tensors that are no larger than the file (a tensor may claim any shape
over one stored number). Everywhere else a pickle stays refused unopened.
"""

import pickle
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from infra.errors import CorruptArtifact
from training.methods.contract import CONFIG_FILE, TENSORS_FILE
from training.methods.foreign_config import RESTORE

PICKLE_FILE = "adapter_model.bin"


def convert_pickle(directory: Path, converted: Path) -> None:
    """Write the adapter of `directory` anew, as adapter_config.json and safetensors, into the new folder `converted`.

    Raises:
        CorruptArtifact: not such a file, a damaged one, or one that would run code; nothing was run.
    """
    tensors = _read(directory / PICKLE_FILE)
    converted.mkdir(parents=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, converted / TENSORS_FILE)
    shutil.copyfile(directory / CONFIG_FILE, converted / CONFIG_FILE)


def _read(file: Path) -> dict[str, Tensor]:
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        is_older = file.read_bytes()[:1] == b"\x80"  # a bare pickle, as torch wrote them before 1.6
        raise _refused(file, f"it is no archive of torch's ({error})", _SAVE_AGAIN if is_older else RESTORE) from None
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise _refused(file, "it is compressed, which torch's own files never are")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(file, f"it holds more than tensors: {_first_line(error)}") from None
    except Exception as error:  # its readers raise whatever they trip over
        raise _refused(file, f"it is damaged: {_first_line(error)}", RESTORE) from None
    if not isinstance(content, dict) or not content:
        raise _refused(file, "it is no mapping of names to tensors")
    total = 0
    for name, tensor in content.items():
        if (
            not isinstance(name, str)
            or type(tensor) not in (Tensor, torch.nn.Parameter)
            or tensor.layout != torch.strided
        ):
            raise _refused(file, f"{name!r:.80} is no dense tensor")
        if tensor.is_quantized or tensor.is_meta:
            raise _refused(file, f"{name!r:.80} is no plain tensor")
        total += tensor.numel() * tensor.element_size()
    if total > size:
        raise _refused(file, "its tensors claim to be larger than the file")
    return {name: tensor.detach() for name, tensor in content.items()}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else "")
    return (told or type(error).__name__)[:200].rstrip(".")


_SAVE_AGAIN = "Where you trust it, load it with the peft that wrote it and save it again: it writes safetensors today."


def _refused(file: Path, why: str, remedy: str = _SAVE_AGAIN) -> CorruptArtifact:
    return CorruptArtifact(f"{file} was not read: {why}.", remedy)
