"""Keep what a version's migration to another base will need, while its data are still at hand."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect import flow
from prefect.runtime import flow_run

from flows.base_models import find_base
from flows.data_sets import readable
from flows.gpu import gpu_slot
from flows.progress import Stage
from flows.reports import report_table
from flows.run_states import cancel_if_interrupted
from flows.select_data import select_data
from infra.errors import Conflict, Interrupted, InvalidInput, RegraftError
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.attachments import MIGRATION_KIT
from registry.records import AttachmentRecord, VersionRecord
from serving.loading import recipe_of
from training.base_models import BaseFolder, load_base
from training.checkpoints import exclusive
from training.device import base_dtype, best_device
from training.migration.kit import Kit, build_kit, read_kit
from training.migration.options import KitOptions
from training.recipe import Recipe

logger = logging.getLogger(__name__)


@flow(name="build-migration-kit", flow_run_name="kit of {address}", on_failure=[cancel_if_interrupted])
def build_migration_kit(
    address: str, options: KitOptions = KitOptions(), task: str | None = None, again: bool = False
) -> AttachmentRecord:
    """Choose seeds, let the source base write inputs, train a discriminator on both, and keep it all with the version.

    A build that was interrupted goes on where it was. Where another version of the adapter has the kit that would come
    out, made from the same data on the same base, this one gets it, too.

    Args:
        address: the version.
        options: what goes into the kit.
        task: its name in words. Default: the recipe's task, or the adapter's name.
        again: build one although there is one; the new one goes before it.

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
    if not any(example.completion for example in data.train):
        raise InvalidInput(
            f"{version.address} was trained on plain text: there are no answers that another base could learn.",
            "Train on the text again, on the other base.",
        )
    named = task or words(recipe)
    made_from = _made_from(version, data.fingerprint, named, recipe, options)
    if not again and (same := _found(registry, version, made_from)):
        return registry.attach(version.address, MIGRATION_KIT, registry.materialise_attachment(same), same.details)
    _, folder = find_base(version.base.name)
    if writes_no_text(folder):
        raise InvalidInput(f"{version.base.name} is a masked language model: it writes no inputs.", "Keep the data.")
    device = best_device()
    base = load_base(
        folder.reference,
        cache=get_settings().base_models,
        dtype=base_dtype(device, recipe.training.precision),
        device=device,
    )
    workdir = get_settings().runs / f"kit-{version.adapter}-{version.number}"
    stages: dict[str, Stage] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        stages.setdefault(what, Stage(f"kit of {version.address}: {what}"))(done, total)

    with exclusive(workdir), gpu_slot(device), TemporaryDirectory(dir=workdir, prefix="kit-") as scratch:
        kit = build_kit(
            Path(scratch) / "kit",
            base,
            data.train,
            task=named,
            instruction=recipe.data.instruction_text,
            options=options,
            seed=recipe.seed,
            workdir=workdir / "work",
            on_progress=on_progress,
        )
        record = registry.attach(version.address, MIGRATION_KIT, Path(scratch) / "kit", details(kit, made_from))
        shutil.rmtree(workdir / "work", ignore_errors=True)  # inputs and checkpoints made from private data
    report_table(
        version.adapter, "migration kit", [{"what": key, "is": value} for key, value in record.details.items()]
    )
    return record


def keep_kit(version: VersionRecord, recipe: Recipe) -> AttachmentRecord | None:
    """The kit of a version that was just trained, as good as it can be had; None where there is none to be had.

    A kit that cannot be built is no reason to give a training up: it is told, and what needs no model is kept.

    Raises:
        Interrupted: Ctrl-C or SIGTERM.
    """
    _, folder = find_base(version.base.name)
    if recipe.migration_kit is None or writes_no_text(folder) or readable(recipe.data).columns.text:
        return None
    options = recipe.migration_kit
    try:
        try:
            return build_migration_kit(version.address, options)
        except Interrupted:
            raise
        except Exception as error:
            if not options.filtered:
                raise
            what = error.what if isinstance(error, RegraftError) else repr(error)
            logger.warning("%s keeps a kit without a discriminator: %s", version.address, what)
            return build_migration_kit(version.address, options.model_copy(update={"filtered": False}))
    except Interrupted:
        what = f"{version.address} is trained and registered; its migration kit is not built yet."
        raise Interrupted(what, f"To go on with it: regraft kit build {version.address}") from None
    except Exception as error:  # whatever it is, the version is there
        logger.warning("%s has no migration kit: %s", version.address, error)
        return None


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
        InvalidInput: it was imported, or migrated.
    """
    recipe = recipe_of(version)
    if recipe is None:
        raise InvalidInput(
            f"{version.address} was imported; what data it was trained on is not known here.",
            "Build the kit where it was trained.",
        )
    if recipe.migrated_from is not None:
        raise InvalidInput(
            f"{version.address} learnt what {recipe.migrated_from} answered to synthetic inputs, no data of its own.",
            f"Build a kit where the data are, regraft kit build {recipe.migrated_from}, and migrate that version.",
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


def writes_no_text(folder: BaseFolder) -> bool:
    """Whether a base model fills masked tokens in; seen without loading it."""
    return folder.architecture.endswith("ForMaskedLM")


def details(kit: Kit, made_from: str) -> dict[str, object]:
    """What the registry says of a kit without opening it. Nothing of the data."""
    judged = kit.discriminator
    return {
        "task": kit.task,
        "rows": kit.rows,
        "seeds": len(kit.seeds),
        "discriminator": None if judged is None else round(judged.balanced_accuracy, 4),
        "judged_on": None if judged is None else judged.samples,
        "made_from": made_from,
        "flow_run": flow_run.id,
    }


def _made_from(version: VersionRecord, data: str, task: str, recipe: Recipe, options: KitOptions) -> str:
    """Names all that decides what a kit comes to be."""
    told = [version.base.identity_sha256, data, task, recipe.data.instruction_text, recipe.seed]
    content = json.dumps([*told, options.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _found(registry: AdapterRegistry, version: VersionRecord, made_from: str) -> AttachmentRecord | None:
    """The kit of another version of the adapter that was made from the same."""
    kits = (registry.attachment(other.address, MIGRATION_KIT) for other in registry.versions(version.adapter))
    return next((kit for kit in kits if kit and kit.details.get("made_from") == made_from), None)
