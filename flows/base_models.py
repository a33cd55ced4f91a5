"""Base models between the two floors that know them: `training` reads weights, `registry` keeps the record."""

from pathlib import Path

from infra.errors import NotFound
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.records import BaseModelRecord
from training.base_models import BaseFolder, resolve_base, short_name

_REFERENCE_FORMS = ("hf:", "path:", "gguf:", "wheel:")


def register_base(reference: str, name: str | None = None) -> BaseModelRecord:
    """Read the base model behind a reference, compute its identity, and record it (or find it recorded)."""
    record, _ = _read_and_record(reference, name)
    return record


def find_base(name_or_reference: str) -> tuple[BaseModelRecord, BaseFolder]:
    """The base model that a recipe names, ready to load.

    Raises:
        NotFound: neither a reference nor the name of a registered base model.
        BaseModelMismatch: what the reference leads to today is not what was registered under the name.
    """
    if name_or_reference.startswith(_REFERENCE_FORMS):
        return _read_and_record(name_or_reference, None)
    registry = AdapterRegistry()
    record = registry.base_model(name_or_reference)
    folder = resolve_base(record.reference, get_settings().base_models)
    if folder.identity.sha256 != record.identity_sha256:
        raise NotFound(
            f"Base model '{record.name}' was registered with identity {record.identity_sha256[:12]}…, but "
            f"{record.reference} now holds {folder.identity.sha256[:12]}….",
            f"Bring the registered weights back, or register these: regraft base add {record.reference} --name NEW",
        )
    return record, folder


def _read_and_record(reference: str, name: str | None) -> tuple[BaseModelRecord, BaseFolder]:
    if reference.startswith("path:"):
        reference = f"path:{Path(reference.removeprefix('path:')).expanduser().resolve()}"
    if reference.startswith("gguf:"):
        reference = f"gguf:{Path(reference.removeprefix('gguf:')).expanduser().resolve()}"
    folder = resolve_base(reference, get_settings().base_models)
    record = AdapterRegistry().register_base_model(
        reference,
        folder.identity.sha256,
        name=name or short_name(reference),
        family=folder.identity.family,
        parameters=folder.identity.parameters,
        revision=folder.identity.revision,
    )
    return record, folder
