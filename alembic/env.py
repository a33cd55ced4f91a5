"""Runs the migrations of the registry's own tables: on the connection given, or on the one that the settings name."""

from sqlalchemy import Connection, text

from alembic import context
from infra.database import create_engine
from infra.settings import get_settings
from registry.models import Table
from registry.schema import VERSION_TABLE, is_ours

MIGRATIONS = 0x7265677261667402  # advisory lock: "regraft", 2


def migrate(connection: Connection) -> None:
    """All in one transaction, behind a lock that keeps a second migration out (SQLite takes it at begin)."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATIONS})
    context.configure(
        connection=connection,
        target_metadata=Table.metadata,
        version_table=VERSION_TABLE,
        transactional_ddl=True,
        include_name=lambda name, kind, parents: kind != "table" or is_ours(name),
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    with create_engine(get_settings()).begin() as connection:
        migrate(connection)
