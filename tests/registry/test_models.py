from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from registry import AdapterRegistry
from registry.models import Adapter, Alias, BaseModel, Promotion, Version


def execute(registry: AdapterRegistry, statement: str) -> None:
    with registry.database.engine.begin() as connection:
        connection.execute(sa.text(statement))


FORCED_WITHOUT_A_REASON = (
    "INSERT INTO regraft_promotions (adapter_id, alias, to_version_id, decision, generation, report, actor, at) "
    "VALUES (1, 'production', 1, 'forced', 2, '{}', 'eve', '2026-01-01')"
)


@pytest.fixture
def promoted(registry: AdapterRegistry, register: Callable[..., str]) -> AdapterRegistry:
    registry.promote(register(), "production", None, actor="ada", reason="first", force=True)
    return registry


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE regraft_promotions SET actor = 'eve'",
        "DELETE FROM regraft_promotions",
        "DELETE FROM regraft_versions",
        "DELETE FROM regraft_aliases",
        f"UPDATE regraft_versions SET artifact_sha256 = '{'0' * 64}'",
        "UPDATE regraft_versions SET size_bytes = 1",
        "UPDATE regraft_versions SET number = 7",
        "UPDATE regraft_versions SET base_model_id = 2",
        "UPDATE regraft_versions SET state = 'pending'",
        "UPDATE regraft_versions SET state = 'failed', failure = 'gone'",
        "UPDATE regraft_versions SET mlflow_version = NULL",
        "UPDATE regraft_versions SET state = 'lost'",
        "UPDATE regraft_aliases SET generation = 0",
        "UPDATE regraft_aliases SET version_id = 99",
        "UPDATE regraft_base_models SET successor_id = id",
        "UPDATE regraft_base_models SET identity_sha256 = 'short'",
        "INSERT INTO regraft_lineage VALUES (1, 1, 'merged_from', '{}')",
        "INSERT INTO regraft_lineage VALUES (1, 99, 'merged_from', '{}')",
        FORCED_WITHOUT_A_REASON,
    ],
)
def test_the_database_itself_refuses(promoted: AdapterRegistry, statement: str) -> None:
    with pytest.raises(IntegrityError):
        execute(promoted, statement)


def test_an_alias_cannot_point_at_another_adapters_version(
    promoted: AdapterRegistry, register: Callable[..., str]
) -> None:
    register("sorting")
    with pytest.raises(IntegrityError):
        execute(promoted, "UPDATE regraft_aliases SET version_id = 2")


def test_a_ready_version_may_be_retired_and_renumbered_in_mlflow(promoted: AdapterRegistry) -> None:
    execute(promoted, "UPDATE regraft_versions SET state = 'retired', mlflow_version = 12")


def test_two_versions_cannot_share_a_number(registry: AdapterRegistry, register: Callable[..., str]) -> None:
    register()
    register()
    with pytest.raises(IntegrityError):
        execute(
            registry,
            "INSERT INTO regraft_versions (uid, adapter_id, number, base_model_id, method, recipe, metrics, "
            "artifact_sha256, size_bytes, trainable_parameters, state, created_at) SELECT 'x', adapter_id, number, "
            "base_model_id, method, recipe, metrics, artifact_sha256, 1, 1, 'pending', created_at "
            "FROM regraft_versions",
        )


def test_times_are_utc_wherever_they_were_written(registry: AdapterRegistry) -> None:
    noon_in_berlin = datetime(2026, 7, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    with registry.database.writing() as session:
        session.add(Adapter(name="x", created_at=noon_in_berlin))
    with registry.database.reading() as session:
        read = session.scalar(sa.select(Adapter.created_at))
    assert read == noon_in_berlin
    assert read.tzinfo is UTC


def test_every_table_is_told_from_mlflows_by_its_name() -> None:
    assert all(table.startswith("regraft_") for table in Version.metadata.tables)
    assert {model.__tablename__ for model in (Adapter, Alias, BaseModel, Promotion)} <= Version.metadata.tables.keys()
