"""The revision of the registry's tables: upgrade, downgrade, and the cheap check that every command makes.

Revisions are numbered and linear (`0001_…py`): the newest is known from the file names, without importing alembic.
`python -m registry.schema roundtrip [URL]` proves that migrations and models agree.
"""

import re
import sys
import tempfile
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import sqlalchemy
from sqlalchemy import Connection, Engine, make_url
from sqlalchemy.exc import OperationalError, ProgrammingError

from infra.database import create_engine, engine_for, errors_explained, read_only, redacted_url
from infra.errors import NotFound, RegraftError, ServiceUnavailable
from infra.settings import Settings

if TYPE_CHECKING:
    from alembic.config import Config

    from infra.machine import Finding

VERSION_TABLE = "regraft_alembic_version"
_ONE_AT_A_TIME = Lock()  # alembic keeps the migration in hand in a global of the process
_REVISION_FILE = re.compile(r"(\d{4})_\w+\.py")


def migrations_directory() -> Path:
    """`alembic/` beside the package in a checkout, `registry/migrations` in an installed wheel."""
    package = Path(__file__).parent
    packaged = package / "migrations"
    return packaged if packaged.is_dir() else package.parent / "alembic"


def head_revision() -> str:
    """The newest revision that this code knows."""
    return _revisions()[-1]


def _revisions() -> list[str]:
    names = (path.name for path in (migrations_directory() / "versions").iterdir())
    return sorted(match[1] for name in names if (match := _REVISION_FILE.fullmatch(name)))


def current_revision(engine: Engine) -> str | None:
    """The revision that the database is at, or None where there are no tables of ours."""
    query = sqlalchemy.text(f"SELECT version_num FROM {VERSION_TABLE}")
    revision: str | None
    try:
        with read_only(engine).connect() as connection:
            revision = connection.scalar(query)
    except (OperationalError, ProgrammingError):
        with engine.begin() as connection:  # no such table, unless another process is just creating it: wait for that
            revision = connection.scalar(query) if sqlalchemy.inspect(connection).has_table(VERSION_TABLE) else None
    return revision


def check_revision(engine: Engine) -> None:
    """Make sure that the database is at the head revision; create the tables where there are none.

    Raises:
        ServiceUnavailable: it is at an older revision, or at one that this code does not know.
    """
    current, head = current_revision(engine), head_revision()
    if current == head:
        return
    if current is None:
        upgrade(engine)
    elif current < head:
        raise ServiceUnavailable(
            f"The registry's database is at revision {current}; this Regraft needs {head}.",
            "Back it up, then: regraft db upgrade",
        )
    else:
        raise ServiceUnavailable(
            f"The registry's database is at revision {current}, which this Regraft (at {head}) does not know.",
            "Use the Regraft that upgraded it, or a newer one: regraft db upgrade cannot go back.",
        )


def revision_finding(settings: Settings) -> "Finding":
    """The database's revision for `regraft doctor`. Creates nothing."""
    from infra.machine import Finding

    where, head = redacted_url(settings.registry_url), head_revision()
    url = make_url(settings.registry_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        return Finding("registry database", "ok", f"{where} is not there yet; the first command creates it.")
    engine = create_engine(settings)
    try:
        with errors_explained(settings.registry_url):
            current = current_revision(engine)
            if current is not None:
                check_revision(engine)
    except RegraftError as error:
        return Finding("registry database", "problem", error.what, error.remedy)
    finally:
        engine.dispose()
    return Finding(
        "registry database", "ok", f"{where} is {f'at revision {current}' if current else 'empty'}; head is {head}."
    )


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the tables up to `revision`, in one transaction. Two callers at once: the second finds the work done."""
    from alembic import command

    with _ONE_AT_A_TIME, engine.begin() as connection:
        command.upgrade(_config(connection), revision)


def require_revision(revision: str) -> None:
    """Make sure that a migration leads to `revision`.

    Raises:
        NotFound: none does; names those that there are.
    """
    known = ["base", *_revisions()]
    if revision not in known:
        raise NotFound(f"There is no revision '{revision}'.", f"Known: {', '.join(known)}.")


def downgrade(engine: Engine, revision: str = "base") -> None:
    """Bring the tables down to `revision`; `base` removes them all, with everything in them."""
    from alembic import command

    with _ONE_AT_A_TIME, engine.begin() as connection:
        command.downgrade(_config(connection), revision)


def roundtrip(engine: Engine) -> None:
    """Upgrade, downgrade, upgrade; then compare what the migrations built with what the models declare.

    Raises:
        RegraftError: they differ, something is left after the downgrade, or the head is not the highest number.
    """
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from registry.models import Table

    known = ScriptDirectory.from_config(_config()).get_current_head()
    if known != head_revision():
        raise RegraftError(f"The head revision is {known}, but the highest number is {head_revision()}.")
    upgrade(engine)
    downgrade(engine)
    if left := sorted(table for table in sqlalchemy.inspect(engine).get_table_names() if is_ours(table)):
        raise RegraftError(f"The downgrade leaves tables behind: {', '.join(left)}.")
    upgrade(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "version_table": VERSION_TABLE,
                "compare_type": True,
                "include_name": lambda name, kind, parents: kind != "table" or is_ours(name),
            },
        )
        if differences := compare_metadata(context, Table.metadata):
            raise RegraftError("The models are ahead of the migrations:\n" + "\n".join(map(repr, differences)))


def is_ours(table: str | None) -> bool:
    """Whether the migrations answer for the table, in a database that may hold MLflow's too."""
    return table is not None and table.startswith("regraft_") and table != VERSION_TABLE


def _config(connection: Connection | None = None) -> "Config":
    from alembic.config import Config

    config = Config()
    config.attributes["connection"] = connection
    config.set_main_option("script_location", str(migrations_directory()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def main() -> None:
    """`python -m registry.schema roundtrip [URL]`; without a URL, on a temporary SQLite."""
    match sys.argv[1:]:
        case ["roundtrip"]:
            with tempfile.TemporaryDirectory() as directory:
                engine = engine_for(f"sqlite:///{directory}/registry.db")
                roundtrip(engine)
                engine.dispose()
        case ["roundtrip", url]:
            roundtrip(engine_for(url))
        case _:
            sys.exit("usage: python -m registry.schema roundtrip [URL]")
    print(f"upgrade, downgrade, upgrade: done; models and migrations agree at revision {head_revision()}")


if __name__ == "__main__":
    main()
