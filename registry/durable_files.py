"""Files that a power cut leaves either whole or absent, and full disks that explain themselves."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import ServiceUnavailable

CHUNK_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_new_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write `chunks` to a file that must not exist yet, and bring it to the disk."""
    with path.open("xb", buffering=0) as file:
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:  # a raw file may take less than it is given
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def drop_from_page_cache(path: Path) -> None:
    """Let the next read of a file that was brought to the disk come from there, where the system allows it."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes in chunks."""
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def make_directory(path: Path) -> None:
    """Create a directory and its parents so that their names survive a power cut."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Bring the directory's entries (new names, renames, removals) to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained_disk_errors(directory: Path, needed: int) -> Iterator[None]:
    """Turn an `OSError` of the block into a `ServiceUnavailable` that names `directory`.

    Args:
        directory: the place that is being written, or its nearest parent that exists.
        needed: bytes that the block wants to write there.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ServiceUnavailable(
                f"No room in {directory}: {needed:,} bytes are needed, {_free_bytes(directory):,} are free "
                f"({os.strerror(error.errno)}). Nothing half-written was left behind.",
                "Free some space (or raise the quota) and run the command again.",
            ) from error
        raise ServiceUnavailable(
            f"{error.filename or directory} cannot be read or written: {error.strerror or error}.",
            f"Check that {directory} exists, is mounted and belongs to you.",
        ) from error


def _free_bytes(directory: Path) -> int:
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free
