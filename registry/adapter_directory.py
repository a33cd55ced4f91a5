"""An adapter directory (HF PEFT's layout) as something untrusted until checked.

`adapter_config.json`, `adapter_model.safetensors` and, if Regraft made it, `regraft.json`; tokenizer files, cards and
the like may lie beside them. Nothing here can run code: no pickle is opened, no tensor is loaded.
"""

import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from infra.errors import CorruptArtifact, InvalidInput
from registry.content_store import regular_files
from registry.safetensors_header import Tensor, read_header, strict_json_object, tensor_sha256

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
REGRAFT_FILE = "regraft.json"
LARGEST_JSON = 16 << 20  # bytes

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npz"}
_PROGRAM_SUFFIXES = {".py", ".pyc", ".pyd", ".so", ".dylib", ".dll", ".exe", ".sh", ".bat", ".ps1", ".js", ".jar"}
_DATA_SUFFIXES = {".json", ".jsonl", ".safetensors", ".txt", ".md", ".yaml", ".yml", ".jinja", ".model", ".png", ".csv"}
_PROGRAM_START = re.compile(rb"\x7fELF|MZ.{0,13}\0|#! ?/|\xca\xfe\xba\xbe|[\xce\xcf]\xfa\xed\xfe", re.DOTALL)
_PICKLE_START = re.compile(rb"\x80[\x02-\x05]")
_TORCH_DTYPES = {
    "bool": "BOOL",
    "bfloat16": "BF16",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
CONVERSION = (
    "import torch; from safetensors.torch import save_file; "
    "tensors = torch.load('{source}', map_location='cpu', weights_only=True); "
    "save_file({{name: tensor.clone().contiguous() for name, tensor in tensors.items()}}, 'adapter_model.safetensors')"
)


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter directory holds, after every check.

    Attributes:
        config: `adapter_config.json`.
        regraft: `regraft.json`, or None where there is none.
        tensors: safetensors dtype code and shape by name.
        parameters: elements of all tensors together.
        files: POSIX paths of all files, sorted.
    """

    config: dict[str, object]
    regraft: dict[str, object] | None
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    parameters: int
    files: tuple[str, ...]


def inspect_adapter(directory: Path) -> AdapterFiles:
    """Check an adapter directory and say what is in it.

    Raises:
        NotFound: no such directory.
        InvalidInput: a required file is missing, a JSON file is malformed or too large, or there is a link in it.
        CorruptArtifact: weights that are truncated, malformed or not those of `regraft.json`; a pickle; a program.
    """
    files = regular_files(directory)
    for path, file in files.items():
        _refuse_pickle(path, file, directory)
        _refuse_program(path, file)
    for required in (CONFIG_FILE, WEIGHTS_FILE):
        if required not in files:
            raise InvalidInput(
                f"{directory} is not an adapter: it has no {required}.",
                "An adapter is a directory as peft's save_pretrained() writes it, with safetensors weights.",
            )
    config = _read_json(files[CONFIG_FILE])
    regraft = _read_json(files[REGRAFT_FILE]) if REGRAFT_FILE in files else None
    headers = {path: read_header(file) for path, file in files.items() if path.endswith(".safetensors")}
    tensors = headers[WEIGHTS_FILE]
    if not tensors:
        raise CorruptArtifact(f"{files[WEIGHTS_FILE]} holds no tensor.", "Save the adapter again.")
    if regraft is not None and "tensors" in regraft:
        _check_promised(regraft["tensors"], tensors, files[WEIGHTS_FILE])
    return AdapterFiles(
        config=config,
        regraft=regraft,
        tensors={name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()},
        parameters=sum(tensor.elements for tensor in tensors.values()),
        files=tuple(files),
    )


def _refuse_pickle(path: str, file: Path, directory: Path) -> None:
    start = _start(file)
    suffix = PurePosixPath(path).suffix.lower()
    # A sound header of 640, 896, 1152 or 1408 bytes begins like a pickle; its ninth byte is the brace of the JSON.
    is_header = suffix == ".safetensors" and start[8:9] == b"{"
    looks_pickled = start.startswith(b"PK\x03\x04") or bool(_PICKLE_START.match(start))
    if suffix not in _PICKLE_SUFFIXES and (is_header or not looks_pickled):
        return
    if path == WEIGHTS_FILE or not (directory / WEIGHTS_FILE).exists():
        source = "adapter_model.bin" if path == WEIGHTS_FILE else path
        rename = f"mv {WEIGHTS_FILE} {source} && " if path == WEIGHTS_FILE else ""
        remedy = (
            "Convert it on a machine where it may do no harm, then take it out of the directory:\n"
            f'  {rename}python -c "{CONVERSION.format(source=source)}" && rm {source}'
        )
    else:
        remedy = f"The adapter does not need it; take it away: rm {file}"
    raise CorruptArtifact(
        f"{file} is a pickle, or an archive that may hold some. Opening one can run any code; "
        "Regraft takes safetensors only.",
        remedy,
    )


def _refuse_program(path: str, file: Path) -> None:
    suffix = PurePosixPath(path).suffix.lower()
    # The mode bit alone says little about data: some file systems set it on everything.
    marked = bool(file.stat().st_mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)) and suffix not in _DATA_SUFFIXES
    if marked or suffix in _PROGRAM_SUFFIXES or (suffix != ".safetensors" and _PROGRAM_START.match(_start(file))):
        raise CorruptArtifact(
            f"{file} is a program, and an adapter has no use for one.", f"If you know why it is there: rm {file}"
        )


def _start(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(16)


def _read_json(file: Path) -> dict[str, object]:
    size = file.stat().st_size
    if size > LARGEST_JSON:
        raise InvalidInput(f"{file} has {size:,} bytes; {LARGEST_JSON:,} are allowed.", "Is it the right file?")
    try:
        return strict_json_object(file.read_bytes())
    except ValueError as error:
        raise InvalidInput(f"{file} is not a JSON object: {error}.", "Mend it, or save the adapter again.") from None


def _check_promised(promised: object, tensors: dict[str, Tensor], weights: Path) -> None:
    """Compare the weights with the tensor manifest {name: {dtype, shape, sha256?}} of `regraft.json`."""
    remedy = f"{REGRAFT_FILE} and {WEIGHTS_FILE} do not belong together: restore both from where they were made."
    if not isinstance(promised, dict):
        raise InvalidInput(f"'tensors' in {weights.with_name(REGRAFT_FILE)} is not a mapping of tensor names.", remedy)
    for kind, names in (("lacks", promised.keys() - tensors.keys()), ("has besides", tensors.keys() - promised.keys())):
        if names:
            raise CorruptArtifact(f"{weights} {kind} {_listed(names)}, going by {REGRAFT_FILE}.", remedy)
    for name, tensor in tensors.items():
        entry = promised[name]
        if not isinstance(entry, dict) or not {"dtype", "shape"} <= set(entry) <= {"dtype", "shape", "sha256"}:
            raise InvalidInput(f"tensors.{name} in {REGRAFT_FILE} is not made of dtype, shape and sha256.", remedy)
        dtype = _TORCH_DTYPES.get(str(entry["dtype"]).removeprefix("torch."), entry["dtype"])
        if (dtype, entry["shape"]) != (tensor.dtype, list(tensor.shape)):
            raise CorruptArtifact(
                f"{name} in {weights} is {tensor.dtype} {list(tensor.shape)}; "
                f"{REGRAFT_FILE} says {entry['dtype']} {entry['shape']!r:.200}.",
                remedy,
            )
        if "sha256" in entry and entry["sha256"] != (actual := tensor_sha256(weights, tensor)):
            raise CorruptArtifact(
                f"{name} in {weights} fails its checksum: {str(entry['sha256'])[:12]}… was recorded, "
                f"its bytes hash to {actual[:12]}….",
                remedy,
            )


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
