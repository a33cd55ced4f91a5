"""Keep what a version's migration to another base will need, while its data are still at hand."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect import flow
from prefect.runtime import flow_run

from flows.base_models import find_base
from flows.gpu import gpu_slot
from flows.progress import Stage
from flows.reports import report_table
from flows.run_states import cancel_if_interrupted
from flows.select_data import select_data
from infra.errors import Conflict, InvalidInput
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.attachments import MIGRATION_KIT
from registry.records import AttachmentRecord, VersionRecord
from serving.loading import recipe_of
from training.base_models import load_base
from training.checkpoints import exclusive
from training.device import base_dtype, best_device
from training.migration.kit import Kit, KitOptions, build_kit, read_kit
from training.objectives.of_model import is_masked_lm
from training.recipe import Recipe


@flow(name="build-migration-kit", flow_run_name="kit of {address}", on_failure=[cancel_if_interrupted])
def build_migration_kit(
    address: str, options: KitOptions = KitOptions(), task: str | None = None, again: bool = False
) -> AttachmentRecord:
    """Choose seeds, let the source base write inputs, train a discriminator on both, and keep it all with the version.

    A build that was interrupted goes on where it was.

    Args:
        address: the version.
        options: what goes into the kit.
        task: its name in words. Default: the recipe's task, or the adapter's name.
        again: build one although the version has one; the new one goes before it.

    Raises:
        Conflict: the version has a kit.
        InvalidInput: there is no recipe, its data have changed since, or the base writes no text.
    """
    registry = AdapterRegistry()
    version = registry.get(address)
    recipe = buildable(version, registry, again)
    data = select_data(recipe)
    if version.dataset is not None and data.fingerprint != version.dataset.fingerprint:
        raise InvalidInput(
            f"The data of {recipe.data.name} are not those that {version.address} was trained on.",
            "Bring them back, or train a new version on these.",
        )
    _, folder = find_base(version.base.name)
    device = best_device()
    base = load_base(
        folder.reference,
        cache=get_settings().base_models,
        dtype=base_dtype(device, recipe.training.precision),
        device=device,
    )
    if is_masked_lm(base.model):
        raise InvalidInput(f"{version.base.name} is a masked language model: it writes no inputs.", "Keep the data.")
    workdir = get_settings().runs / f"kit-{version.adapter}-{version.number}"
    stages: dict[str, Stage] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        stages.setdefault(what, Stage(f"kit of {version.address}: {what}"))(done, total)

    with exclusive(workdir), gpu_slot(device), TemporaryDirectory(dir=workdir, prefix="kit-") as scratch:
        kit = build_kit(
            Path(scratch) / "kit",
            base,
            data.train,
            task=task or words(recipe),
            instruction=recipe.data.instruction_text,
            options=options,
            seed=recipe.seed,
            workdir=workdir / "work",
            on_progress=on_progress,
        )
        record = registry.attach(version.address, MIGRATION_KIT, Path(scratch) / "kit", details(kit))
        shutil.rmtree(workdir / "work", ignore_errors=True)  # inputs and checkpoints made from private data
    report_table(
        version.adapter, "migration kit", [{"what": key, "is": value} for key, value in record.details.items()]
    )
    return record


def kit_of(address: str) -> tuple[AttachmentRecord, Kit, Path] | None:
    """A version's kit: the registry's record, what it says, and where its files are, every byte checked.

    Raises:
        CorruptArtifact: its bytes are not what was kept.
    """
    registry = AdapterRegistry()
    record = registry.attachment(address, MIGRATION_KIT)
    if record is None:
        return None
    directory = registry.materialise_attachment(record)
    return record, read_kit(directory), directory


def buildable(version: VersionRecord, registry: AdapterRegistry, again: bool) -> Recipe:
    """The recipe of a version that a kit can be built for.

    Raises:
        Conflict: it has one.
        InvalidInput: it was imported.
    """
    recipe = recipe_of(version)
    if recipe is None:
        raise InvalidInput(
            f"{version.address} was imported; what data it was trained on is not known here.",
            "Build the kit where it was trained.",
        )
    if not again and (kept := registry.attachment(version.address, MIGRATION_KIT)):
        raise Conflict(
            f"{version.address} has a migration kit, of {kept.created_at:%Y-%m-%d %H:%M} UTC.",
            f"Look at it: regraft kit show {version.address}; build another one with --again.",
        )
    return recipe


def words(recipe: Recipe) -> str:
    """A task's name as a sentence would have it: `object counting`."""
    return (recipe.data.task or recipe.adapter).replace("_", " ").replace("-", " ")


def details(kit: Kit) -> dict[str, object]:
    """What the registry says of a kit without opening it. Nothing of the data."""
    judged = kit.discriminator
    return {
        "task": kit.task,
        "rows": kit.rows,
        "seeds": len(kit.seeds),
        "discriminator": None if judged is None else round(judged.balanced_accuracy, 4),
        "judged_on": None if judged is None else judged.samples,
        "flow_run": flow_run.id,
    }
