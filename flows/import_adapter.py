"""Take over an adapter that was trained elsewhere, once it is seen to fit its base model."""

from pathlib import Path

from flows.base_models import find_base
from infra.errors import BaseModelMismatch, CorruptArtifact, InvalidInput, RegraftError
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.adapter_directory import inspect_adapter
from registry.addresses import adapter_name
from registry.records import BaseModelRecord, VersionRecord
from registry.registration import require_same_base
from training.adapter_files import attach_stored, read_adapter, verify
from training.base_models import LoadedBase, load_base
from training.interchange.lora_layers import require_finite, require_places
from training.interchange.probes import answers, probes
from training.methods.contract import Adapted


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
        if stored.is_foreign:  # else it was made for this base
            _require_named_base(files.config.get("base_model_name_or_path"), record)
            require_places({name: shape for name, (_, shape) in files.tensors.items()}, loaded.model)
        adapted = attach_stored(loaded.model, directory, base_identity=record.identity_sha256)
        require_finite(adapted.tensors())
        _require_numbers(adapted, loaded)
    except RegraftError as error:
        what = error.what if str(directory) in error.what else f"{directory}: {error.what}"
        raise type(error)(what, error.remedy) from None
    return AdapterRegistry().import_(
        directory, name, base_identity=record.identity_sha256, method=stored.method, task=task
    )


def _require_named_base(named: object, base: BaseModelRecord) -> None:
    """Raise `BaseModelMismatch` where a foreign config names the reference of other registered bases than `base`."""
    fitting = [other for other in AdapterRegistry().base_models() if named in _names(other.reference)]
    if fitting and base.identity_sha256 not in {other.identity_sha256 for other in fitting}:
        raise BaseModelMismatch(
            f"By its adapter_config.json it was trained on {named}, which is registered as {fitting[0].name}; "
            f"{base.name} is another model.",
            f"Give --base {fitting[0].name}; where it is meant for {base.name}, correct base_model_name_or_path.",
        )


def _names(reference: str) -> tuple[str, str]:
    """What peft writes for a base: its name on the hub or its path; ours may say the revision, too."""
    name = reference.removeprefix("hf:").removeprefix("path:")
    return name, name.partition("@")[0]


def _require_numbers(adapted: Adapted, base: LoadedBase) -> None:
    """Raise `CorruptArtifact` where the adapted model's answers are no numbers."""
    try:
        inputs = probes(base.model, base.tokenizer)
    except InvalidInput:  # it reads neither tokens nor pixels
        return
    if not all(told.isfinite().all() for told in answers(adapted.model, inputs)):
        raise CorruptArtifact(
            "With it the model's answers are NaN or infinite.",
            "Was it trained to the end? Are its scale and its dtype right?",
        )
