"""Where versions come from: an acyclic graph of relations between them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from infra.errors import Conflict, InvalidInput
from registry.models import Adapter, Attachment, BaseModel, LineageEdge, Version, VersionState
from registry.records import as_json

MIGRATED = "migrated_from"


@dataclass(frozen=True, slots=True)
class LineageNode:
    """One version in the family; `distance` is 0 for the one asked about, negative for ancestors.

    `attachments` are the relations of what is stored with it: `migration_kit`.
    """

    address: str
    base: str
    method: str
    state: str
    aliases: tuple[str, ...]
    distance: int
    attachments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LineageEdgeRecord:
    """`child` came from `parent` by `relation`."""

    parent: str
    child: str
    relation: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LineageData:
    """A version of a data set, and the versions of the family that were trained on it (`made`).

    Data sets have names of their own: an address may be an adapter's, too.
    """

    address: str
    rows: int
    made: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LineageGraph:
    """The ancestors and descendants of one version (`subject`), the edges between all of them, and their data sets."""

    subject: str
    nodes: tuple[LineageNode, ...]
    edges: tuple[LineageEdgeRecord, ...]
    data_sets: tuple[LineageData, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        graph: dict[str, Any] = as_json(self)
        return graph

    def to_mermaid(self) -> str:
        """A Mermaid flowchart, parents above children, the one asked about framed thickly."""
        names = {node.address: f"v{index}" for index, node in enumerate(self.nodes)}
        lines = ["graph TD"]
        for node in self.nodes:
            aliases = f"<br/>{', '.join(node.aliases)}" if node.aliases else ""
            lines.append(f'    {names[node.address]}["{node.address}{aliases}<br/>{node.method} on {node.base}"]')
        lines += [f"    {names[edge.parent]} -->|{edge.relation}| {names[edge.child]}" for edge in self.edges]
        for number, data in enumerate(self.data_sets):
            lines.append(f'    d{number}[("{data.address}<br/>{data.rows:,} rows")]')
            lines += [f"    d{number} -->|made_from| {names[child]}" for child in data.made]
        lines.append(f"    style {names[self.subject]} stroke-width:4px")
        return "\n".join(lines)


def add_edge(session: Session, child: Version, parent: Version, relation: str, details: Mapping[str, Any]) -> None:
    """Record that `child` came from `parent`. Call it within a writing transaction, which keeps other writers out.

    Raises:
        InvalidInput: a version cannot be its own parent, and a relation needs a name.
        Conflict: `parent` descends from `child`.
    """
    if not relation:
        raise InvalidInput(f"{child.address} comes from {parent.address}, but the relation has no name.")
    if child.id == parent.id:
        raise InvalidInput(f"{child.address} cannot be its own parent.")
    if child.id in _reachable(session, parent.id, up=True):
        raise Conflict(f"{child.address} cannot come from {parent.address}, which itself comes from {child.address}.")
    if session.get(LineageEdge, (child.id, parent.id, relation)) is None:
        session.add(LineageEdge(child_id=child.id, parent_id=parent.id, relation=relation, details=dict(details)))
        session.flush()


def edges_onto(session: Session, base: BaseModel, relation: str) -> list[LineageEdgeRecord]:
    """The edges by `relation` whose child stands on a base model and is ready, oldest child first; one query."""
    parent, child = aliased(Version), aliased(Version)
    of_parent, of_child = aliased(Adapter), aliased(Adapter)
    query = (
        select(of_parent.name, parent.number, of_child.name, child.number, LineageEdge.details)
        .select_from(LineageEdge)
        .join(parent, parent.id == LineageEdge.parent_id)
        .join(child, child.id == LineageEdge.child_id)
        .join(of_parent, of_parent.id == parent.adapter_id)
        .join(of_child, of_child.id == child.adapter_id)
        .where(
            LineageEdge.relation == relation,
            child.base_model_id == base.id,
            child.state == VersionState.READY,
        )
        .order_by(child.id)
    )
    return [
        LineageEdgeRecord(f"{name}@{number}", f"{its_name}@{its_number}", relation, details)
        for name, number, its_name, its_number, details in session.execute(query)
    ]


def graph_of(session: Session, version: Version) -> LineageGraph:
    """The family of one version: everything it came from and everything that came from it."""
    distances = {identity: -steps for identity, steps in _reachable(session, version.id, up=True).items()}
    distances |= _reachable(session, version.id, up=False)
    rows = session.scalars(select(Version).where(Version.id.in_(distances))).unique().all()
    addresses = {row.id: row.address for row in rows}
    found = session.scalars(
        select(LineageEdge)
        .where(LineageEdge.child_id.in_(distances), LineageEdge.parent_id.in_(distances))
        .order_by(LineageEdge.parent_id, LineageEdge.child_id, LineageEdge.relation)
    )
    attached: dict[int, set[str]] = {}
    for version_id, relation in session.execute(
        select(Attachment.version_id, Attachment.relation).where(Attachment.version_id.in_(distances), Attachment.ready)
    ):
        attached.setdefault(version_id, set()).add(relation)
    nodes = [
        LineageNode(
            row.address,
            row.base_model.name,
            row.method,
            row.state.value,
            tuple(alias.alias for alias in row.aliases),
            distances[row.id],
            tuple(sorted(attached.get(row.id, ()))),
        )
        for row in rows
    ]
    edges = [
        LineageEdgeRecord(addresses[edge.parent_id], addresses[edge.child_id], edge.relation, edge.details)
        for edge in found
    ]
    ordered = tuple(sorted(nodes, key=lambda node: (node.distance, node.address)))
    return LineageGraph(version.address, ordered, tuple(edges), _data_sets(rows))


def _data_sets(rows: Iterable[Version]) -> tuple[LineageData, ...]:
    """What the versions were trained on, as far as it is kept."""
    made: dict[str, list[Version]] = {}
    sizes: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row.id):
        data = row.dataset.drawn_from if row.dataset else None
        if data is not None:
            sizes[data.address] = data.rows
            made.setdefault(data.address, []).append(row)
    return tuple(LineageData(name, sizes[name], tuple(row.address for row in made[name])) for name in sorted(made))


def _reachable(session: Session, start: int, *, up: bool) -> dict[int, int]:
    """Version id → fewest steps from `start` (itself included, at 0), towards the parents or towards the children."""
    here, there = (LineageEdge.child_id, LineageEdge.parent_id) if up else (LineageEdge.parent_id, LineageEdge.child_id)
    distances = {start: 0}
    frontier, steps = {start}, 0
    while frontier:
        steps += 1
        frontier = set(session.scalars(select(there).where(here.in_(frontier)))) - distances.keys()
        distances |= dict.fromkeys(frontier, steps)
    return distances
