"""The registry's tables: what MLflow cannot hold, and the deciding copy of every alias.

Every name starts with `regraft_`, so that one database can be shared with MLflow, which has a `datasets` of its own.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class VersionState(StrEnum):
    """Life of a version. Only `ready` can be loaded or promoted; `failed` keeps its number for ever."""

    PENDING = "pending"
    READY = "ready"
    FAILED = "failed"
    RETIRED = "retired"


class Decision(StrEnum):
    """What happened to an alias. `moved` is an alias without a gate set by hand."""

    PROMOTED = "promoted"
    REFUSED = "refused"
    FORCED = "forced"
    ROLLED_BACK = "rolled_back"
    MOVED = "moved"


class JournalState(StrEnum):
    """`open` until the work it announces is complete in every store, or undone in every store."""

    OPEN = "open"
    DONE = "done"
    UNDONE = "undone"


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime, also on SQLite, which forgets the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store in UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Read as UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _now() -> datetime:
    return datetime.now(UTC)


def _states(kind: type[StrEnum], name: str) -> Enum:
    """A short string with a CHECK on it: one migration away from a new state on every database."""
    return Enum(
        kind,
        name=name,
        native_enum=False,
        create_constraint=True,
        length=16,
        values_callable=lambda members: [member.value for member in members],
    )


class Table(DeclarativeBase):
    """Base of the registry's tables."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: JSON,
        dict[str, float]: JSON,
        list[int]: JSON(none_as_null=True),
        list[float]: JSON(none_as_null=True),
        list[list[float]]: JSON(none_as_null=True),
        datetime: UtcDateTime,
    }


class BaseModel(Table):
    """A frozen pretrained model, identified by its content."""

    __tablename__ = "regraft_base_models"
    __table_args__ = (
        CheckConstraint("length(identity_sha256) = 64", name="identity_is_sha256"),
        CheckConstraint("successor_id <> id", name="not_its_own_successor"),
        CheckConstraint("parameters > 0", name="has_parameters"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    reference: Mapped[str] = mapped_column(Text)
    identity_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    family: Mapped[str] = mapped_column(String(63))
    parameters: Mapped[int] = mapped_column(BigInteger)
    revision: Mapped[str | None] = mapped_column(String(255))
    created_at: Mapped[datetime] = mapped_column(default=_now)
    deprecated_at: Mapped[datetime | None]
    successor_id: Mapped[int | None] = mapped_column(ForeignKey("regraft_base_models.id"))

    successor: Mapped["BaseModel | None"] = relationship(remote_side=[id], lazy="joined", join_depth=1)


class Adapter(Table):
    """A named thing that solves a task."""

    __tablename__ = "regraft_adapters"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    task: Mapped[str | None] = mapped_column(String(255))
    description: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=_now)


class Dataset(Table):
    """What a version was trained on, by content."""

    __tablename__ = "regraft_datasets"
    __table_args__ = (UniqueConstraint("name", "fingerprint"), CheckConstraint("rows >= 0", name="counts_rows"))

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    fingerprint: Mapped[str] = mapped_column(String(64), index=True)
    rows: Mapped[int]
    origin: Mapped[dict[str, Any]]
    drawn_from_id: Mapped[int | None] = mapped_column(ForeignKey("regraft_dataset_versions.id"), index=True)

    drawn_from: Mapped["DatasetVersion | None"] = relationship(lazy="joined")


class DatasetVersion(Table):
    """One immutable set of rows that was chosen and is kept whole, scores and all; `origin` says how it was chosen."""

    __tablename__ = "regraft_dataset_versions"
    __table_args__ = (
        UniqueConstraint("name", "number"),
        CheckConstraint("number >= 1", name="number_from_one"),
        CheckConstraint("rows >= 1", name="has_rows"),
        CheckConstraint("length(artifact_sha256) = 64", name="artifact_is_sha256"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(63))
    number: Mapped[int]
    fingerprint: Mapped[str] = mapped_column(String(64), index=True)
    rows: Mapped[int] = mapped_column(BigInteger)
    origin: Mapped[dict[str, Any]]
    artifact_sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    ready: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(default=_now)

    @property
    def address(self) -> str:
        """`name@3`."""
        return f"{self.name}@{self.number}"


class Version(Table):
    """One immutable set of tensors and config of an adapter for one base model.

    `uid` is how MLflow knows the version: unlike the address, it never means another registry's version.
    A trigger keeps what was registered: artifact, number, adapter and base of a ready version cannot be changed, nor
    can it become pending or failed again.
    """

    __tablename__ = "regraft_versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "number"),
        UniqueConstraint("id", "adapter_id"),  # what an alias refers to: a version of its own adapter
        CheckConstraint("number >= 1", name="number_from_one"),
        CheckConstraint("trainable_parameters >= 0", name="counts_parameters"),
        CheckConstraint("length(artifact_sha256) = 64", name="artifact_is_sha256"),
        CheckConstraint("state NOT IN ('ready', 'retired') OR mlflow_version IS NOT NULL", name="ready_is_in_mlflow"),
        CheckConstraint("state <> 'failed' OR failure IS NOT NULL", name="failure_has_a_reason"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    uid: Mapped[str] = mapped_column(String(32), unique=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("regraft_adapters.id"))
    number: Mapped[int]
    base_model_id: Mapped[int] = mapped_column(ForeignKey("regraft_base_models.id"), index=True)
    dataset_id: Mapped[int | None] = mapped_column(ForeignKey("regraft_datasets.id"))
    method: Mapped[str] = mapped_column(String(63))
    recipe: Mapped[dict[str, Any]]
    metrics: Mapped[dict[str, float]]
    artifact_sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    trainable_parameters: Mapped[int] = mapped_column(BigInteger)
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))
    mlflow_version: Mapped[int | None]
    state: Mapped[VersionState] = mapped_column(
        _states(VersionState, "state"), default=VersionState.PENDING, index=True
    )
    failure: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=_now)

    adapter: Mapped[Adapter] = relationship(lazy="joined")
    base_model: Mapped[BaseModel] = relationship(lazy="joined")
    dataset: Mapped[Dataset | None] = relationship(lazy="joined")
    aliases: Mapped[list["Alias"]] = relationship(
        lazy="selectin", viewonly=True, order_by="Alias.alias", primaryjoin="Version.id == foreign(Alias.version_id)"
    )

    @property
    def address(self) -> str:
        """`name@3`."""
        return f"{self.adapter.name}@{self.number}"


class Attachment(Table):
    """An artifact that belongs to a version beside its own; not there for anybody until it is `ready`."""

    __tablename__ = "regraft_attachments"
    __table_args__ = (
        CheckConstraint("length(artifact_sha256) = 64", name="artifact_is_sha256"),
        Index("ix_regraft_attachments_version_id", "version_id", "relation"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("regraft_versions.id"))
    relation: Mapped[str] = mapped_column(String(63))
    artifact_sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    details: Mapped[dict[str, Any]]
    ready: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(default=_now)

    version: Mapped[Version] = relationship(lazy="joined")


class LineageEdge(Table):
    """The child came from the parent by `relation`."""

    __tablename__ = "regraft_lineage"
    __table_args__ = (CheckConstraint("child_id <> parent_id", name="not_its_own_parent"),)

    child_id: Mapped[int] = mapped_column(ForeignKey("regraft_versions.id"), primary_key=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey("regraft_versions.id"), primary_key=True, index=True)
    relation: Mapped[str] = mapped_column(String(63), primary_key=True)
    details: Mapped[dict[str, Any]]


class Alias(Table):
    """The deciding copy of a movable pointer; moved only by compare-and-swap on `generation`, never deleted."""

    __tablename__ = "regraft_aliases"
    __table_args__ = (
        ForeignKeyConstraint(["version_id", "adapter_id"], ["regraft_versions.id", "regraft_versions.adapter_id"]),
        CheckConstraint("generation >= 1", name="generation_from_one"),
        Index("ix_regraft_aliases_version_id", "version_id"),
    )

    adapter_id: Mapped[int] = mapped_column(ForeignKey("regraft_adapters.id"), primary_key=True)
    alias: Mapped[str] = mapped_column(String(63), primary_key=True)
    version_id: Mapped[int]
    generation: Mapped[int]
    moved_at: Mapped[datetime] = mapped_column(default=_now)

    adapter: Mapped[Adapter] = relationship(lazy="joined", viewonly=True)
    version: Mapped[Version] = relationship(
        lazy="joined", viewonly=True, primaryjoin="foreign(Alias.version_id) == Version.id"
    )


class Evaluation(Table):
    """One measured number with its uncertainty, and what a paired test needs of each item.

    `outcomes` are 0 or 1, `scores` any numbers whose mean is the value; `components` are rows of numbers that a value
    which is no mean is computed from (n-gram counts of BLEU).
    """

    __tablename__ = "regraft_evaluations"
    __table_args__ = (
        CheckConstraint("samples >= 0", name="counts_samples"),
        CheckConstraint("low IS NULL OR high IS NULL OR low <= high", name="interval_in_order"),
        Index("ix_regraft_evaluations_version_id", "version_id", "suite", "metric"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("regraft_versions.id"))
    suite: Mapped[str] = mapped_column(String(255))
    metric: Mapped[str] = mapped_column(String(63))
    value: Mapped[float]
    unit: Mapped[str | None] = mapped_column(String(31))
    stderr: Mapped[float | None]
    low: Mapped[float | None]
    high: Mapped[float | None]
    samples: Mapped[int]
    dataset_fingerprint: Mapped[str | None] = mapped_column(String(64))
    outcomes: Mapped[list[int] | None]
    scores: Mapped[list[float] | None]
    components: Mapped[list[list[float]] | None]
    flow_run_id: Mapped[str | None] = mapped_column(String(64))
    at: Mapped[datetime] = mapped_column(default=_now)

    version: Mapped[Version] = relationship(lazy="joined")


class Promotion(Table):
    """Every decision about an alias. Append-only: triggers refuse UPDATE and DELETE.

    `generation` is the alias's generation after the move; of a refusal, the one that it was judged against.
    """

    __tablename__ = "regraft_promotions"
    __table_args__ = (
        CheckConstraint("decision <> 'forced' OR (reason IS NOT NULL AND reason <> '')", name="force_has_a_reason"),
        Index("ix_regraft_promotions_adapter_id", "adapter_id", "alias", "id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("regraft_adapters.id"))
    alias: Mapped[str] = mapped_column(String(63))
    from_version_id: Mapped[int | None] = mapped_column(ForeignKey("regraft_versions.id"))
    to_version_id: Mapped[int] = mapped_column(ForeignKey("regraft_versions.id"))
    decision: Mapped[Decision] = mapped_column(_states(Decision, "decision"))
    generation: Mapped[int]
    report: Mapped[dict[str, Any]]
    actor: Mapped[str] = mapped_column(String(255))
    reason: Mapped[str | None] = mapped_column(Text)
    at: Mapped[datetime] = mapped_column(default=_now)

    from_version: Mapped[Version | None] = relationship(foreign_keys=[from_version_id], lazy="joined")
    to_version: Mapped[Version] = relationship(foreign_keys=[to_version_id], lazy="joined")


class JournalEntry(Table):
    """Write-ahead note of work that spans the tables, the artifact store and MLflow."""

    __tablename__ = "regraft_journal"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(31))
    payload: Mapped[dict[str, Any]]
    state: Mapped[JournalState] = mapped_column(_states(JournalState, "state"), default=JournalState.OPEN, index=True)
    owner: Mapped[str | None] = mapped_column(String(255))
    at: Mapped[datetime] = mapped_column(default=_now)
    closed_at: Mapped[datetime | None]
