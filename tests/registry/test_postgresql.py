"""What only a real PostgreSQL can show: its locks, its triggers, its types."""

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from infra.database import engine_for
from infra.errors import Conflict
from infra.settings import Settings
from registry import AdapterRegistry, schema
from tests.registry.conftest import BASE, OTHER_BASE

pytestmark = pytest.mark.services


def program(name: str) -> str | None:
    places = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", "")]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of its own, in a temporary folder; as user `postgres` where root runs the tests, which it refuses."""
    if program("initdb") is None or program("pg_ctl") is None:
        pytest.skip("PostgreSQL is not installed")
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_user and subprocess.run([*as_user, "true"], capture_output=True, check=False).returncode:
        pytest.skip("root cannot run PostgreSQL, and there is no user 'postgres'")
    folder = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    if as_user:
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(*command: str) -> None:
        subprocess.run([*as_user, *command], check=True, capture_output=True, cwd="/")

    options = f"-p {port} -c listen_addresses=127.0.0.1 -c fsync=off -c unix_socket_directories={folder}"
    try:
        run(str(program("initdb")), "-D", f"{folder}/data", "--username=regraft", "--auth=trust", "--no-sync")
        run(str(program("pg_ctl")), "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", options, "start")
        yield f"postgresql://regraft@127.0.0.1:{port}/postgres"
        run(str(program("pg_ctl")), "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def url(server: str) -> Iterator[str]:
    """An empty schema in the server's one database."""
    engine = engine_for(server)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    yield server
    engine.dispose()


@pytest.fixture
def settings(url: str, settings: Settings) -> Settings:
    return Settings(home=settings.home, database_url=url)


def test_migrations_go_up_down_and_up_and_agree_with_the_models(url: str) -> None:
    engine = engine_for(url)
    schema.roundtrip(engine)
    engine.dispose()


def test_commands_that_find_an_empty_database_at_once_create_it_once(url: str) -> None:
    def check(_: int) -> str | None:
        engine = engine_for(url)
        schema.check_revision(engine)
        current = schema.current_revision(engine)
        engine.dispose()
        return current

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(check, range(3))) == {schema.head_revision()}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE regraft_promotions SET actor = 'eve'",
        "DELETE FROM regraft_promotions",
        "TRUNCATE regraft_promotions",
        "DELETE FROM regraft_versions",
        "DELETE FROM regraft_aliases",
        f"UPDATE regraft_versions SET artifact_sha256 = '{'0' * 64}'",
        "UPDATE regraft_versions SET state = 'pending'",
        "UPDATE regraft_versions SET state = 'lost'",
    ],
)
def test_the_database_itself_refuses(registry: AdapterRegistry, register: Callable[..., str], statement: str) -> None:
    registry.promote(register(), "production", None, actor="ada", reason="first", force=True)
    with pytest.raises(IntegrityError), registry.database.engine.begin() as connection:
        connection.execute(sa.text(statement))


def test_a_life_on_postgresql(registry: AdapterRegistry, register: Callable[..., str]) -> None:
    first, second = register(), register(base_identity=OTHER_BASE)
    for address in (first, second):
        registry.promote(address, "production", None, actor="ada", reason="x", force=True)
    assert registry.rollback("counting", actor="ada").to_address == first
    registry.add_edge(second, first, "migrated_from", {"seeds": 10})
    assert [node.address for node in registry.lineage(first).nodes] == [first, second]
    assert [version.address for version in registry.deprecate_base_model("tiny-b", "tiny-a")] == [second]
    assert [(each.name, each.versions, each.aliases) for each in registry.adapters()] == [
        ("counting", 2, {"production": 1})
    ]
    assert registry.fsck() == []


def test_trainings_and_promoters_at_once(registry: AdapterRegistry, register: Callable[..., str]) -> None:
    registry.tracking.aliases("counting")
    with ThreadPoolExecutor(4) as pool:
        trained = pool.map(lambda _: register(registry=AdapterRegistry(registry.settings)), range(4))
        addresses = sorted(trained)
    assert addresses == [f"counting@{number}" for number in (1, 2, 3, 4)]
    together = threading.Barrier(4)

    def promote(address: str) -> bool:
        mine = AdapterRegistry(registry.settings)
        mine.adapters()
        together.wait()
        try:
            mine.promote(address, "production", None, actor=address, reason="x", force=True, expected_generation=0)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(promote, addresses))
    assert won.count(True) == 1
    assert registry.alias("counting", "production").address == addresses[won.index(True)]
    assert len(registry.history("counting")) == 1
    assert registry.base_model("tiny-a").identity_sha256 == BASE
    assert registry.fsck() == []
