import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from infra.database import engine_for
from infra.errors import ServiceUnavailable
from infra.settings import Settings
from registry import AdapterRegistry, schema


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = engine_for(f"sqlite:///{tmp_path / 'registry.db'}")
    yield engine
    engine.dispose()


def set_revision(engine: sa.Engine, revision: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {schema.VERSION_TABLE} SET version_num = :r"), {"r": revision})


def test_migrations_go_up_down_and_up_and_agree_with_the_models(engine: sa.Engine) -> None:
    schema.roundtrip(engine)
    assert schema.current_revision(engine) == schema.head_revision()


def test_the_roundtrip_notices_a_model_without_a_migration(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from registry.models import Table

    extra = sa.MetaData()
    for table in Table.metadata.tables.values():
        table.to_metadata(extra)
    extra.tables["regraft_adapters"].append_column(sa.Column("colour", sa.String(8)))
    monkeypatch.setattr(Table, "metadata", extra)
    with pytest.raises(Exception, match="colour"):
        schema.roundtrip(engine)


def test_evaluations_survive_the_columns_for_scores_on_the_way_down_and_up(engine: sa.Engine) -> None:
    from registry.models import Adapter, BaseModel, Evaluation, Version

    schema.upgrade(engine)
    base = BaseModel(name="b", reference="path:b", identity_sha256="b" * 64, family="llama", parameters=1)
    version = Version(
        uid="u", adapter=Adapter(name="a"), base_model=base, number=1, method="lora", recipe={}, metrics={},
        artifact_sha256="a" * 64, size_bytes=1, trainable_parameters=1,
    )  # fmt: skip
    with Session(engine) as session:
        session.add(
            Evaluation(version=version, suite="s", metric="bleu", value=0.5, samples=1, scores=[0.5], components=[[1]])
        )
        session.commit()

    schema.downgrade(engine, "0003")
    columns = {column["name"] for column in sa.inspect(engine).get_columns("regraft_evaluations")}
    assert "outcomes" in columns and columns.isdisjoint({"scores", "components"})
    schema.upgrade(engine)
    with Session(engine) as session:
        kept = session.scalars(sa.select(Evaluation)).one()
        assert (kept.value, kept.version.adapter.name, kept.scores, kept.components) == (0.5, "a", None, None)


def test_an_empty_database_is_created_at_head(settings: Settings) -> None:
    (settings.home / "registry.db").unlink()
    registry = AdapterRegistry(settings)
    assert registry.adapters() == []
    assert schema.current_revision(registry.database.engine) == schema.head_revision()


def test_two_processes_may_create_the_database_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    program = (
        "from infra.database import engine_for; from registry.schema import check_revision; "
        f"check_revision(engine_for({url!r}))"
    )
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: subprocess.run([sys.executable, "-c", program], check=False), range(3)))
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert schema.current_revision(engine_for(url)) == schema.head_revision()


@pytest.mark.parametrize(("revision", "remedy"), [("0000", "regraft db upgrade"), ("9999", "newer")])
def test_another_revision_is_refused_with_both_named(engine: sa.Engine, revision: str, remedy: str) -> None:
    schema.upgrade(engine)
    set_revision(engine, revision)
    with pytest.raises(ServiceUnavailable) as refused:
        schema.check_revision(engine)
    assert revision in refused.value.what and schema.head_revision() in refused.value.what
    assert remedy in refused.value.remedy


def test_every_command_of_an_old_database_says_so(settings: Settings) -> None:
    with sqlite3.connect(settings.home / "registry.db") as connection:
        connection.execute(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0000'")
    with pytest.raises(ServiceUnavailable, match="regraft db upgrade"):
        AdapterRegistry(settings).adapters()
    assert schema.revision_finding(settings).level == "problem"


def test_a_failed_migration_leaves_nothing_behind(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic.operations import Operations

    created = Operations.create_table
    calls = []

    def fails_at_the_fifth(self: Operations, name: str, *columns: object, **options: object) -> object:
        calls.append(name)
        if len(calls) == 5:
            raise OSError("power cut")
        return created(self, name, *columns, **options)

    monkeypatch.setattr(Operations, "create_table", fails_at_the_fifth)
    with pytest.raises(OSError, match="power cut"):
        schema.upgrade(engine)
    assert sa.inspect(engine).get_table_names() == []
    monkeypatch.undo()
    schema.check_revision(engine)
    assert schema.current_revision(engine) == schema.head_revision()


def test_mlflow_and_the_registry_can_share_one_database(settings: Settings) -> None:
    shared = Settings(home=settings.home, database_url=f"sqlite:///{settings.home / 'mlflow.db'}")
    registry = AdapterRegistry(shared)
    registry.register_base_model("path:x", "a" * 64, name="x", family="llama", parameters=1)
    assert registry.tracking.aliases("counting") == {}
    schema.downgrade(registry.database.engine)
    tables = set(sa.inspect(registry.database.engine).get_table_names())
    assert "registered_models" in tables and "regraft_versions" not in tables


def test_the_command_line_proves_the_roundtrip() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "registry.schema", "roundtrip"], capture_output=True, text=True, check=True
    )
    assert f"agree at revision {schema.head_revision()}" in done.stdout


def test_listing_adapters_imports_nothing_heavy(registry: AdapterRegistry) -> None:
    program = (
        "import sys; from infra.settings import Settings; from registry import AdapterRegistry; "
        f"AdapterRegistry(Settings(home={str(registry.settings.home)!r})).adapters(); "
        "heavy = {'mlflow', 'boto3', 'alembic', 'scipy', 'torch', 'numpy', 'psutil'} & set(sys.modules); "
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
