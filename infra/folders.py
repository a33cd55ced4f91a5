"""Folders that something is written into."""

from pathlib import Path

from infra.errors import Conflict


def require_free(folder: Path) -> None:
    """Raise `Conflict` unless `folder` is an empty directory, or not there."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise Conflict(f"{folder} exists and is not a directory.", "Name a new or empty folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise Conflict(f"{folder} exists and is not empty.", "Name a new or empty folder.")
