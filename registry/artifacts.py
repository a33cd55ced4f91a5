"""What a version's files are called and hashed to, and what every artifact store can do with them.

An artifact is a directory of files, stored by content: each file once under `blobs/aa/SHA256`, and a manifest that
lists them. The SHA-256 of the manifest is the artifact's address, so nothing that it names can change unnoticed.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from infra.errors import CorruptArtifact, InvalidInput
from infra.settings import Settings

MANIFEST_FORMAT = 1
ABANDONED_AFTER = timedelta(days=1)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(text: object) -> bool:
    """Whether `text` is 64 lower-case hexadecimal digits."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def require_sha256(text: str) -> str:
    """Return `text`, an artifact's address.

    Raises:
        InvalidInput: it is not one; a store builds file names from it, so nothing else may pass.
    """
    if not is_sha256(text):
        raise InvalidInput(f"{text!r} is not the address of an artifact.", "An address is 64 hexadecimal digits.")
    return text


def path_problem(path: str) -> str | None:
    """Why a file of that relative path may not be stored or written, or None when it may."""
    if not path or path.startswith("/"):
        return "is not a relative path"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "climbs out of its directory or is not in its plain form"
    if "\\" in path or any(not character.isprintable() for character in path):
        return "holds a backslash, a control character or bytes that are not UTF-8"
    if len(path.encode()) > 1024:
        return "is longer than 1,024 bytes"
    return None


@dataclass(frozen=True)
class StoredFile:
    """One file of an artifact: its POSIX path within the directory, its size in bytes, its SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of one artifact, sorted by path."""

    files: tuple[StoredFile, ...]

    def to_json(self) -> str:
        """The canonical text: sorted keys, no spaces, ASCII. Equal manifests give equal bytes."""
        files = [{"path": f.path, "sha256": f.sha256, "size": f.size} for f in self.files]
        return json.dumps({"files": files, "format": MANIFEST_FORMAT}, sort_keys=True, separators=(",", ":"))

    @property
    def sha256(self) -> str:
        """The artifact's address: SHA-256 of the canonical text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read a canonical text, trusting nothing in it.

        Raises:
            CorruptArtifact: not such a text, or a path in it would be written outside its directory.
        """
        try:
            document = json.loads(text)
            if document.pop("format") != MANIFEST_FORMAT:
                raise ValueError
            manifest = cls(tuple(StoredFile(**entry) for entry in document["files"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise CorruptArtifact(f"This is not a manifest of format {MANIFEST_FORMAT}: {text[:80]!r}.") from None
        manifest._refuse_what_cannot_be_written()
        if manifest.to_json() != text:
            raise CorruptArtifact("A manifest is not in its canonical form.")
        return manifest

    def _refuse_what_cannot_be_written(self) -> None:
        paths = set()
        for file in self.files:
            if type(file.path) is not str or type(file.size) is not int or file.size < 0 or not is_sha256(file.sha256):
                raise CorruptArtifact(f"A manifest holds a malformed entry: {file!r:.200}.")
            if problem := path_problem(file.path):
                raise CorruptArtifact(f"A manifest names the file {file.path!r:.200}, which {problem}.")
            paths.add(file.path)
        folders = {str(parent) for path in paths for parent in Path(path).parents}
        if not self.files or len(paths) != len(self.files) or paths & folders:
            raise CorruptArtifact("A manifest lists no file, one file twice, or a file that is also a folder.")
        if list(self.files) != sorted(self.files, key=lambda file: file.path):
            raise CorruptArtifact("A manifest does not list its files in order.")


class ArtifactStore(Protocol):
    """A content-addressed store of artifacts. Every method may raise `ServiceUnavailable`."""

    @property
    def url(self) -> str:
        """Where the store is: a folder or `s3://BUCKET/PREFIX`. Printable, no secrets."""
        ...

    def put(self, directory: Path) -> Manifest:
        """Store every file below `directory`; durable, re-read and hash-checked when this returns. Idempotent.

        Raises:
            NotFound: no such directory.
            InvalidInput: it is empty, or holds a link, a special file or an odd name.
            Conflict: a file changed while it was being stored.
        """
        ...

    def manifest(self, sha256: str) -> Manifest:
        """The artifact's manifest, hash-checked.

        Raises:
            NotFound: no such artifact.
            CorruptArtifact: the stored manifest does not hash to its address, or is not one.
        """
        ...

    def read_blob(self, sha256: str) -> Iterator[bytes]:
        """Stream one file's content, *not* checked.

        Raises:
            NotFound: at the first chunk, when there is no such blob.
        """
        ...

    def fetch(self, sha256: str, destination: Path) -> None:
        """Write the artifact to `destination`, every hash checked; it appears whole or not at all.

        Raises:
            NotFound: no such artifact.
            CorruptArtifact: a byte of it has changed, or a blob is missing.
            Conflict: `destination` exists and is not an empty directory.
        """
        ...

    def verify(self, sha256: str) -> list[str]:
        """Read everything and say what is wrong, one sentence a problem; an empty list when all is well."""
        ...

    def contains(self, sha256: str) -> bool:
        """Whether there is a manifest of that address. Reads no blob."""
        ...

    def artifacts(self) -> Iterator[str]:
        """The addresses of all artifacts, in no particular order."""
        ...

    def delete(self, sha256: str) -> None:
        """Remove the artifact and the blobs that no other artifact uses.

        Raises:
            NotFound: no such artifact.
        """
        ...

    def sweep(self, older_than: timedelta = ABANDONED_AFTER) -> int:
        """Remove what interrupted work left behind (temporary files, half uploads, blobs of no artifact).

        Args:
            older_than: leave anything younger alone, since its writer may still be at work.

        Returns:
            The number of things removed.
        """
        ...

    def repair(self, sha256: str, source: "ArtifactStore") -> list[str]:
        """Restore a missing or corrupt manifest and blobs from `source`, each checked.

        Returns:
            What was restored, one sentence each.

        Raises:
            NotFound, CorruptArtifact: `source` lacks something that is needed here; the rest has been restored.
        """
        ...


def open_artifact_store(settings: Settings) -> ArtifactStore:
    """The store that `settings.artifacts` names: a folder, or `s3://BUCKET/PREFIX`.

    Raises:
        InvalidInput: another kind of URL.
        ServiceUnavailable: a folder that cannot be made or written.
    """
    if settings.artifacts.startswith("s3://"):
        from infra.object_storage import parse_s3_url, s3_client  # boto3 is slow to import
        from registry.s3_store import S3ArtifactStore

        bucket, prefix = parse_s3_url(settings.artifacts)
        return S3ArtifactStore(s3_client(settings), bucket, prefix)
    if "://" in settings.artifacts:
        scheme = settings.artifacts.split("://", 1)[0]
        raise InvalidInput(
            f"An artifact store cannot be opened at a {scheme}:// URL.",
            "Set REGRAFT_ARTIFACT_STORE to a folder or to s3://BUCKET/PREFIX.",
        )
    from registry.local_store import LocalArtifactStore

    return LocalArtifactStore(Path(settings.artifacts).expanduser())
