"""Artifacts that belong to a version beside its own, found by what they are to it (`migration_kit`).

They are kept for ever, as the version is: another of the same relation takes the place of the one before, which stays.
The steps are those of a registration (see registration.py), less MLflow: announced in the tables, stored, made ready.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from infra.errors import Conflict, InvalidInput
from registry import journal, versions
from registry.artifacts import ArtifactStore
from registry.content_store import manifest_of
from registry.database import Database
from registry.models import Adapter, Attachment, BaseModel, JournalState, Version
from registry.records import AttachmentRecord
from registry.registration import delete_if_unused

KIND = "attach"
MIGRATION_KIT = "migration_kit"


@dataclass(frozen=True, slots=True)
class Attaching:
    """The steps of attaching, over tables and artifact store."""

    database: Database
    store: ArtifactStore

    def attach(self, address: str, relation: str, directory: Path, details: Mapping[str, Any]) -> int:
        """Take a directory through all steps; returns the id of the ready attachment.

        Raises:
            Conflict: the version is not ready, or the directory changed meanwhile.
            InvalidInput: the relation has no name, or the directory is empty or holds a link or a special file.
        """
        if not relation:
            raise InvalidInput(f"What is attached to {address} needs a relation to it.")
        manifest = manifest_of(directory)
        with self.database.writing() as session:
            version = versions.find(session, address)
            versions.require_loadable(version)
            row = Attachment(
                version_id=version.id,
                relation=relation,
                artifact_sha256=manifest.sha256,
                size_bytes=manifest.size_bytes,
                details=dict(details),
            )
            session.add(row)
            session.flush()
            attachment_id = row.id
            entry = journal.announce(session, KIND, {"attachment_id": attachment_id, "address": version.address})
        try:
            if self.store.put(directory).sha256 != manifest.sha256:
                raise Conflict(f"{directory} changed while it was being attached to {address}.", "Attach it again.")
            self.complete(attachment_id, entry)
        except BaseException:
            self._give_up(attachment_id, entry)
            raise
        return attachment_id

    def complete(self, attachment_id: int, entry: int) -> None:
        """Make it ready. The bytes must be durable.

        Raises:
            Conflict: it was undone meanwhile.
        """
        with self.database.writing() as session:
            journal.close(session, entry, JournalState.DONE)
            session.get_one(Attachment, attachment_id).ready = True

    def undo(self, attachment_id: int, entry: int) -> None:
        """Take the row out, and the bytes where nothing else uses them.

        Raises:
            Conflict: it was completed or undone meanwhile.
        """
        with self.database.writing() as session:
            journal.close(session, entry, JournalState.UNDONE)
            row = session.get_one(Attachment, attachment_id)
            session.delete(row)
            session.flush()
            delete_if_unused(session, self.store, row.artifact_sha256)

    def _give_up(self, attachment_id: int, entry: int) -> None:
        """Undo; where a store does not answer even for that, leave the entry open for `fsck`."""
        try:
            self.undo(attachment_id, entry)
        except Exception:
            with suppress(Exception), self.database.writing() as session:
                journal.abandon(session, entry)


def newest(session: Session, version: Version, relation: str) -> Attachment | None:
    """The one of a relation that is in force: the last that became ready."""
    query = select(Attachment).where(
        Attachment.version_id == version.id, Attachment.relation == relation, Attachment.ready
    )
    return session.scalar(query.order_by(Attachment.id.desc()).limit(1))


def on_base(session: Session, base: BaseModel, relation: str) -> dict[str, AttachmentRecord]:
    """The ones of a relation that are in force, of all versions on a base model, by address; one query, no rows."""
    query = (
        select(
            Adapter.name,
            Version.number,
            Attachment.artifact_sha256,
            Attachment.size_bytes,
            Attachment.details,
            Attachment.created_at,
        )
        .join(Version, Version.id == Attachment.version_id)
        .join(Adapter, Adapter.id == Version.adapter_id)
        .where(Version.base_model_id == base.id, Attachment.relation == relation, Attachment.ready)
        .order_by(Attachment.id)
    )
    found = ((f"{name}@{number}", *rest) for name, number, *rest in session.execute(query))
    return {address: AttachmentRecord(address, relation, *rest) for address, *rest in found}  # the last one stays


def of_version(session: Session, version: Version) -> list[Attachment]:
    """All that are ready, newest first."""
    query = select(Attachment).where(Attachment.version_id == version.id, Attachment.ready)
    return list(session.scalars(query.order_by(Attachment.id.desc())).unique())
