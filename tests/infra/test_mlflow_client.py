import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from infra.errors import InvalidInput, ServiceUnavailable
from infra.mlflow_client import mlflow_client, prepare_store
from infra.settings import Settings
from tests.services import free_ports

RUN = """
import sys
from pathlib import Path
from infra.mlflow_client import mlflow_client
from infra.settings import Settings

client = mlflow_client(Settings(home=Path(sys.argv[1])))
run = client.create_run("0")
client.log_text(run.info.run_id, "hello", "note.txt")
client.log_metric(run.info.run_id, "loss", 0.5)
client.set_terminated(run.info.run_id)
client.create_registered_model(f"model-{run.info.run_id}")
"""


def test_two_processes_create_one_quiet_store_and_leave_nothing_in_the_working_directory(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "_MLFLOW"))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(home)],
            cwd=elsewhere,
            env={**inherited, "PYTHONPATH": str(Path.cwd())},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)] == [(0, "")] * 2
    assert list(elsewhere.iterdir()) == []
    assert len(list((home / "mlflow" / "0").glob("*/artifacts/note.txt"))) == 2
    assert not (home / "mlflow.db.new").exists()
    database = sqlite3.connect(home / "mlflow.db")
    assert database.execute("SELECT count(*) FROM runs").fetchone() == (2,)
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)

    # A store of another MLflow is refused in one sentence, not migrated behind its owner's back.
    database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    database.commit()
    database.close()
    with pytest.raises(ServiceUnavailable, match="out-of-date"):
        mlflow_client(Settings(home=home))


def test_half_a_store_left_by_a_crash_is_built_again(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db.new").write_bytes(b"half a database")
    assert prepare_store(Settings(home=tmp_path)) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert mlflow_client(Settings(home=tmp_path)).search_registered_models() == []


def test_an_unreachable_server_or_database_is_said_at_once_and_without_its_password(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    for scheme in ("http", "postgresql"):
        uri = SecretStr(f"{scheme}://ada:hunter2@127.0.0.1:{port}/x")
        with pytest.raises(ServiceUnavailable) as caught:
            mlflow_client(Settings(home=tmp_path, mlflow_tracking_uri=uri))
        assert f"ada:***@127.0.0.1:{port}" in caught.value.what
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "sqlite://", "sqlite:///:memory:"])
def test_a_store_that_cannot_be_shared_is_refused(tmp_path: Path, uri: str) -> None:
    with pytest.raises(InvalidInput):
        prepare_store(Settings(home=tmp_path, mlflow_tracking_uri=SecretStr(uri)))
