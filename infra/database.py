"""SQLAlchemy engines: SQLite that several processes share safely, or PostgreSQL through psycopg 3."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc

from infra.errors import InvalidInput, ServiceUnavailable
from infra.redaction import redacted_url, without_secrets
from infra.settings import Settings

__all__ = ["create_engine", "engine_for", "errors_explained", "normalised_url", "ping", "read_only", "redacted_url"]

SQLITE_BUSY_SECONDS = 30
POSTGRES_CONNECT_SECONDS = 10


def normalised_url(url: str) -> str:
    """`url` with PostgreSQL spelled `postgresql+psycopg://`, whichever of its short names was written."""
    for short in ("postgres://", "postgresql://"):
        if url.startswith(short):
            return "postgresql+psycopg://" + url.removeprefix(short)
    return url


def create_engine(settings: Settings) -> sa.Engine:
    """The engine of the registry's tables. Nothing is connected yet.

    SQLite: write-ahead log (readers never wait for the writer), foreign keys enforced, 30 s of patience with other
    processes. A transaction takes the write lock when it *begins*: one that reads first and writes later would
    otherwise fail with "database is locked" as soon as somebody wrote in between. Use `read_only` for pure reads.

    Raises:
        InvalidInput: the URL is malformed, another kind of database, or its driver is not installed.
    """
    url = settings.registry_url
    if not normalised_url(url).startswith(("sqlite", "postgresql")) and "://" in url:
        raise InvalidInput(
            f"{redacted_url(url)} is neither SQLite nor PostgreSQL, where Regraft keeps its tables.",
            "Write sqlite:////absolute/path.db or postgresql://USER:PASSWORD@HOST:PORT/DATABASE in database_url.",
        )
    return engine_for(url)


def engine_for(url: str) -> sa.Engine:
    """The engine of any database URL, set up as `create_engine` says. A SQLite file's folder is made on connecting.

    Raises:
        InvalidInput: the URL is malformed, or its driver is not installed.
    """
    try:
        parsed = sa.make_url(normalised_url(url))
        if parsed.get_backend_name() == "sqlite":
            return _sqlite_engine(parsed)
        patience = {"connect_timeout": POSTGRES_CONNECT_SECONDS} if parsed.drivername == "postgresql+psycopg" else {}
        return sa.create_engine(parsed, pool_pre_ping=True, connect_args=patience)
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"The database {redacted_url(url)} needs the Python package '{error.name}', which is not installed.",
            "pip install 'regraft[postgres]'" if error.name == "psycopg" else f"pip install {error.name}",
        ) from None
    except (exc.ArgumentError, exc.NoSuchModuleError):
        raise InvalidInput(
            f"{redacted_url(url)!r} is not a database URL.",
            "Write sqlite:////absolute/path.db or postgresql://USER:PASSWORD@HOST:PORT/DATABASE in database_url.",
        ) from None


def read_only(engine: sa.Engine) -> sa.Engine:
    """The same engine for transactions that only read: on SQLite they neither wait for the writer nor hold it up."""
    return engine.execution_options(sqlite_begin="BEGIN DEFERRED")


def _sqlite_engine(url: sa.URL) -> sa.Engine:
    def make_folder(*_connecting: object) -> None:
        try:
            Path(url.database or "").parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServiceUnavailable(
                f"The folder of the database {url.database} cannot be made: {error.strerror}.",
                "Mend the owner and mode of the folder above it, or choose another with REGRAFT_HOME.",
            ) from None

    engine = sa.create_engine(url, connect_args={"timeout": SQLITE_BUSY_SECONDS})
    event.listen(engine, "do_connect", make_folder)
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says so, in `_begin_sqlite`
    use_write_ahead_log(connection)
    connection.execute("PRAGMA foreign_keys = ON")


def use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch the database file to WAL, once and for all. SQLite does not wait its busy timeout for this switch."""
    deadline = time.monotonic() + SQLITE_BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _begin_sqlite(connection: sa.Connection) -> None:
    begin: Any = connection.get_execution_options().get("sqlite_begin", "BEGIN IMMEDIATE")
    connection.exec_driver_sql(begin)


@contextmanager
def errors_explained(url: str) -> Iterator[None]:
    """Turn what a driver says about the database as such, not about a statement, into one sentence without passwords.

    Raises:
        ServiceUnavailable: the database does not answer, is locked, is full, is damaged, or lacks its tables.
    """
    try:
        yield
    except exc.DBAPIError as error:
        damaged = any(symptom in str(error.orig) for symptom in ("not a database", "malformed"))
        if not isinstance(error, exc.OperationalError | exc.InterfaceError) and not damaged:
            raise
        name = redacted_url(url)
        reason = without_secrets(" ".join(str(error.orig).split()), normalised_url(url))
        for symptom, what, remedy in _SYMPTOMS:
            if symptom in reason:
                raise ServiceUnavailable(f"The database {name} {what} ({reason}).", remedy) from None
        remedy = "Check that the server runs, and database_url in regraft.toml or REGRAFT_DATABASE_URL."
        raise ServiceUnavailable(f"The database {name} does not answer: {reason}", remedy) from None


_SYMPTOMS = (
    ("database is locked", "is held by another process", "Try again; `regraft doctor` shows what runs."),
    ("disk is full", "has no room left", "Free disk space, then try again."),
    ("disk I/O error", "cannot be written", "Check the disk and its free space: regraft doctor"),
    ("unable to open database file", "cannot be opened", "Check the owner and mode of the file and of its folder."),
    ("readonly database", "may not be written", "Check the owner and mode of the file and of its folder."),
    ("not a database", "is not a SQLite file, or it is damaged", "Restore it from a backup."),
    ("malformed", "is damaged", "Restore it from a backup."),
    ("no such table", "has not been brought to this version's tables", "regraft doctor"),
    ("no such column", "has not been brought to this version's tables", "regraft doctor"),
)


def ping(engine: sa.Engine) -> None:
    """Connect and ask for one row.

    Raises:
        ServiceUnavailable: no answer; the message names the database without its password.
    """
    with errors_explained(engine.url.render_as_string(hide_password=False)), read_only(engine).connect() as open_:
        open_.execute(sa.text("SELECT 1"))
