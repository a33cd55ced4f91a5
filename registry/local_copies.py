"""Verified local copies of artifacts."""

import shutil
from pathlib import Path

from filelock import FileLock

from infra.errors import CorruptArtifact, InvalidInput
from registry.artifacts import ArtifactStore
from registry.content_store import manifest_of


def materialise(store: ArtifactStore, artifact_sha256: str, folder: Path) -> Path:
    """`folder/SHA256`, holding exactly that artifact: hashed at every call, fetched when it is missing or damaged.

    Raises:
        NotFound, CorruptArtifact: the store does not have it, or not intact.
    """
    destination = folder / artifact_sha256
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{artifact_sha256}.lock"):
        if destination.exists() and not _is_intact(destination, artifact_sha256):
            shutil.rmtree(destination)
        if not destination.exists():
            store.fetch(artifact_sha256, destination)
            if not _is_intact(destination, artifact_sha256):
                raise CorruptArtifact(f"Artifact {artifact_sha256[:12]}… changed on its way to {destination}.")
    return destination


def _is_intact(directory: Path, artifact_sha256: str) -> bool:
    try:
        return manifest_of(directory).sha256 == artifact_sha256
    except InvalidInput:
        return False
