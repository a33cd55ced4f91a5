"""Where a fleet migration is, in a file: whoever looks on needs neither the process that runs it nor its terminal."""

import os
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
    """Keeps the file up to date.

    Args:
        source: the base model that is going away.
        target: the other one.
        addresses: what will move, in that order.
    """

    def __init__(self, source: str, target: str, addresses: Iterable[str]) -> None:
        self._file = board_file(source, target)
        self._state = BoardState(source=source, target=target, began=datetime.now(UTC), places=())
        self._places = {address: Place(address=address, state=WAITING) for address in addresses}
        self._moving: str | None = None
        self._due = 0.0
        self._write()

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
        self._places[address] = Place(address=address, state=state, note=note)
        self._write()

    def _write(self) -> None:
        state = self._state.model_copy(update={"places": tuple(self._places.values())})
        partial = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        partial.write_text(state.model_dump_json(), encoding="utf-8")
        partial.replace(self._file)
        self._due = time.monotonic() + _SECONDS_BETWEEN_WRITES


def fleet_directory(source: str, target: str) -> Path:
    """Where a fleet keeps its board, its pools and its reports."""
    return get_settings().runs / f"fleet-{source}-{target}"


def board_file(source: str, target: str) -> Path:
    """Where its board is."""
    return fleet_directory(source, target) / "board.json"


def read_board(source: str, target: str) -> BoardState:
    """What is known of a fleet now.

    Raises:
        NotFound: no such fleet was ever begun here.
    """
    try:
        return BoardState.model_validate_json(board_file(source, target).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(
            f"No migration of all adapters from {source} to {target} was begun here.",
            f"Begin it: regraft migrate --all --from {source} --to {target}",
        ) from None


def is_running(source: str, target: str) -> bool:
    """Whether a process is at work on it."""
    holder = fleet_directory(source, target) / "training.pid"  # rather than trying its lock, which others may need now
    try:
        return psutil.pid_exists(int(holder.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return False
