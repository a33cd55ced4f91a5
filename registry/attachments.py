"""Artifacts that belong to a version beside its own, found by what they are to it (`migration_kit`).

They are kept for ever, as the version is: another of the same relation takes the place of the one before, which stays.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from infra.errors import InvalidInput
from registry import versions
from registry.artifacts import ArtifactStore, Manifest
from registry.database import Database
from registry.keeping import Keeping
from registry.models import Adapter, Attachment, BaseModel, Version
from registry.records import AttachmentRecord

KIND = "attach"
MIGRATION_KIT = "migration_kit"


def attach(
    database: Database, store: ArtifactStore, address: str, relation: str, directory: Path, details: Mapping[str, Any]
) -> int:
    """Keep a directory as something that belongs to a version; returns the id of the ready attachment.

    Raises:
        Conflict: the version is not ready, or the directory changed meanwhile.
        InvalidInput: the relation has no name, or the directory is empty or holds a link or a special file.
    """
    if not relation:
        raise InvalidInput(f"What is attached to {address} needs a relation to it.")

    def made(session: Session, manifest: Manifest) -> Attachment:
        version = versions.find(session, address)
        versions.require_loadable(version)
        return Attachment(
            version_id=version.id,
            relation=relation,
            artifact_sha256=manifest.sha256,
            size_bytes=manifest.size_bytes,
            details=dict(details),
        )

    return keeping(database, store).keep(directory, f"{relation} of {address}", made)


def keeping(database: Database, store: ArtifactStore) -> Keeping[Attachment]:
    """The steps of attaching."""
    return Keeping(database, store, Attachment, KIND)


def named(row: Attachment) -> str:
    """What it is called in messages."""
    return f"{row.version.address} {row.relation}"


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
