"""Which format a file or folder that somebody brings is of, by the names in it; no tensor is read."""

import json
from enum import StrEnum
from pathlib import Path

from safetensors import SafetensorError, safe_open

from infra.errors import CorruptArtifact, InvalidInput, NotFound
from training.interchange import mlx
from training.interchange.legacy_pickle import PICKLE_FILE
from training.methods.contract import CONFIG_FILE, TENSORS_FILE

_LARGEST_CONFIG = 16 << 20  # bytes


class Format(StrEnum):
    """What adapters come as, told for people."""

    PEFT = "a peft folder"
    PEFT_PICKLE = "a peft folder with pickled weights (adapter_model.bin)"
    MLX = "an MLX adapter"
    KOHYA = "a kohya LoRA file"
    DIFFUSERS = "a diffusers LoRA file"
    MODEL = "a whole model"


def recognise(path: Path) -> tuple[Format, Path]:
    """The format, and the folder or file to read.

    Raises:
        NotFound: there is nothing.
        InvalidInput: nothing that is known; says what is.
        CorruptArtifact: a file that is no safetensors file.
    """
    if not path.exists():
        raise NotFound(f"{path} is not there.", "Check the path; relative paths start at the working directory.")
    if path.is_file():
        return _of_file(path), path
    if (path / mlx.TENSORS_FILE).is_file() and (path / CONFIG_FILE).is_file():
        return Format.MLX, path
    if (path / CONFIG_FILE).is_file():
        is_old = (path / PICKLE_FILE).is_file() and not (path / TENSORS_FILE).exists()
        return (Format.PEFT_PICKLE if is_old else Format.PEFT), path
    if (path / mlx.TENSORS_FILE).is_file():
        raise _half_of_mlx(path / mlx.TENSORS_FILE)
    if (path / "config.json").is_file():
        return Format.MODEL, path
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return _of_file(files[0]), files[0]
    raise InvalidInput(f"{path} holds no adapter that is known here.", _KNOWN)


def _of_file(file: Path) -> Format:
    if file.suffix != ".safetensors":
        raise InvalidInput(f"{file} is no safetensors file.", _KNOWN)
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CorruptArtifact(f"{file} is not a whole safetensors file ({error}).", "Copy it again.") from None
    if any(name.endswith((".lora_A.weight", ".lora.down.weight")) for name in names):
        return Format.DIFFUSERS
    if any(name.startswith("lora_") for name in names):
        return Format.KOHYA
    if any(name.endswith(".lora_a") for name in names):
        raise _half_of_mlx(file)
    raise InvalidInput(
        f"{file} holds no LoRA that is known here; its first tensor is {next(iter(names), '–')}.", _KNOWN
    )


def _half_of_mlx(file: Path) -> InvalidInput:
    return InvalidInput(
        f"{file} is half of an MLX adapter: its rank and scale stand in the {CONFIG_FILE} beside it.",
        f"Name a folder that holds {mlx.TENSORS_FILE} and {CONFIG_FILE}.",
    )


def read_config(path: Path) -> dict[str, object]:
    """A JSON object of bounded size.

    Raises:
        CorruptArtifact: anything else.
    """
    if path.stat().st_size > _LARGEST_CONFIG:
        raise CorruptArtifact(f"{path} has {path.stat().st_size:,} bytes.", "Is it the right file?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptArtifact(f"{path} is not JSON ({error}).", "Copy it again from where it was made.") from None
    if not isinstance(content, dict):
        raise CorruptArtifact(f"{path} holds {type(content).__name__}, not a JSON object.", "Is it the right file?")
    return content


_KNOWN = (
    "Known are: a peft folder, an MLX adapter (adapters.safetensors), a kohya or diffusers .safetensors file, "
    "a model folder."
)
