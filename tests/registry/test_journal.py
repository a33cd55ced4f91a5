import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy.orm import Session

from infra.errors import Conflict
from registry import AdapterRegistry, journal
from registry.models import JournalEntry, JournalState


@pytest.fixture
def session(registry: AdapterRegistry) -> Iterator[Session]:
    with registry.database.writing() as session:
        yield session


def announced(session: Session) -> JournalEntry:
    return session.get_one(JournalEntry, journal.announce(session, "test", {"of": "nothing"}))


def test_work_of_a_living_process_is_not_abandoned(session: Session) -> None:
    assert not journal.is_abandoned(announced(session))


def test_work_given_up_is_abandoned_at_once(session: Session) -> None:
    entry = announced(session)
    journal.abandon(session, entry.id)
    session.refresh(entry)
    assert journal.is_abandoned(entry)


def test_work_of_a_killed_process_is_abandoned(session: Session) -> None:
    entry = announced(session)
    process = multiprocessing.get_context("spawn").Process(target=signal.pause)
    process.start()
    import psutil

    entry.owner = f"{socket.gethostname()}|{process.pid}|{psutil.Process(process.pid).create_time():.2f}"
    assert not journal.is_abandoned(entry)
    process.kill()
    process.join()
    assert journal.is_abandoned(entry)


def test_a_later_process_with_the_same_number_is_not_taken_for_the_worker(session: Session) -> None:
    entry = announced(session)
    entry.owner = f"{socket.gethostname()}|{os.getpid()}|1.00"
    assert journal.is_abandoned(entry)


def test_work_on_another_machine_is_waited_for(session: Session) -> None:
    entry = announced(session)
    entry.owner = "elsewhere|1|1.00"
    assert not journal.is_abandoned(entry)
    entry.at -= journal.PATIENCE + timedelta(minutes=1)
    assert journal.is_abandoned(entry)


def test_an_entry_is_closed_once(session: Session) -> None:
    entry = announced(session)
    assert journal.open_entries(session, "test") == [entry]
    journal.close(session, entry.id, JournalState.UNDONE)
    assert journal.open_entries(session) == []
    with pytest.raises(Conflict):
        journal.close(session, entry.id, JournalState.DONE)
