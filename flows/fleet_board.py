"""Where a fleet migration is, in files: whoever looks on needs neither the process that runs it nor its terminal."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from flows.progress import Progress
from infra.errors import NotFound
from infra.settings import get_settings

WAITING, MOVING = "waiting", "moving"
_SECONDS_BETWEEN_WRITES = 1.0
_ALL = "fleet.json"


class Place(BaseModel):
    """One adapter: `waiting`, `moving` (and what is being done) or what was decided."""

    model_config = ConfigDict(frozen=True)

    address: str
    state: str
    note: str = ""


class BoardState(BaseModel):
    """What the file says."""

    model_config = ConfigDict(frozen=True)

    source: str
    target: str
    began: datetime
    places: tuple[Place, ...]

    @property
    def counts(self) -> Counter[str]:
        """Adapters by state."""
        return Counter(place.state for place in self.places)


class Board:
    """Keeps the files up to date: what is to be done, and one of each adapter that has begun to move.

    Several processes may each have one, as long as they move different adapters.

    Args:
        source: the base model that is going away.
        target: the other one.
    """

    def __init__(self, source: str, target: str) -> None:
        self._folder = board_folder(source, target)
        self._moving: str | None = None
        self._due = 0.0

    @classmethod
    def begin(cls, source: str, target: str, addresses: Iterable[str]) -> None:
        """Nothing has moved yet, and `addresses` will, in that order."""
        folder = board_folder(source, target)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        places = tuple(Place(address=address, state=WAITING) for address in addresses)
        state = BoardState(source=source, target=target, began=datetime.now(UTC), places=places)
        _write(folder / _ALL, state)

    def moving(self, address: str) -> None:
        """It is this one's turn."""
        self._moving = address
        self._put(address, MOVING)

    def done(self, address: str, state: str, note: str = "") -> None:
        """What came of it."""
        self._moving = None
        self._put(address, state, note)

    def hear(self, progress: Progress) -> None:
        """A listener for the flows' progress, which is that of the one that is moving."""
        if self._moving is not None and time.monotonic() >= self._due:
            what = progress.stage.partition(": ")[2] or progress.stage
            self._put(self._moving, MOVING, f"{what} {progress.done}/{progress.total}")

    def _put(self, address: str, state: str, note: str = "") -> None:
        _write(self._folder / f"{address}.json", Place(address=address, state=state, note=note))
        self._due = time.monotonic() + _SECONDS_BETWEEN_WRITES


def _write(file: Path, content: BaseModel) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(content.model_dump_json(), encoding="utf-8")
    partial.replace(file)


def fleet_directory(source: str, target: str) -> Path:
    """Where a fleet keeps its board, its pools and its reports."""
    return get_settings().runs / f"fleet-{source}-{target}"


def board_folder(source: str, target: str) -> Path:
    """Where its board is."""
    return fleet_directory(source, target) / "board"


def read_board(source: str, target: str) -> BoardState:
    """What is known of a fleet now.

    Raises:
        NotFound: no such fleet was ever begun here.
    """
    folder = board_folder(source, target)
    try:
        begun = BoardState.model_validate_json((folder / _ALL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(
            f"No migration of all adapters from {source} to {target} was begun here.",
            f"Begin it: regraft migrate --all --from {source} --to {target}",
        ) from None
    known = {}
    for file in folder.glob("[!.]*@*.json"):
        place = Place.model_validate_json(file.read_text(encoding="utf-8"))
        known[place.address] = place
    return begun.model_copy(update={"places": tuple(known.get(place.address, place) for place in begun.places)})


def is_running(source: str, target: str) -> bool:
    """Whether a process is at work on it."""
    holder = fleet_directory(source, target) / "training.pid"  # rather than trying its lock, which others may need now
    try:
        return psutil.pid_exists(int(holder.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return False
