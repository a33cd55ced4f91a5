"""What every artifact store does alike, whatever holds its bytes: storing, checking, fetching, collecting, repairing.

Blobs come first and the manifest last, so an artifact that can be seen is whole. Manifests are added and blobs removed
only by the holder of the store's one lock, so no deletion can take a blob away from under an artifact in the making.
"""

import hashlib
import os
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from pathlib import Path, PurePosixPath
from shutil import rmtree

from infra.errors import Conflict, CorruptArtifact, InvalidInput, NotFound, ServiceUnavailable
from infra.files import require_free
from registry.artifacts import (
    ABANDONED_AFTER,
    ArtifactStore,
    Manifest,
    StoredFile,
    path_problem,
    require_sha256,
)
from registry.durable_files import (
    CHUNK_BYTES,
    explained_disk_errors,
    make_directory,
    sync_directory,
    write_new_file,
)

Chunks = Callable[[], Iterator[bytes]]  # opens a file's content anew at each call


class ContentAddressedStore(ABC):
    """An artifact store over a few primitives: write, read, list and remove blobs and manifests, and lock."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Where the store is; printable."""

    @abstractmethod
    def read_blob(self, sha256: str) -> Iterator[bytes]:
        """Stream a blob, unchecked; `NotFound` at the first chunk when it is not there."""

    @abstractmethod
    def _blob_size(self, sha256: str) -> int | None:
        """Bytes of a blob, or None when it is not there."""

    @abstractmethod
    def _write_blob(self, sha256: str, size: int, chunks: Iterable[bytes]) -> None:
        """Make a blob durable, replacing what stands under its name; nothing may appear there if `chunks` raises."""

    @abstractmethod
    def _read_manifest(self, sha256: str) -> bytes | None:
        """A manifest's stored bytes, or None."""

    @abstractmethod
    def _write_manifest(self, sha256: str, content: bytes) -> None:
        """Make a manifest durable, replacing what stands under its name."""

    @abstractmethod
    def _remove_manifest(self, sha256: str) -> None:
        """Remove a manifest that is there."""

    @abstractmethod
    def _remove_blobs(self, sha256s: list[str]) -> None:
        """Remove blobs; one that is not there is no error."""

    @abstractmethod
    def _blobs_older_than(self, age: timedelta) -> Iterator[str]:
        """The names of blobs written at least `age` ago."""

    @abstractmethod
    def _sweep_unfinished(self, older_than: timedelta) -> int:
        """Remove temporary files or half uploads of at least that age; returns their number."""

    @abstractmethod
    def _lock(self) -> AbstractContextManager[Callable[[], None]]:
        """Hold the store's lock. The value, when called, raises `Conflict` if the lock may have been lost."""

    @abstractmethod
    def artifacts(self) -> Iterator[str]:
        """The addresses of all artifacts."""

    def put(self, directory: Path) -> Manifest:
        """Store every file below `directory`; see `ArtifactStore.put`."""
        manifest = manifest_of(directory)
        while True:
            for file in manifest.files:
                self._ensure_blob(file, partial(_read_regular, directory / file.path), str(directory))
            if self._publish(manifest):
                return manifest

    def manifest(self, sha256: str) -> Manifest:
        """The artifact's manifest, hash-checked; see `ArtifactStore.manifest`."""
        content = self._read_manifest(require_sha256(sha256))
        if content is None:
            raise NotFound(f"There is no artifact {sha256[:12]}… in {self.url}.")
        actual = hashlib.sha256(content).hexdigest()
        if actual != sha256:
            raise CorruptArtifact(
                f"The manifest of artifact {sha256[:12]}… in {self.url} has changed: it hashes to {actual[:12]}….",
                "Restore it from a copy of the store: regraft fsck --repair --from URL",
            )
        return Manifest.from_json(content.decode(errors="replace"))  # canonical text is ASCII

    def contains(self, sha256: str) -> bool:
        """Whether there is a manifest of that address."""
        return self._read_manifest(require_sha256(sha256)) is not None

    def fetch(self, sha256: str, destination: Path) -> None:
        """Write the artifact to `destination`, checked, whole or not at all; see `ArtifactStore.fetch`."""
        manifest = self.manifest(sha256)
        destination = Path(destination).absolute()
        require_free(destination)
        unfinished = destination.parent / f".{destination.name}.{uuid.uuid4().hex}.partial"
        with explained_disk_errors(destination.parent, manifest.size_bytes):
            make_directory(destination.parent)
            try:
                for file in manifest.files:
                    target = unfinished / PurePosixPath(file.path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_new_file(target, self._checked(file, sha256))
                for folder in {unfinished, *(path for path in unfinished.rglob("*") if path.is_dir())}:
                    sync_directory(folder)
                require_free(destination)
                unfinished.rename(destination)
                sync_directory(destination.parent)
            finally:
                rmtree(unfinished, ignore_errors=True)

    def verify(self, sha256: str) -> list[str]:
        """Read everything and say what is wrong; see `ArtifactStore.verify`."""
        try:
            manifest = self.manifest(sha256)
        except (NotFound, CorruptArtifact) as error:
            return [error.what]
        return [problem for file in manifest.files if (problem := self._blob_problem(file))]

    def delete(self, sha256: str) -> None:
        """Remove the artifact and the blobs that only it uses; see `ArtifactStore.delete`."""
        with self._lock() as still_held:
            if not self.contains(sha256):
                raise NotFound(f"There is no artifact {sha256[:12]}… in {self.url}.")
            try:
                candidates = {file.sha256 for file in self.manifest(sha256).files}
            except CorruptArtifact:
                candidates = set()  # which blobs were its own is lost; sweep() collects them
            self._remove_manifest(sha256)
            self._collect(candidates, still_held)

    def sweep(self, older_than: timedelta = ABANDONED_AFTER) -> int:
        """Remove what interrupted work left behind; see `ArtifactStore.sweep`."""
        unfinished = self._sweep_unfinished(older_than)
        with self._lock() as still_held:
            return unfinished + self._collect(set(self._blobs_older_than(older_than)), still_held)

    def repair(self, sha256: str, source: ArtifactStore) -> list[str]:
        """Restore manifest and blobs from `source`, each checked; see `ArtifactStore.repair`."""
        restored, failures = [], []
        try:
            manifest, manifest_is_well = self.manifest(sha256), True
        except (NotFound, CorruptArtifact):
            manifest, manifest_is_well = source.manifest(sha256), False
        for file in manifest.files:
            if problem := self._blob_problem(file):
                try:
                    self._ensure_blob(file, partial(source.read_blob, file.sha256), source.url)
                    restored.append(f"{file.path}: restored from {source.url} ({problem})")
                except (NotFound, Conflict) as error:
                    failures.append(f"{file.path}: {error.what}")
        if failures:
            raise CorruptArtifact(
                f"Artifact {sha256[:12]}… could not be restored in full from {source.url}: {'; '.join(failures)}.",
                "Try another copy of the store.",
            )
        if not manifest_is_well:
            if not self._publish(manifest):
                raise Conflict(
                    f"A deletion took blobs of artifact {sha256[:12]}… away again.", "Run the command again."
                )
            restored.append(f"manifest: restored from {source.url}")
        return restored

    def _ensure_blob(self, file: StoredFile, open_source: Chunks, origin: str) -> None:
        """Leave with an intact, durable, re-read blob of `file`; one that is there and intact is kept."""
        if self._blob_problem(file) is None:
            return
        self._write_blob(file.sha256, file.size, _unchanged(open_source(), file, origin))
        if problem := self._blob_problem(file):
            self._remove_blobs([file.sha256])
            raise ServiceUnavailable(
                f"{self.url} did not keep what was written to it: {problem}.", "Check the disk or the server behind it."
            )

    def _publish(self, manifest: Manifest) -> bool:
        """Write the manifest, or return False if a deletion has just taken one of its blobs, which nobody used yet."""
        with self._lock() as still_held:
            if any(self._blob_size(file.sha256) != file.size for file in manifest.files):
                return False
            still_held()
            self._ensure_manifest(manifest)
            return True

    def _ensure_manifest(self, manifest: Manifest) -> None:
        content = manifest.to_json().encode()
        if self._read_manifest(manifest.sha256) == content:
            return
        self._write_manifest(manifest.sha256, content)
        if self._read_manifest(manifest.sha256) != content:
            raise ServiceUnavailable(
                f"{self.url} did not keep the manifest that was written to it.",
                "Check the disk or the server behind it.",
            )

    def _blob_problem(self, file: StoredFile) -> str | None:
        """Read a blob; one sentence on what is wrong with it, or None."""
        size = self._blob_size(file.sha256)
        if size is None:
            return f"{file.path}: its content {file.sha256[:12]}… is missing from {self.url}"
        if size != file.size:
            return f"{file.path}: {size:,} bytes are stored in {self.url}, {file.size:,} were registered"
        actual = hashlib.sha256()
        for chunk in self.read_blob(file.sha256):
            actual.update(chunk)
        if actual.hexdigest() != file.sha256:
            return (
                f"{file.path}: fails its checksum in {self.url}: SHA-256 {file.sha256[:12]}… was registered, "
                f"the stored {size:,} bytes hash to {actual.hexdigest()[:12]}…"
            )
        return None

    def _checked(self, file: StoredFile, artifact: str) -> Iterator[bytes]:
        """Stream a blob; `CorruptArtifact` at its end, or where it grows too long, when it is not what was stored."""
        remedy = "Restore it from a copy of the store: regraft fsck --repair --from URL"
        size, digest = 0, hashlib.sha256()
        try:
            for chunk in self.read_blob(file.sha256):
                size += len(chunk)
                digest.update(chunk)
                if size > file.size:
                    break
                yield chunk
        except NotFound:
            raise CorruptArtifact(
                f"Artifact {artifact[:12]}… lacks {file.path}: its content is missing from {self.url}.", remedy
            ) from None
        if size != file.size or digest.hexdigest() != file.sha256:
            raise CorruptArtifact(
                f"Artifact {artifact[:12]}… fails its checksum: {file.path} in {self.url} is not the "
                f"{file.size:,} bytes of SHA-256 {file.sha256[:12]}… that were registered.",
                remedy,
            )

    def _collect(self, candidates: set[str], still_held: Callable[[], None]) -> int:
        """Remove those blobs that no manifest uses; returns their number. The caller holds the lock."""
        if not candidates:
            return 0
        try:
            for artifact in self.artifacts():
                candidates -= {file.sha256 for file in self.manifest(artifact).files}
        except CorruptArtifact:
            return 0  # a manifest that cannot be read may need any of them: repair it first
        still_held()
        self._remove_blobs(sorted(candidates))
        return len(candidates)


def manifest_of(directory: Path) -> Manifest:
    """The manifest that a store would give the directory; nothing is stored.

    Raises:
        NotFound: no such directory.
        InvalidInput: it is empty, or holds something that is not stored.
    """
    files = regular_files(directory)
    if not files:
        raise InvalidInput(f"{directory} holds no file.", "An artifact needs at least one.")
    return Manifest(tuple(_describe(path, source) for path, source in files.items()))


def regular_files(directory: Path) -> dict[str, Path]:
    """The files below `directory` by POSIX path, sorted; nothing but plain files and folders is let through.

    Raises:
        NotFound: no such directory.
        InvalidInput: a link, a special file, or a name that a manifest may not hold.
    """
    if not directory.is_dir():
        raise NotFound(f"{directory} is not a directory.", "Check the path.")
    files = {}
    for folder, subfolders, names in os.walk(directory, onerror=_raise):
        for name in (*subfolders, *names):
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise InvalidInput(
                    f"{path} is a symbolic link; links are not stored, since they may lead out of the directory.",
                    f"Copy the directory with the links resolved: cp -rL {directory} COPY",
                )
            if problem := path_problem(relative):
                raise InvalidInput(f"{relative!r} in {directory} {problem}.", "Rename it.")
            if stat.S_ISREG(mode):
                files[relative] = path
            elif not stat.S_ISDIR(mode):
                raise InvalidInput(f"{path} is neither a file nor a folder.", "Remove it.")
    return dict(sorted(files.items()))


def _raise(error: OSError) -> None:
    raise InvalidInput(f"{error.filename} cannot be read: {error.strerror}.", "Check who owns it.") from error


def _read_regular(path: Path) -> Iterator[bytes]:
    """Stream a file that was just seen to be regular; a link put in its place meanwhile is not followed."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=0) as file:  # noqa: PTH123
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}.", "Check that it is there and yours.") from error


def _describe(path: str, source: Path) -> StoredFile:
    size, digest = 0, hashlib.sha256()
    for chunk in _read_regular(source):
        size += len(chunk)
        digest.update(chunk)
    return StoredFile(path, size, digest.hexdigest())


def _unchanged(chunks: Iterator[bytes], file: StoredFile, origin: str) -> Iterator[bytes]:
    """Pass `chunks` on, but raise `Conflict` instead of ending when they were not the content of `file`.

    The last chunk is held back until the hash is known, so that a receiver never has the whole of a wrong content.
    """
    size, digest, held = 0, hashlib.sha256(), b""
    for chunk in chunks:
        size += len(chunk)
        digest.update(chunk)
        if held:
            yield held
        held = chunk
        if size > file.size:
            break
    if size != file.size or digest.hexdigest() != file.sha256:
        raise Conflict(
            f"{file.path} in {origin} changed while it was being read, or is not what its hash says.",
            "Let whatever writes it finish, then run the command again.",
        )
    yield held
