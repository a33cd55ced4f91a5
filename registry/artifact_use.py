"""Which artifacts are somebody's."""

from contextlib import suppress

from sqlalchemy import select
from sqlalchemy.orm import Session

from infra.errors import NotFound
from registry.artifacts import ArtifactStore
from registry.models import Attachment, DatasetVersion, Version, VersionState


def used_artifacts(session: Session) -> set[str]:
    """The artifacts of versions that have not failed, those attached to versions, and those of data sets."""
    own = session.scalars(select(Version.artifact_sha256).where(Version.state != VersionState.FAILED))
    others = (select(Attachment.artifact_sha256), select(DatasetVersion.artifact_sha256))
    return {*own, *(sha256 for query in others for sha256 in session.scalars(query))}


def delete_if_unused(session: Session, store: ArtifactStore, artifact_sha256: str) -> bool:
    """Delete an artifact that no living version, attachment or data set refers to; call it under the writers' lock.

    Whoever stores announces the hash under the same lock before, so none can come to rely on these bytes.
    """
    if artifact_sha256 in used_artifacts(session) or not store.contains(artifact_sha256):
        return False
    with suppress(NotFound):
        store.delete(artifact_sha256)
    return True
