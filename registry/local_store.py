"""The artifact store in a folder: the embedded default."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from filelock import FileLock, Timeout

from infra.errors import Conflict, NotFound
from registry.artifacts import is_sha256, require_sha256
from registry.content_store import ContentAddressedStore
from registry.durable_files import (
    drop_from_page_cache,
    explained_disk_errors,
    make_directory,
    read_chunks,
    sync_directory,
    write_new_file,
)

LOCK_WAIT_SECONDS = 300.0
READ_ONLY = 0o444


class LocalArtifactStore(ContentAddressedStore):
    """Blobs and manifests as read-only files, written beside their place and renamed into it.

    Layout: `blobs/aa/SHA256`, `manifests/SHA256.json`, `temporary/`, `lock`.

    Raises:
        ServiceUnavailable: the folder cannot be made or written, here or in any method; a full disk is named as such.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._blobs, self._manifests = self.root / "blobs", self.root / "manifests"
        self._temporary = self.root / "temporary"
        with explained_disk_errors(self.root, 0):
            for directory in (self._blobs, self._manifests, self._temporary):
                make_directory(directory)

    @property
    def url(self) -> str:
        """The folder."""
        return str(self.root)

    def artifacts(self) -> Iterator[str]:
        """The addresses of all artifacts."""
        with explained_disk_errors(self.root, 0):
            names = [path.stem for path in self._manifests.glob("*.json")]
        return (name for name in names if is_sha256(name))

    def read_blob(self, sha256: str) -> Iterator[bytes]:
        """Stream a blob, unchecked; `NotFound` at the first chunk when it is not there."""
        with explained_disk_errors(self.root, 0):
            try:
                yield from read_chunks(self._blob(sha256))
            except FileNotFoundError:
                raise NotFound(f"Blob {sha256[:12]}… is not in {self.url}.") from None

    def _blob(self, sha256: str) -> Path:
        return self._blobs / require_sha256(sha256)[:2] / sha256

    def _manifest_file(self, sha256: str) -> Path:
        return self._manifests / f"{require_sha256(sha256)}.json"

    def _blob_size(self, sha256: str) -> int | None:
        with explained_disk_errors(self.root, 0):
            try:
                return self._blob(sha256).stat().st_size
            except FileNotFoundError:
                return None

    def _write_blob(self, sha256: str, size: int, chunks: Iterable[bytes]) -> None:
        self._write(self._blob(sha256), size, chunks)

    def _read_manifest(self, sha256: str) -> bytes | None:
        with explained_disk_errors(self.root, 0):
            try:
                return b"".join(read_chunks(self._manifest_file(sha256)))
            except FileNotFoundError:
                return None

    def _write_manifest(self, sha256: str, content: bytes) -> None:
        self._write(self._manifest_file(sha256), len(content), [content])

    def _write(self, path: Path, size: int, chunks: Iterable[bytes]) -> None:
        temporary = self._temporary / uuid.uuid4().hex
        with explained_disk_errors(self.root, size):
            try:
                write_new_file(temporary, chunks)
                drop_from_page_cache(temporary)
                temporary.chmod(READ_ONLY)
                make_directory(path.parent)
                temporary.replace(path)
                sync_directory(path.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def _remove_manifest(self, sha256: str) -> None:
        with explained_disk_errors(self.root, 0):
            self._manifest_file(sha256).unlink()
            sync_directory(self._manifests)

    def _remove_blobs(self, sha256s: list[str]) -> None:
        with explained_disk_errors(self.root, 0):
            for sha256 in sha256s:
                self._blob(sha256).unlink(missing_ok=True)

    def _blobs_older_than(self, age: timedelta) -> Iterator[str]:
        return (path.name for path in _older_than(age, self._blobs.glob("??/*")) if is_sha256(path.name))

    def _sweep_unfinished(self, older_than: timedelta) -> int:
        with explained_disk_errors(self.root, 0):
            abandoned = list(_older_than(older_than, self._temporary.iterdir()))
            for path in abandoned:
                path.unlink(missing_ok=True)
        return len(abandoned)

    @contextmanager
    def _lock(self) -> Iterator[Callable[[], None]]:
        lock = FileLock(self.root / "lock", timeout=LOCK_WAIT_SECONDS)
        with explained_disk_errors(self.root, 0):
            try:
                lock.acquire()
            except Timeout:
                raise Conflict(
                    f"Another process has been holding {lock.lock_file} for {LOCK_WAIT_SECONDS:.0f} seconds.",
                    "Wait for it, or end it.",
                ) from None
        try:
            yield lambda: None  # the system holds the lock until this process lets go of it or dies
        finally:
            lock.release()


def _older_than(age: timedelta, paths: Iterable[Path]) -> Iterator[Path]:
    oldest_kept = time.time() - age.total_seconds()
    for path in paths:
        try:
            if path.stat().st_mtime <= oldest_kept:
                yield path
        except FileNotFoundError:  # gone meanwhile
            continue
