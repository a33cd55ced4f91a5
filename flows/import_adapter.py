"""Take over an adapter that was trained elsewhere, once it is seen to fit its base model."""

from pathlib import Path

from flows.base_models import find_base
from infra.errors import BaseModelMismatch, CorruptArtifact
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.adapter_directory import inspect_adapter
from registry.addresses import adapter_name
from registry.records import VersionRecord
from registry.registration import require_same_base
from training.adapter_files import attach_stored, read_adapter, verify
from training.base_models import load_base


def import_adapter(directory: Path, name: str, base: str, task: str | None = None) -> VersionRecord:
    """Register an adapter directory as the next version of `name`.

    A directory of peft's own does not say by content which base it is for, so it is attached to the base once.

    Args:
        directory: in PEFT's layout; nothing in it is trusted until checked.
        name: of the adapter.
        base: the base model it was trained on, by registered name or reference.
        task: what it is for.

    Raises:
        BaseModelMismatch: it was trained on another base model, or its tensors do not fit this one.
        InvalidInput, CorruptArtifact: not an adapter, or not to be trusted.
    """
    adapter_name(name)
    record, folder = find_base(base)
    files = inspect_adapter(directory)  # before anything of it is loaded
    require_same_base(files, record, directory)
    stored = read_adapter(directory)
    verify(directory, stored)
    loaded = load_base(folder.reference, cache=get_settings().base_models)
    try:
        adapted = attach_stored(loaded.model, directory, base_identity=record.identity_sha256)
    except CorruptArtifact as error:
        if not stored.is_foreign:  # it was made for this base, so it is damaged
            raise
        named = files.config.get("base_model_name_or_path") or "a base that it does not name"
        raise BaseModelMismatch(
            f"{directory} was made for {named} and does not fit {record.name}: {error.what}",
            "Name the base model it was trained on: regraft base list",
        ) from None
    damaged = [name for name, t in adapted.tensors().items() if t.is_floating_point() and not t.isfinite().all()]
    if damaged:
        raise CorruptArtifact(
            f"{directory} holds {damaged[0]}{' and more' if len(damaged) > 1 else ''} with NaN or infinity in it.",
            "Was it trained to the end? Import an earlier checkpoint.",
        )
    return AdapterRegistry().import_(
        directory, name, base_identity=record.identity_sha256, method=stored.method, task=task
    )
