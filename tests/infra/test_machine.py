import os
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from pydantic import SecretStr

from infra import machine
from infra.machine import (
    check_artifacts,
    check_bucket,
    check_database,
    check_disk,
    check_mlflow_store,
    check_python,
    check_settings,
    check_torch,
    check_triton,
    machine_findings,
)
from infra.settings import Settings
from tests.services import free_ports, s3_server

Usage = namedtuple("Usage", "total used free")


def test_a_store_that_no_release_can_open_is_a_problem(tmp_path: Path) -> None:
    finding = check_artifacts(Settings(home=tmp_path, artifact_store="ftp://ada:sesame@host/x"))
    assert (finding.level, "sesame" in finding.message) == ("problem", False)


def test_this_machine_is_fit_and_looking_at_it_changes_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    findings = machine_findings(Settings(home=home))
    assert [finding.subject for finding in findings] == [
        "python", "torch", "triton", "disk", "settings", "database", "mlflow store", "prefect", "mlflow", "artifacts"
    ]  # fmt: skip
    assert [finding for finding in findings if finding.level == "problem"] == []
    assert not home.exists()


def test_python_and_torch_are_named_with_their_versions() -> None:
    import torch

    assert ".".join(map(str, sys.version_info[:3])) in check_python().message
    assert torch.__version__ in check_torch().message
    assert ("CPU only" in check_torch().message) == (not torch.cuda.is_available())
    assert check_triton().subject == "triton"


@pytest.mark.parametrize(
    ("gibibytes", "level"), [(0.9, "problem"), (1.1, "warning"), (4.9, "warning"), (5.1, "ok"), (900, "ok")]
)
def test_free_disk_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gibibytes: float, level: str) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(0, 0, int(gibibytes * 2**30)))
    finding = check_disk(tmp_path / "not" / "there")
    assert (finding.level, bool(finding.remedy)) == (level, level != "ok")
    assert f"{gibibytes:.1f} GiB" in finding.message


def test_a_home_that_cannot_be_a_folder_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = check_disk(tmp_path / "file" / "home")
    assert (finding.level, "REGRAFT_HOME" in finding.remedy) == ("problem", True)


def test_settings_are_shown_with_their_origin_and_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("REGRAFT_")]:
        monkeypatch.delenv(name)
    (tmp_path / "regraft.toml").write_text('gpu_slots = 3\ns3_secret_access_key = "swordfish"\n')
    monkeypatch.setenv("REGRAFT_CONFIG", str(tmp_path / "regraft.toml"))
    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path))
    monkeypatch.setenv("REGRAFT_DATABASE_URL", "postgresql://ada:hunter2@db/x")
    message = check_settings(Settings()).message
    assert str(tmp_path / "regraft.toml") in message
    assert "REGRAFT_DATABASE_URL, REGRAFT_HOME" in message
    assert "gpu_slots=3" in message
    assert "postgresql://ada:***@db/x" in message
    assert "hunter2" not in message and "swordfish" not in message


def test_databases_are_asked_and_named_without_passwords(tmp_path: Path) -> None:
    assert "created at first use" in check_database(Settings(home=tmp_path)).message
    assert not (tmp_path / "registry.db").exists()
    (tmp_path / "registry.db").write_bytes(b"not a database" * 500)
    assert check_database(Settings(home=tmp_path)).level == "problem"
    silent = SecretStr(f"postgresql://ada:hunter2@127.0.0.1:{free_ports(1)[0]}/x")
    for finding in (
        check_database(Settings(home=tmp_path, database_url=silent)),
        check_mlflow_store(Settings(home=tmp_path, mlflow_tracking_uri=silent)),
    ):
        assert (finding.level, "ada:***@" in finding.message, "hunter2" in str(finding)) == ("problem", True, False)


def s3_settings(endpoint: str, bucket: str, key: str = "key", secret: str = "secret") -> Settings:
    return Settings(
        artifact_store=f"s3://{bucket}/adapters",
        s3_endpoint_url=endpoint,
        s3_access_key_id=SecretStr(key),
        s3_secret_access_key=SecretStr(secret),
    )


def test_a_silent_s3_server_is_a_problem_and_so_is_a_bad_address() -> None:
    finding = check_bucket(s3_settings(f"http://127.0.0.1:{free_ports(1)[0]}", "bucket"))
    assert (finding.level, "does not answer" in finding.message) == ("problem", True)
    assert check_bucket(s3_settings("http://127.0.0.1:1", "..")).level == "problem"


@pytest.mark.services
def test_a_real_bucket_is_found_and_what_is_wrong_with_others_is_said() -> None:
    with s3_server() as server:
        keys = (server.access_key_id, server.secret_access_key)
        assert check_bucket(s3_settings(server.endpoint, server.bucket, *keys)).level == "ok"
        absent = check_bucket(s3_settings(server.endpoint, "absent", *keys))
        assert (absent.level, "is not there" in absent.message) == ("problem", True)
        refused = check_bucket(s3_settings(server.endpoint, server.bucket, server.access_key_id, "guess"))
        assert (refused.level, "these credentials" in refused.message) == ("problem", True)
        assert "guess" not in str(refused)
