"""Transactions on the registry's tables."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from infra.database import create_engine, errors_explained, read_only
from infra.settings import Settings
from registry.schema import check_revision

_WRITERS = 0x7265677261667401  # advisory lock on PostgreSQL: "regraft", 1


class Database:
    """The registry's tables: many readers, one writer at a time.

    Registry writes are few and short, so all of them take one lock (SQLite's own, an advisory lock on PostgreSQL).
    Version numbers, the lineage's acyclicity and unused artifacts are then simple questions with stable answers.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def engine(self) -> Engine:
        """The engine, its revision checked at first use; tables are created where there are none.

        Raises:
            ServiceUnavailable: the database does not answer, or is at another revision.
        """
        engine = create_engine(self._settings)
        with errors_explained(self._settings.registry_url):
            check_revision(engine)
        return engine

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session for queries; waits for no writer."""
        engine = self.engine
        with errors_explained(self._settings.registry_url), Session(read_only(engine)) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that holds the writers' lock from its begin; committed at the end of the block."""
        engine = self.engine
        with (
            errors_explained(self._settings.registry_url),
            Session(engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            if engine.dialect.name == "postgresql":
                session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITERS})
            yield session
