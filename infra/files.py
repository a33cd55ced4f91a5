"""Files and folders that something is written into."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from infra.errors import Conflict


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, or comes after a kill, finds the old content or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A place beside `folder` for what is to be in it, which is there when the block ends, and not where that fails.

    Raises:
        Conflict: the folder holds something, or is none.
    """
    require_free(folder)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        written = Path(staging) / "whole"
        yield written
        written.replace(folder)


def require_free(folder: Path) -> None:
    """Raise `Conflict` unless `folder` is an empty directory, or not there."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise Conflict(f"{folder} exists and is not a directory.", "Name a new or empty folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise Conflict(f"{folder} exists and is not empty.", "Name a new or empty folder.")
