"""How a row comes to name an artifact that is no version's own: announced, stored, made ready; or gone without a trace.

The steps are those of a registration (see registration.py), less MLflow.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from sqlalchemy.orm import Session

from infra.errors import Conflict
from registry import journal
from registry.artifact_use import delete_if_unused
from registry.artifacts import ArtifactStore, Manifest
from registry.content_store import manifest_of
from registry.database import Database
from registry.models import Attachment, DatasetVersion, JournalState

Row = TypeVar("Row", Attachment, DatasetVersion)


@dataclass(frozen=True, slots=True)
class Keeping(Generic[Row]):
    """The steps of keeping a directory, over tables and artifact store.

    Args:
        database: the tables.
        store: the artifacts.
        table: whose row names the artifact.
        kind: of the journal's entries.
    """

    database: Database
    store: ArtifactStore
    table: type[Row]
    kind: str

    def keep(self, directory: Path, subject: str, make: Callable[[Session, Manifest], Row]) -> int:
        """Take a directory through all steps; returns the id of the ready row.

        Args:
            directory: its files.
            subject: what it is called in messages.
            make: the row, under the writers' lock.

        Raises:
            Conflict: the directory changed meanwhile.
            InvalidInput: it is empty, or holds a link or a special file.
        """
        manifest = manifest_of(directory)
        with self.database.writing() as session:
            row = make(session, manifest)
            session.add(row)
            session.flush()
            row_id = row.id
            entry = journal.announce(session, self.kind, {self.key: row_id, "subject": subject})
        try:
            if self.store.put(directory).sha256 != manifest.sha256:
                raise Conflict(f"{directory} changed while it was being kept as {subject}.", "Do it again.")
            self.complete(row_id, entry)
        except BaseException:
            self._give_up(row_id, entry)
            raise
        return row_id

    @property
    def key(self) -> str:
        """Of the row's id in a journal entry."""
        return f"{self.table.__name__.lower()}_id"

    def complete(self, row_id: int, entry: int) -> None:
        """Make it ready. The bytes must be durable.

        Raises:
            Conflict: it was undone meanwhile.
        """
        with self.database.writing() as session:
            journal.close(session, entry, JournalState.DONE)
            session.get_one(self.table, row_id).ready = True

    def undo(self, row_id: int, entry: int) -> None:
        """Take the row out, and the bytes where nothing else uses them.

        Raises:
            Conflict: it was completed or undone meanwhile.
        """
        with self.database.writing() as session:
            journal.close(session, entry, JournalState.UNDONE)
            row = session.get_one(self.table, row_id)
            session.delete(row)
            session.flush()
            delete_if_unused(session, self.store, row.artifact_sha256)

    def _give_up(self, row_id: int, entry: int) -> None:
        """Undo; where a store does not answer even for that, leave the entry open for `fsck`."""
        try:
            self.undo(row_id, entry)
        except Exception:
            with suppress(Exception), self.database.writing() as session:
                journal.abandon(session, entry)
