"""Checkpoints of a training: whole or not there.

A checkpoint is a folder `step-00000050` of safetensors and JSON files. It is written under a temporary name, flushed to
the disk, and renamed; its `checkpoint.json` holds size and sha256 of every other file, so that one that was damaged
later is passed over for the one before it.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from infra.errors import Conflict, RegraftError

KEPT = 2  # the newest, and the one before it
_CHECKPOINTS, _LAUNCH = "checkpoints", "launch"
_MANIFEST = "checkpoint.json"
_TEMPORARY = ".writing-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Args:
        directory: of its files.
        step: optimiser updates done.
        run: which training it belongs to; see `Checkpoints`.
        progress: what `Checkpoints.write` was given.
    """

    directory: Path
    step: int
    run: str
    progress: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints in a working directory.

    Args:
        root: the folder that holds them.
        run: digest of everything that decides what the training makes; a checkpoint of another is never resumed.
    """

    root: Path
    run: str

    def write(self, step: int, progress: dict[str, Any], fill: Callable[[Path], None]) -> Checkpoint:
        """Write a checkpoint, and drop all but the newest `KEPT`.

        Args:
            step: optimiser updates done.
            progress: plain JSON values, for the checkpoint's manifest.
            fill: writes the files into the folder that it is given.

        Raises:
            RegraftError: the disk is full; earlier checkpoints are as they were.
        """
        final = self.root / f"step-{step:08d}"
        temporary = self.root / f"{_TEMPORARY}{final.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            fill(temporary)
            files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
            content = {"step": step, "run": self.run, "progress": progress, "files": files}
            (temporary / _MANIFEST).write_text(json.dumps(content), encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                _flush(path)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _flush(self.root)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not _disk_is_full(error):
                raise
            intact = self.newest()
            raise RegraftError(
                f"No space is left on the disk of {self.root} for the checkpoint of step {step}; "
                + (f"the one of step {intact.step} is intact." if intact else "there is no earlier one."),
                "Free some space and run the same command again"
                + (f": it resumes after step {intact.step}." if intact else "."),
            ) from error
        for old in self._directories()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        return Checkpoint(final, step, self.run, progress)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint of this run, or None. What a kill left half-written is removed.

        Raises:
            Conflict: the folder holds checkpoints of another training.
        """
        for leftover in self.root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for directory in self._directories():
            found = _read(directory)
            if found is None:
                continue
            if found.run != self.run:
                raise Conflict(
                    f"{self.root} holds checkpoints of another training (other recipe, data or base model).",
                    f"Train in another working directory, or give that training up: rm -r '{self.root}'",
                )
            return found
        return None

    def _directories(self) -> list[Path]:
        return sorted(self.root.glob("step-*"), reverse=True)


def discard(workdir: Path) -> None:
    """Remove all that a training left in `workdir`, once what it led to is safe elsewhere, or is not wanted.

    Raises:
        Conflict: a training is at work in it.
    """
    if workdir.is_dir():
        with exclusive(workdir):
            for name in (_CHECKPOINTS, _LAUNCH):
                shutil.rmtree(workdir / name, ignore_errors=True)


def checkpoints_directory(workdir: Path) -> Path:
    """Where a training in `workdir` keeps its checkpoints."""
    return workdir / _CHECKPOINTS


def launch_directory(workdir: Path) -> Path:
    """Where the processes of a data-parallel training in `workdir` meet."""
    return workdir / _LAUNCH


@contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Hold `workdir` for one training; a training that was killed holds nothing.

    Raises:
        Conflict: another process trains in it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    holder = workdir / "training.pid"
    lock = FileLock(workdir / "training.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        pid = holder.read_text(encoding="utf-8") if holder.is_file() else "unknown"
        raise Conflict(
            f"Another run (process {pid}) is at work in {workdir}.",
            f"Wait for it, or stop it: kill -INT {pid} (it can be resumed).",
        ) from None
    try:
        holder.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _read(directory: Path) -> Checkpoint | None:
    """The checkpoint in `directory` if every byte of it is there."""
    try:
        content = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        if any(_fingerprint(directory / name) != expected for name, expected in content["files"].items()):
            return None
        return Checkpoint(directory, content["step"], content["run"], content["progress"])
    except (OSError, ValueError, KeyError):
        return None


def _fingerprint(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error)
