"""Which versions stand on a base model that is going away, which of them can move, in what order, and what it costs.

Four queries, whatever the number of adapters; no model and no artifact is opened.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

from flows.migration_plan import MOST_INPUTS, inputs_to_learn
from infra.errors import InvalidInput
from registry import AdapterRegistry
from registry.attachments import MIGRATION_KIT
from registry.lineage import MIGRATED, LineageEdgeRecord
from registry.records import AttachmentRecord, BaseModelRecord, VersionRecord
from training.methods.catalog import get_method
from training.migration.options import FleetOptions


class FleetItem(BaseModel):
    """One adapter of a fleet.

    Attributes:
        address: the version of it that moves: what its aliases point at, else the newest.
        obstacle: why it cannot; None where it can.
        kit: digest of its kit, where there is one; adapters with the same share the inputs that the target writes.
        discriminator: the kit's balanced accuracy.
        inputs: that it will learn from.
        seconds: estimated; None where there is nothing to estimate from.
        migrated: where it stands on the target already, the version that it has become.
    """

    model_config = ConfigDict(frozen=True)

    address: str
    adapter: str
    aliases: tuple[str, ...]
    method: str
    obstacle: str | None
    kit: str | None
    discriminator: float | None
    inputs: int
    seconds: float | None
    migrated: str | None


class FleetPlan(BaseModel):
    """All adapters of a base model, in the order in which they will move.

    Attributes:
        source: the base model that they stand on.
        target: the one that they move to.
        estimate: what the seconds were estimated from.
        items: an adapter may be there more than once, if its aliases point at several versions.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    target: str
    estimate: str
    items: tuple[FleetItem, ...]
    left_out: tuple[str, ...]

    @property
    def to_do(self) -> tuple[FleetItem, ...]:
        """What moves."""
        return tuple(item for item in self.items if item.obstacle is None and item.migrated is None)

    @property
    def seconds(self) -> float | None:
        """Of all that moves, one after the other."""
        known = [item.seconds for item in self.to_do if item.seconds is not None]
        return sum(known) * len(self.to_do) / len(known) if known else None


def plan_fleet(
    source: str,
    target: str,
    options: FleetOptions = FleetOptions(),
    alias: str | None = None,
    own_suites: bool = True,
) -> FleetPlan:
    """What a fleet migration will do.

    Args:
        source: the base model that is going away, by name, reference or identity.
        target: the base model to move to; registered, as the source is.
        options: how each is moved.
        alias: only versions that this alias points at. Default: every adapter's aliases, or its newest version.
        own_suites: each is measured on the suites of its own recipe.

    Raises:
        NotFound: no such base model or method.
        InvalidInput: the two are the same, or options that no recipe can take.
    """
    registry = AdapterRegistry()
    old, new = registry.base_model(source), registry.base_model(target)
    if old.identity_sha256 == new.identity_sha256:
        raise InvalidInput(f"{source} and {target} are the same base model, {old.name}.", "Name another one.")
    if options.method is not None:
        get_method(options.method)
    kits = registry.attachments_on(old.name, MIGRATION_KIT)
    before = registry.edges_onto(new.name, MIGRATED)
    become = {edge.parent: edge.child for edge in before}
    found = registry.search(base=old.name, state="ready")
    versions = _chosen(found, alias)
    items = [
        _item(version, kits.get(version.address), become.get(version.address), options, old, new, before, own_suites)
        for version in versions
    ]
    if any(_pace(before, item.inputs) is not None for item in items):
        estimate = f"earlier migrations to {new.name} of as many inputs"
    else:
        estimate = (
            f"the old adapters' own trainings, by the sizes of {old.name} and {new.name}; writing inputs excluded"
        )
    planned = {version.address for version in versions}
    left_out = tuple(version.address for version in found if version.address not in planned)
    return FleetPlan(
        source=old.name,
        target=new.name,
        estimate=estimate,
        items=tuple(sorted(items, key=_order)),
        left_out=left_out,
    )


def _chosen(versions: Iterable[VersionRecord], alias: str | None) -> list[VersionRecord]:
    """Of each adapter what its aliases point at, else the newest; `versions` come newest first."""
    of_adapter: dict[str, list[VersionRecord]] = {}
    for version in versions:
        of_adapter.setdefault(version.adapter, []).append(version)
    if alias is not None:
        return [version for found in of_adapter.values() for version in found if alias in version.aliases]
    return [
        version for found in of_adapter.values() for version in ([each for each in found if each.aliases] or found[:1])
    ]


def _item(
    version: VersionRecord,
    kit: AttachmentRecord | None,
    migrated: str | None,
    options: FleetOptions,
    old: BaseModelRecord,
    new: BaseModelRecord,
    before: Sequence[LineageEdgeRecord],
    own_suites: bool,
) -> FleetItem:
    chosen = options.on(version.recipe)
    obstacle = None
    if "data" not in version.recipe:
        obstacle = "imported without a recipe"
    elif kit is None:
        obstacle = "no migration kit"
    elif own_suites and _measured_on_training_data(version.recipe):
        obstacle = "its test items are part of its training data: --task, or --no-evaluate"
    rows = int(kit.details["rows"]) if kit else MOST_INPUTS
    inputs = inputs_to_learn(chosen, rows)
    seconds = version.metrics.get("seconds")
    if (pace := _pace(before, inputs)) is not None:
        seconds = pace * inputs
    elif seconds is not None:
        seconds *= new.parameters / old.parameters
    return FleetItem(
        address=version.address,
        adapter=version.adapter,
        aliases=version.aliases,
        method=chosen.method.name if chosen.method else version.method,
        obstacle=obstacle,
        kit=kit.artifact_sha256 if kit else None,
        discriminator=kit.details.get("discriminator") if kit else None,
        inputs=inputs,
        seconds=seconds,
        migrated=migrated,
    )


def _measured_on_training_data(recipe: Mapping[str, Any]) -> bool:
    """Whether a suite asks for items that are held out of the file or split that the adapter was trained on."""
    data = recipe["data"]
    suites = recipe.get("evaluation") or [{}]
    return not data.get("task") and any(
        not (suite.get("task") or suite.get("data") or data.get(suite.get("split", "test"))) for suite in suites
    )


def _pace(before: Sequence[LineageEdgeRecord], inputs: int) -> float | None:
    """Seconds for each input, of the earlier migrations of about as many; small ones mostly load and measure."""
    known = [
        edge.details["seconds"] / edge.details["inputs"]
        for edge in before
        if edge.details.get("seconds") and 2 * edge.details["inputs"] >= inputs
    ]
    return median(known) if known else None


def _order(item: FleetItem) -> tuple[bool, bool, str, str]:
    """Production first, then other aliases, then the rest; what shares a kit together."""
    return ("production" not in item.aliases, not item.aliases, item.kit or "", item.address)
