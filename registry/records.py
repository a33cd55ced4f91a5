"""What the registry hands out: frozen records, detached from the database, with a JSON form for every listing."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from typing import Any

from registry.models import (
    Alias,
    Attachment,
    BaseModel,
    Dataset,
    DatasetVersion,
    Decision,
    Evaluation,
    Promotion,
    Version,
    VersionState,
)


def as_json(value: object) -> Any:
    """A record (or a list or mapping of them) in the types that JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class BaseModelRecord:
    """A base model; `identity_sha256` is what it is, `name` and `reference` are what it is called."""

    name: str
    reference: str
    identity_sha256: str
    family: str
    parameters: int
    revision: str | None
    created_at: datetime
    deprecated_at: datetime | None
    successor: str | None

    @classmethod
    def of(cls, row: BaseModel) -> "BaseModelRecord":
        """Detach a row."""
        return cls(
            row.name,
            row.reference,
            row.identity_sha256,
            row.family,
            row.parameters,
            row.revision,
            row.created_at,
            row.deprecated_at,
            row.successor.name if row.successor else None,
        )

    def __str__(self) -> str:
        return f"{self.name} (identity {short(self.identity_sha256)})"


@dataclass(frozen=True, slots=True)
class DatasetRecord:
    """What a version was trained on: name, content fingerprint, number of rows, where it came from.

    `drawn_from` is the address of the data-set version that the rows are of, where they are of one.
    """

    name: str
    fingerprint: str
    rows: int
    origin: dict[str, Any]
    drawn_from: str | None = None

    @classmethod
    def of(cls, row: Dataset) -> "DatasetRecord":
        """Detach a row."""
        drawn_from = row.drawn_from.address if row.drawn_from else None
        return cls(row.name, row.fingerprint, row.rows, row.origin, drawn_from)


@dataclass(frozen=True, slots=True)
class DatasetVersionRecord:
    """A set of rows that was chosen and is kept: its address, content fingerprint, and how it was chosen."""

    address: str
    name: str
    number: int
    fingerprint: str
    rows: int
    origin: dict[str, Any]
    artifact_sha256: str
    size_bytes: int
    created_at: datetime

    @classmethod
    def of(cls, row: DatasetVersion) -> "DatasetVersionRecord":
        """Detach a row."""
        return cls(
            row.address,
            row.name,
            row.number,
            row.fingerprint,
            row.rows,
            row.origin,
            row.artifact_sha256,
            row.size_bytes,
            row.created_at,
        )


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One version of an adapter; `aliases` as they stood when it was read."""

    address: str
    adapter: str
    number: int
    base: BaseModelRecord
    method: str
    recipe: dict[str, Any]
    metrics: dict[str, float]
    artifact_sha256: str
    size_bytes: int
    trainable_parameters: int
    state: VersionState
    failure: str | None
    aliases: tuple[str, ...]
    task: str | None
    description: str | None
    dataset: DatasetRecord | None
    mlflow_run_id: str | None
    mlflow_version: int | None
    created_at: datetime

    @classmethod
    def of(cls, row: Version) -> "VersionRecord":
        """Detach a row."""
        return cls(
            address=row.address,
            adapter=row.adapter.name,
            number=row.number,
            base=BaseModelRecord.of(row.base_model),
            method=row.method,
            recipe=row.recipe,
            metrics=row.metrics,
            artifact_sha256=row.artifact_sha256,
            size_bytes=row.size_bytes,
            trainable_parameters=row.trainable_parameters,
            state=row.state,
            failure=row.failure,
            aliases=tuple(alias.alias for alias in row.aliases),
            task=row.adapter.task,
            description=row.adapter.description,
            dataset=DatasetRecord.of(row.dataset) if row.dataset else None,
            mlflow_run_id=row.mlflow_run_id,
            mlflow_version=row.mlflow_version,
            created_at=row.created_at,
        )


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """One line of the adapters' listing; `aliases` maps each alias to a version number."""

    name: str
    task: str | None
    description: str | None
    versions: int
    newest: int
    base: str
    method: str
    size_bytes: int
    aliases: dict[str, int]
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class AttachmentRecord:
    """An artifact that belongs to the version `address` beside its own, and what it is to it (`relation`)."""

    address: str
    relation: str
    artifact_sha256: str
    size_bytes: int
    details: dict[str, Any]
    created_at: datetime

    @classmethod
    def of(cls, row: Attachment) -> "AttachmentRecord":
        """Detach a row."""
        return cls(row.version.address, row.relation, row.artifact_sha256, row.size_bytes, row.details, row.created_at)


@dataclass(frozen=True, slots=True)
class AliasRecord:
    """An alias and whom it points at; `generation` counts its moves and is what compare-and-swap compares."""

    adapter: str
    alias: str
    address: str
    generation: int
    moved_at: datetime

    @classmethod
    def of(cls, row: Alias) -> "AliasRecord":
        """Detach a row."""
        return cls(row.adapter.name, row.alias, row.version.address, row.generation, row.moved_at)


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """A measured number of one version: `value` in `unit`, interval [`low`, `high`], over `samples` items."""

    id: int
    address: str
    suite: str
    metric: str
    value: float
    unit: str | None
    stderr: float | None
    low: float | None
    high: float | None
    samples: int
    dataset_fingerprint: str | None
    outcomes: tuple[int, ...] | None
    flow_run_id: str | None
    at: datetime
    scores: tuple[float, ...] | None = None
    components: tuple[tuple[float, ...], ...] | None = None

    @classmethod
    def of(cls, row: Evaluation) -> "EvaluationRecord":
        """Detach a row."""
        return cls(
            row.id,
            row.version.address,
            row.suite,
            row.metric,
            row.value,
            row.unit,
            row.stderr,
            row.low,
            row.high,
            row.samples,
            row.dataset_fingerprint,
            tuple(row.outcomes) if row.outcomes is not None else None,
            row.flow_run_id,
            row.at,
            tuple(row.scores) if row.scores is not None else None,
            tuple(map(tuple, row.components)) if row.components is not None else None,
        )


@dataclass(frozen=True, slots=True)
class PromotionRecord:
    """One line of the audit log: who wanted which version behind the alias, what was decided, and the numbers."""

    id: int
    adapter: str
    alias: str
    from_address: str | None
    to_address: str
    decision: Decision
    generation: int
    report: dict[str, Any]
    actor: str
    reason: str | None
    at: datetime

    @classmethod
    def of(cls, row: Promotion) -> "PromotionRecord":
        """Detach a row."""
        return cls(
            row.id,
            row.to_version.adapter.name,
            row.alias,
            row.from_version.address if row.from_version else None,
            row.to_version.address,
            row.decision,
            row.generation,
            row.report,
            row.actor,
            row.reason,
            row.at,
        )


@dataclass(frozen=True, slots=True)
class Parent:
    """Where a version comes from: the parent's address, the relation, and what is worth remembering of it."""

    address: str
    relation: str
    details: Mapping[str, Any]


def short(sha256: str) -> str:
    """`5f3c…a1`: enough of a hash for a human eye."""
    return f"{sha256[:4]}…{sha256[-2:]}"
