"""How a version comes to be: announced, stored, known to MLflow, ready; or failed, without a trace in any store.

Each step is durable before the next begins, and each can be repeated:

1. *announce*: one transaction writes the journal entry and the pending row, with its number and the hash of its bytes;
2. *store*: the bytes, re-read and hash-checked by the store;
3. *complete*: the MLflow model version, found again by the row's uid, then one transaction: journal done, row ready;
4. *undo*, instead of 2 or 3: one transaction fails the row; MLflow's version and the bytes go; journal undone.

After a crash `fsck` completes what has its bytes and undoes the rest. A number is never used twice.
"""

import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from infra.errors import BaseModelMismatch, Conflict, NotFound, RegraftError
from registry import dataset_versions, journal, lineage, versions
from registry.adapter_directory import AdapterFiles
from registry.artifact_use import delete_if_unused
from registry.artifacts import ArtifactStore
from registry.content_store import manifest_of
from registry.database import Database
from registry.models import (
    Adapter,
    BaseModel,
    Dataset,
    JournalState,
    Version,
    VersionState,
)
from registry.records import BaseModelRecord, DatasetRecord, Parent, short
from registry.tracking import Tracking, artifact_source

KIND = "register"


@dataclass(frozen=True, slots=True)
class Announcement:
    """What is said of a version when it is registered.

    Attributes:
        adapter: its name; a new adapter is created.
        base_identity: of a registered base model.
        method: as in the catalogue of methods.
        recipe: all that is needed to make it again.
        trainable_parameters: how many were trained.
        task: of the adapter; replaces what was said before.
        description: of the adapter; replaces what was said before.
        mlflow_run_id: the run that trained it.
        metrics: numbers of the training.
        dataset: what it was trained on.
        parents: the versions that it comes from.
    """

    adapter: str
    base_identity: str
    method: str
    recipe: Mapping[str, Any]
    trainable_parameters: int
    task: str | None = None
    description: str | None = None
    mlflow_run_id: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    dataset: DatasetRecord | None = None
    parents: Sequence[Parent] = ()


@dataclass(frozen=True, slots=True)
class Registration:
    """The steps of registering, over the three stores."""

    database: Database
    store: ArtifactStore
    tracking: Tracking

    def register(self, directory: Path, announcement: Announcement) -> int:
        """Take an inspected adapter directory through all steps; returns the id of the ready version.

        Raises:
            NotFound, Conflict, InvalidInput: the base model or a parent is not there, or the directory has changed.
            ServiceUnavailable: a store does not answer; the version is failed, with the reason.
        """
        manifest = manifest_of(directory)
        with self.database.writing() as session:
            version = _pending_row(session, announcement, manifest.sha256, manifest.size_bytes)
            entry = journal.announce(session, KIND, {"version_id": version.id, "address": version.address})
        try:
            stored = self.store.put(directory)
            if stored.sha256 != manifest.sha256:
                raise Conflict(
                    f"{directory} changed while {version.address} was being registered.", "Register it again."
                )
            self.complete(version.id, entry)
        except BaseException as error:
            reason = f"{type(error).__name__}: {error.what if isinstance(error, RegraftError) else error}"
            self._give_up(version.id, entry, reason)
            raise
        return version.id

    def complete(self, version_id: int, entry: int) -> None:
        """MLflow's model version, then ready. The bytes must be durable.

        Raises:
            Conflict: the registration was undone meanwhile.
        """
        with self.database.reading() as session:
            version = session.get_one(Version, version_id)
        number = self.tracking.ensure_version(
            version.adapter.name,
            version.uid,
            source=artifact_source(version.artifact_sha256),
            run_id=version.mlflow_run_id,
            tags=version_tags(version),
        )
        with self.database.writing() as session:
            journal.close(session, entry, JournalState.DONE)
            version = session.get_one(Version, version_id)
            if version.state is not VersionState.PENDING:
                raise Conflict(
                    f"{version.address} is {version.state}: its registration was given up.", "Register it again."
                )
            version.mlflow_version = number
            version.state = VersionState.READY

    def undo(self, version_id: int, entry: int, reason: str) -> None:
        """Fail the row, then remove what the registration left in MLflow and in the store.

        Raises:
            Conflict: the registration was completed or undone meanwhile.
        """
        with self.database.writing() as session:
            journal.require_open(session, entry)
            version = session.get_one(Version, version_id)
            version.state = VersionState.FAILED
            version.failure = version.failure or reason
        self.tracking.delete_version(version.adapter.name, version.uid)
        with self.database.writing() as session:
            journal.close(session, entry, JournalState.UNDONE)
            delete_if_unused(session, self.store, version.artifact_sha256)

    def _give_up(self, version_id: int, entry: int, reason: str) -> None:
        """Undo; where a store does not answer even for that, leave the entry open for `fsck`."""
        try:
            self.undo(version_id, entry, reason)
        except Exception:
            with suppress(Exception), self.database.writing() as session:
                journal.abandon(session, entry)


def require_same_base(files: AdapterFiles, base: BaseModelRecord, directory: Path) -> None:
    """The directory's own `regraft.json`, where there is one, must name the base model that it is registered for.

    Raises:
        BaseModelMismatch: it names another.
    """
    said = (files.regraft or {}).get("base")
    named = said.get("identity") if isinstance(said, dict) else None
    if isinstance(said, dict) and named is not None and named != base.identity_sha256:
        raise BaseModelMismatch(
            f"{directory} was trained on {said.get('reference')} (identity {short(str(named))}); it cannot be "
            f"registered for {base.name} (identity {short(base.identity_sha256)}).",
            "Name the base model it was trained on: regraft base list",
        )


def version_tags(version: Version) -> dict[str, str]:
    """What MLflow's version says of ours."""
    return {
        "regraft.address": version.address,
        "regraft.artifact_sha256": version.artifact_sha256,
        "regraft.base_model": version.base_model.name,
        "regraft.base_identity": version.base_model.identity_sha256,
        "regraft.method": version.method,
    }


def _pending_row(session: Session, said: Announcement, artifact_sha256: str, size_bytes: int) -> Version:
    base = session.scalar(select(BaseModel).where(BaseModel.identity_sha256 == said.base_identity))
    if base is None:
        raise NotFound(
            f"No base model with identity {short(said.base_identity)} is registered.",
            "Add it: regraft base add REFERENCE",
        )
    adapter = session.scalar(select(Adapter).where(Adapter.name == said.adapter))
    if adapter is None:
        adapter = Adapter(name=said.adapter)
        session.add(adapter)
    adapter.task = said.task or adapter.task
    adapter.description = said.description or adapter.description
    session.flush()
    newest = session.scalar(select(func.max(Version.number)).where(Version.adapter_id == adapter.id))
    version = Version(
        uid=uuid.uuid4().hex,
        adapter=adapter,
        number=(newest or 0) + 1,
        base_model=base,
        dataset=_dataset(session, said.dataset) if said.dataset else None,
        method=said.method,
        recipe=dict(said.recipe),
        metrics={name: float(value) for name, value in said.metrics.items()},
        artifact_sha256=artifact_sha256,
        size_bytes=size_bytes,
        trainable_parameters=said.trainable_parameters,
        mlflow_run_id=said.mlflow_run_id,
    )
    session.add(version)
    session.flush()
    for parent in said.parents:
        lineage.add_edge(session, version, versions.find(session, parent.address), parent.relation, parent.details)
    return version


def _dataset(session: Session, said: DatasetRecord) -> Dataset:
    known = session.scalar(select(Dataset).where(Dataset.name == said.name, Dataset.fingerprint == said.fingerprint))
    row = known or Dataset(name=said.name, fingerprint=said.fingerprint, rows=said.rows, origin=dict(said.origin))
    if said.drawn_from is not None:
        row.drawn_from = dataset_versions.find(session, said.drawn_from)
    return row
