import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from infra.database import create_engine, engine_for, errors_explained, normalised_url, ping, read_only
from infra.errors import InvalidInput, ServiceUnavailable
from infra.settings import Settings
from tests.services import free_ports


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    engine = create_engine(Settings(home=tmp_path / "not" / "there" / "yet"))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE counter (value INTEGER)"))
        connection.execute(sa.text("INSERT INTO counter VALUES (0)"))
    return engine


def value(connection: sa.Connection) -> int:
    return connection.execute(sa.text("SELECT value FROM counter")).scalar_one()


def test_sqlite_has_a_write_ahead_log_and_enforced_foreign_keys(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar_one() == "wal"
        connection.execute(sa.text("CREATE TABLE parent (id INTEGER PRIMARY KEY)"))
        connection.execute(sa.text("CREATE TABLE child (parent_id INTEGER REFERENCES parent)"))
    with pytest.raises(sa.exc.IntegrityError), engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO child VALUES (1)"))


def test_sqlite_rolls_back_table_definitions_too(engine: sa.Engine) -> None:
    with pytest.raises(RuntimeError), engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE half_done (id INTEGER)"))
        raise RuntimeError
    assert sa.inspect(engine).get_table_names() == ["counter"]


def test_transactions_that_read_and_then_write_wait_for_each_other(engine: sa.Engine) -> None:
    def count_to_twenty() -> None:
        own = engine_for(engine.url.render_as_string())
        for _ in range(20):
            with own.begin() as connection:
                before = value(connection)
                connection.execute(sa.text("UPDATE counter SET value = :value"), {"value": before + 1})
        own.dispose()

    threads = [threading.Thread(target=count_to_twenty) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with engine.connect() as connection:
        assert value(connection) == 80


def test_a_reader_does_not_wait_for_the_writer(engine: sa.Engine) -> None:
    with engine.begin() as writer:
        writer.execute(sa.text("UPDATE counter SET value = 7"))
        with read_only(engine).connect() as reader:
            assert value(reader) == 0
    with read_only(engine).connect() as reader:
        assert value(reader) == 7


def test_processes_that_open_a_new_file_at_the_same_moment_all_succeed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    program = (
        "import sys; from infra.database import engine_for; engine = engine_for(sys.argv[1])\n"
        "with engine.begin() as connection:\n"
        "    connection.exec_driver_sql('CREATE TABLE IF NOT EXISTS seen (who INTEGER)')\n"
        "    connection.exec_driver_sql('INSERT INTO seen VALUES (1)')\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, url]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    with engine_for(url).connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM seen").scalar_one() == 4


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgres_is_reached_through_psycopg_3_however_it_is_spelled(scheme: str) -> None:
    engine = engine_for(f"{scheme}://ada:hunter2@db/x")
    assert (engine.dialect.name, engine.dialect.driver) == ("postgresql", "psycopg")


def test_other_urls_are_left_as_they_are() -> None:
    assert normalised_url("postgresql+asyncpg://db/x") == "postgresql+asyncpg://db/x"


def test_an_unreachable_database_is_named_without_its_password() -> None:
    url = f"postgresql://ada:hunter2@127.0.0.1:{free_ports(1)[0]}/x"
    with pytest.raises(ServiceUnavailable) as caught:
        ping(engine_for(url))
    assert "ada:***@127.0.0.1" in caught.value.what
    assert "hunter2" not in str(caught.value)
    assert caught.value.remedy
    assert caught.value.__suppress_context__, "a traceback would show the driver's own error"


def test_a_database_that_lost_its_end_is_damaged_not_a_bug(tmp_path: Path) -> None:
    file = tmp_path / "cut.db"
    engine = engine_for(f"sqlite:///{file}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE words (word TEXT)")
        connection.exec_driver_sql("INSERT INTO words VALUES (?)", [("word " * 50,)] * 500)
    engine.dispose()
    file.write_bytes(file.read_bytes()[:6000])
    broken = engine_for(f"sqlite:///{file}")
    with (
        pytest.raises(ServiceUnavailable, match="is damaged"),
        errors_explained(f"sqlite:///{file}"),
        broken.connect() as connection,
    ):
        connection.exec_driver_sql("SELECT * FROM words").all()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("dear diary, " * 500)
    with pytest.raises(ServiceUnavailable, match="not a SQLite file"):
        ping(engine_for(f"sqlite:///{tmp_path / 'notes.db'}"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServiceUnavailable, match="cannot be made"):
        ping(create_engine(Settings(home=tmp_path / "file" / "home")))


def test_a_missing_table_says_what_to_do_and_a_bad_statement_stays_a_bug(engine: sa.Engine) -> None:
    url = str(engine.url)
    with pytest.raises(ServiceUnavailable, match="has not been brought"), errors_explained(url), engine.connect() as c:
        c.exec_driver_sql("SELECT * FROM nowhere")
    with pytest.raises(sa.exc.IntegrityError), errors_explained(url), engine.begin() as c:
        c.exec_driver_sql("CREATE TABLE strict (id INTEGER NOT NULL)")
        c.exec_driver_sql("INSERT INTO strict VALUES (NULL)")


@pytest.mark.parametrize("url", ["", "registry.db", "gopher://ada:hunter2@db/x"])
def test_what_is_no_database_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        engine_for(url)
    assert "hunter2" not in str(caught.value)


def test_a_missing_driver_is_named() -> None:
    with pytest.raises(InvalidInput, match="pg8000"):
        engine_for("postgresql+pg8000://ada:hunter2@db/x")


def test_a_database_that_regraft_does_not_know_is_named_without_its_password() -> None:
    with pytest.raises(InvalidInput, match=r"mysql://ada:\*\*\*@db/x is neither SQLite nor PostgreSQL"):
        create_engine(Settings(database_url="mysql://ada:hunter2@db/x"))
