"""Adapter directories: PEFT's layout, and beside it regraft.json with where the adapter came from.

adapter_config.json          as peft writes it
adapter_model.safetensors    as peft writes it
regraft.json                 recipe, base model, tensor manifest, metrics, versions
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from infra.documents import told
from infra.errors import BaseModelMismatch, CorruptArtifact, InvalidInput, NotFound
from infra.files import require_free
from training.methods.catalog import CATALOG, get_method
from training.methods.contract import CONFIG_FILE, TENSORS_FILE, Adapted, stored_config, written_config, written_tensors

DETAILS_FILE = "regraft.json"
FORMAT = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class StoredBase(_Part):
    """The base model that an adapter was trained on."""

    reference: str
    identity: str


class StoredTensor(_Part):
    """One line of the manifest; sha256 is of the tensor's bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class StoredAdapter(_Part):
    """What a directory says of its adapter; a foreign one (peft's own) says no more than the method."""

    format: int = FORMAT
    method: str
    base: StoredBase | None = None
    recipe: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    tensors: dict[str, StoredTensor] = {}
    versions: dict[str, str] = {}

    @property
    def base_identity(self) -> str | None:
        """The base model's content hash, where it is known."""
        return self.base.identity if self.base else None

    @property
    def is_foreign(self) -> bool:
        """Written by peft, not by Regraft."""
        return self.base is None


def write_adapter(
    directory: Path,
    save: Callable[[Path], None],
    method_name: str | None,
    base_identity: str,
    base_reference: str,
    recipe: dict[str, Any],
    metrics: dict[str, float],
) -> StoredAdapter:
    """Write an adapter directory, whole or not at all.

    Args:
        directory: new or empty.
        save: writes adapter_config.json and adapter_model.safetensors into a folder, as `Adapted.save` does.
        method_name: in the catalogue; None for the one that recognises what is written.
        base_identity: content hash of the base model.
        base_reference: of the base model.
        recipe: as it is stored.
        metrics: what is to stand in the files.

    Raises:
        Conflict: `directory` holds something already.
    """
    require_free(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    try:
        save(partial)
        content = written_config(partial)
        content["base_model_name_or_path"] = base_reference.removeprefix("hf:").removeprefix("path:")
        _write_json(partial / CONFIG_FILE, content)
        details = StoredAdapter(
            method=method_name or _method_of(stored_config(partial)),
            base=StoredBase(reference=base_reference, identity=base_identity),
            recipe=recipe,
            metrics=metrics,
            tensors={name: _describe(tensor) for name, tensor in written_tensors(partial).items()},
            versions={package: version(package) for package in ("regraft", "torch", "transformers", "peft")},
        )
        _write_json(partial / DETAILS_FILE, details.model_dump(mode="json"))
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        partial.replace(directory)
        _flush(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return details


def read_adapter(directory: Path) -> StoredAdapter:
    """What an adapter directory says of itself; its tensors are not read.

    Raises:
        NotFound: no such directory.
        CorruptArtifact: a file is missing or cannot be read.
        InvalidInput: an adapter of a method, or in a format, that this Regraft does not know.
    """
    if not directory.is_dir():
        raise NotFound(
            f"{directory} is not a directory.", "Check the path; relative paths start at the working directory."
        )
    path = directory / DETAILS_FILE
    if not path.exists():
        return StoredAdapter(method=_method_of(stored_config(directory)))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
            raise InvalidInput(
                f"{path} is of format {content['format']}; this Regraft reads {FORMAT}.", "Upgrade Regraft."
            )
        stored = StoredAdapter.model_validate(content)
    except (UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        raise CorruptArtifact(f"{path} cannot be read: {told(error)}.", "Copy it again from where it was.") from None
    if stored.base is None:
        raise CorruptArtifact(f"{path} does not name the base model.", "Restore it from where it was copied.")
    return stored


def attach_stored(model: nn.Module, directory: Path, *, base_identity: str | None, name: str = "default") -> Adapted:
    """Put the adapter of `directory` on `model`, after checking that it belongs there and that no byte has changed.

    Args:
        model: a bare model, or the `Adapted.model` of others of the same method.
        directory: Regraft's own, or one that stock peft wrote.
        base_identity: content hash of `model`; None where it is not known, then it is not checked.
        name: of the adapter on this model.

    Raises:
        BaseModelMismatch: it was trained on another base.
        CorruptArtifact: a file is missing, damaged, or a pickle.
    """
    stored = read_adapter(directory)
    if stored.base and base_identity is not None and stored.base.identity != base_identity:
        raise BaseModelMismatch(
            f"{directory} was trained on {stored.base.reference} (identity {_short(stored.base.identity)}); "
            f"this base model has identity {_short(base_identity)}.",
            "Use the base it was trained on, or train a new version on this one.",
        )
    verify(directory, stored)
    return get_method(stored.method).load(model, directory, name)


def verify(directory: Path, stored: StoredAdapter) -> None:
    """Compare the tensors of `directory`, byte for byte, with the manifest in `stored`.

    Raises:
        CorruptArtifact: names the first tensors that differ.
    """
    if stored.is_foreign:
        return  # there is no manifest; `Method.load` still checks names and shapes
    found = {name: _describe(tensor) for name, tensor in written_tensors(directory).items()}
    differing = sorted(
        name for name in found.keys() | stored.tensors.keys() if found.get(name) != stored.tensors.get(name)
    )
    if differing:
        raise CorruptArtifact(
            f"{directory / TENSORS_FILE} is not what was written: {', '.join(differing[:3])}"
            f"{f' and {len(differing) - 3} more' if len(differing) > 3 else ''} differ from the manifest.",
            "Restore it from where it was copied; in the registry: regraft fsck --repair",
        )


def _method_of(adapter_config: dict[str, Any]) -> str:
    for name in CATALOG:
        if get_method(name).recognises(adapter_config):
            return name
    raise InvalidInput(
        f"No method of the catalogue reads adapters of peft's type {adapter_config.get('peft_type')!r}.",
        "See: regraft methods list",
    )


def _describe(tensor: Tensor) -> StoredTensor:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return StoredTensor(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        sha256=hashlib.sha256(flat.numpy().data).hexdigest(),
    )


def _short(identity: str) -> str:
    return f"{identity[:4]}…{identity[-2:]}" if len(identity) > 12 else identity


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    """Let the disk have it before anyone is told that it is there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
