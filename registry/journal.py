"""The write-ahead journal: work that spans tables, artifact store and MLflow is announced here before it begins.

An entry is closed by compare-and-swap, in the transaction that makes the work visible, so that a live worker and an
`fsck` that took it for dead can never both believe that they finished it.
"""

import os
import socket
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from infra.errors import Conflict
from registry.models import JournalEntry, JournalState

PATIENCE = timedelta(hours=6)  # with work on another machine, whose processes cannot be seen from here


def announce(session: Session, kind: str, payload: dict[str, Any]) -> int:
    """Open an entry owned by this process; returns its id."""
    entry = JournalEntry(kind=kind, payload=payload, owner=this_process())
    session.add(entry)
    session.flush()
    return entry.id


def close(session: Session, entry_id: int, state: JournalState) -> None:
    """Close an open entry.

    Raises:
        Conflict: somebody closed it before.
    """
    closed = session.execute(
        update(JournalEntry)
        .where(JournalEntry.id == entry_id, JournalEntry.state == JournalState.OPEN)
        .values(state=state, closed_at=datetime.now(UTC))
    )
    if closed.rowcount != 1:  # type: ignore[attr-defined]
        raise Conflict(
            "This work was taken for abandoned and cleaned up by an fsck while it was still going on.", "Run it again."
        )


def require_open(session: Session, entry_id: int) -> None:
    """Make sure that nobody has closed an entry; call it under the writers' lock.

    Raises:
        Conflict: somebody has.
    """
    if session.get_one(JournalEntry, entry_id).state is not JournalState.OPEN:
        raise Conflict("This work has been finished or cleaned up by somebody else.", "See: regraft fsck")


def open_entries(session: Session, kind: str | None = None) -> list[JournalEntry]:
    """The entries of work that is going on, or that was cut short; oldest first."""
    query = select(JournalEntry).where(JournalEntry.state == JournalState.OPEN).order_by(JournalEntry.id)
    return list(session.scalars(query.where(JournalEntry.kind == kind) if kind else query))


def abandon(session: Session, entry_id: int) -> None:
    """Say that this process will do no more about an open entry: the next fsck may."""
    session.execute(update(JournalEntry).where(JournalEntry.id == entry_id).values(owner=None))


def is_abandoned(entry: JournalEntry) -> bool:
    """Whether nobody works on an open entry any more: its process is gone, or on another machine and long silent."""
    if entry.owner is None:
        return True
    import psutil

    host, pid, started = entry.owner.rsplit("|", 2)
    if host != socket.gethostname():
        return datetime.now(UTC) - entry.at > PATIENCE
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" != started
    except psutil.NoSuchProcess:
        return True


def this_process() -> str:
    """`host|pid|start time`: a name that no later process has."""
    return _process_name(os.getpid())


@cache
def _process_name(pid: int) -> str:
    import psutil

    return f"{socket.gethostname()}|{pid}|{psutil.Process(pid).create_time():.2f}"
