"""MLflow clients: a server by setting, else a database that is opened in-process (SQLite in Regraft's home)."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from filelock import FileLock

from infra.database import engine_for, errors_explained, normalised_url, ping
from infra.environment import is_remote, mlflow_artifact_root, mlflow_environment
from infra.errors import InvalidInput, ServiceUnavailable
from infra.http import answers
from infra.redaction import redacted_url, without_secrets
from infra.settings import Settings

_DATABASES = ("sqlite:", "postgresql", "mysql", "mssql")


def mlflow_client(settings: Settings) -> Any:
    """An `mlflow.MlflowClient` for runs and registered models; silent, without telemetry.

    Touches no global (fluent) MLflow state. Importing MLflow takes about 3 s, creating the SQLite store as long again.

    Raises:
        ServiceUnavailable: the server or database does not answer, or is at the revision of another MLflow.
        InvalidInput: mlflow_tracking_uri names neither a server nor a database.
    """
    uri = prepare_store(settings)
    if uri.startswith("http") and not answers(f"{uri.rstrip('/')}/health", seconds=10.0):
        raise ServiceUnavailable(
            f"The MLflow server at {redacted_url(uri)} does not answer.",
            "Check that it runs and that mlflow_tracking_uri is right; without that setting a local store is used.",
        )
    _import_mlflow(settings)
    from mlflow import MlflowClient

    with _errors_explained(uri):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def prepare_store(settings: Settings) -> str:
    """Make sure that a database of MLflow's exists and answers; returns the tracking URI, password included.

    A SQLite store is built beside its final place and moved there when it is whole, so that neither a crash nor a
    second process at the same moment can leave half of it. Nothing is asked of a remote server.

    Raises:
        ServiceUnavailable: the database does not answer, or is at the revision of another MLflow.
        InvalidInput: mlflow_tracking_uri names neither a server nor a database.
    """
    uri = normalised_url(settings.tracking_uri)
    if is_remote(uri):
        return uri
    if not uri.startswith(_DATABASES):
        raise InvalidInput(
            f"mlflow_tracking_uri is {redacted_url(uri)!r}, which is neither an MLflow server nor a database.",
            "Write http(s)://HOST:PORT, sqlite:////absolute/path.db or postgresql://… , or unset it.",
        )
    settings.home.mkdir(parents=True, exist_ok=True)
    file = _sqlite_file(uri)
    if file is None:
        _ping(uri)
        with FileLock(settings.home / "mlflow.lock"):
            _open_store(settings, uri)
        return uri
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f"{file.name}.lock")):
            if not file.exists():
                _create_sqlite_store(settings, file)
    _ping(uri)
    return uri


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite:"):
        return None
    database = sa.make_url(uri).database
    if not database or database == ":memory:":
        raise InvalidInput("MLflow needs a SQLite file, not an in-memory database.", "Write sqlite:////path.db.")
    return Path(database)


def _create_sqlite_store(settings: Settings, file: Path) -> None:
    draft = file.with_name(f"{file.name}.new")
    for leftover in (draft, *(draft.with_name(draft.name + suffix) for suffix in ("-journal", "-wal", "-shm"))):
        leftover.unlink(missing_ok=True)
    _open_store(settings, f"sqlite:///{draft}")
    draft.replace(file)


def _open_store(settings: Settings, uri: str) -> None:
    """Let MLflow create the tables that it misses."""
    _import_mlflow(settings)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with _errors_explained(uri):
        SqlAlchemyStore(uri, str(mlflow_artifact_root(settings))).engine.dispose()


def _ping(uri: str) -> None:
    """Ask before MLflow does: it repeats a failed connection for minutes. Leaves a SQLite file in write-ahead mode."""
    engine = engine_for(uri)
    try:
        ping(engine)
    finally:
        engine.dispose()


def _import_mlflow(settings: Settings) -> None:
    os.environ.update(mlflow_environment(settings))
    level = os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    import mlflow  # noqa: F401  configures its loggers, as the environment says where it is the first import

    logging.getLogger("mlflow").setLevel(level.upper())


@contextmanager
def _errors_explained(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        with errors_explained(uri):
            yield
    except MlflowException as error:
        raise ServiceUnavailable(
            f"The MLflow store {redacted_url(uri)} cannot be opened: {without_secrets(str(error), uri)}",
            "Back it up, then: mlflow db upgrade URL" if "out-of-date" in str(error) else "regraft doctor",
        ) from None
