"""Adapters on their base model for as long as a block lasts; the base is lent, and as bare afterwards as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.settings import get_settings
from registry import AdapterRegistry
from registry.records import BaseModelRecord, VersionRecord
from serving.loading import recipe_of
from training.adapter_files import attach_stored, read_adapter
from training.base_models import LoadedBase
from training.device import Precision, base_dtype, best_device
from training.methods.catalog import get_method
from training.methods.contract import Adapted
from training.shared_bases import shared_bases


@contextmanager
def lent(base: BaseModelRecord, method: str, precision: Precision) -> Iterator[LoadedBase]:
    """A bare base model, in the precision and of the ownership that adapters of `method` need."""
    changed, device = get_method(method).card.changes_base, best_device()
    dtype, cache = base_dtype(device, precision, trained=changed), get_settings().base_models
    with (
        shared_bases() as bases,
        bases.lend(base.reference, cache=cache, dtype=dtype, device=device, own=changed) as loaded,
    ):
        yield loaded


@contextmanager
def base_of(version: VersionRecord, method: str | None = None) -> Iterator[LoadedBase]:
    """The bare base model of a version, as it was trained on it.

    Args:
        version: whose.
        method: what will be put on it. Default: the version's.

    Raises:
        BaseModelMismatch: the base's reference leads to another model today.
    """
    recipe = recipe_of(version)
    with lent(version.base, method or version.method, recipe.training.precision if recipe else "auto") as base:
        AdapterRegistry().require_base(version, base.identity.sha256)
        yield base


@contextmanager
def attached(version: VersionRecord, directory: Path | None = None) -> Iterator[tuple[Adapted, LoadedBase]]:
    """A version on its base, or another adapter's directory in its place, in evaluation mode.

    Args:
        version: whose base.
        directory: none given: the version's own; every byte of it is checked.
    """
    directory = directory or AdapterRegistry().materialise(version.address)
    with base_of(version, read_adapter(directory).method) as base:
        adapted = attach_stored(base.model, directory, base_identity=version.base.identity_sha256)
        adapted.model.eval()
        yield adapted, base
