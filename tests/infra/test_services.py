"""The real Prefect and MLflow servers, started once for the whole module."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import psutil
import pytest
from pydantic import SecretStr

from infra.machine import check_services
from infra.process import BackgroundServer
from infra.services import LocalServices, Service
from infra.settings import Settings
from tests.infra.echo import echo_server
from tests.services import free_ports

UP_ELSEWHERE = """
import sys
from pathlib import Path
from infra.services import LocalServices
from infra.settings import Settings
print(*(service.pid for service in LocalServices(Settings(home=Path(sys.argv[1]))).up()))
"""

FLOW = """
import sys
from pathlib import Path
from infra.mlflow_client import mlflow_client
from infra.prefect_client import configure_prefect
from infra.settings import Settings
settings = Settings(home=Path(sys.argv[1]))
configure_prefect(settings)
from prefect import flow, get_run_logger, task

@task
def double(x):
    return 2 * x

@flow
def doubled(numbers: list[int]):
    get_run_logger().info("on the server, not in the terminal")
    return sum(future.result() for future in double.map(numbers))

client = mlflow_client(settings)
experiment = client.create_experiment("from the terminal")
run = client.create_run(experiment)
client.log_text(run.info.run_id, "hello", "note.txt")
print(doubled([1, 2, 3]), run.info.run_id)
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    yield settings
    LocalServices(settings).down()


@pytest.fixture(scope="module")
def running(settings: Settings) -> list[Service]:
    return LocalServices(settings).up()


def python(program: str, home: Path, directory: Path) -> "subprocess.CompletedProcess[str]":
    others = ("PREFECT", "MLFLOW", "_MLFLOW")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    environment["HTTP_PROXY"] = environment["http_proxy"] = "http://127.0.0.1:9"  # an office's, no use to local servers
    return subprocess.run(
        [sys.executable, "-c", program, str(home)],
        env={**environment, "PYTHONPATH": str(Path.cwd())},
        cwd=directory,
        capture_output=True,
        text=True,
    )


def get(url: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": "text/html"}), timeout=30) as response:
        return response.read().decode()


@pytest.mark.services
def test_both_servers_listen_on_this_machine_only(running: list[Service]) -> None:
    for service in running:
        assert service.running and service.url == f"http://127.0.0.1:{service.port}"
        family = [psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)]
        listening = {c.laddr for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        assert listening == {("127.0.0.1", service.port)}


@pytest.mark.services
def test_both_pages_load_with_all_they_refer_to_and_nothing_from_the_internet(running: list[Service]) -> None:
    for service in running:
        assert service.url is not None
        with urllib.request.urlopen(
            urllib.request.Request(service.url, headers={"Accept": "text/html"}), timeout=30
        ) as response:
            page, address = response.read().decode(), response.url
        parts = re.findall(r"""<(?:script|link)[^>]*?(?:src|href)="([^"]+\.(?:js|css))\"""", page)
        assert parts, page
        for part in parts:
            url = urljoin(address, part)
            assert url.startswith(service.url), f"{part} would be fetched from elsewhere"
            assert get(url)


@pytest.mark.services
def test_a_second_process_finds_the_same_servers_in_silence(
    settings: Settings, running: list[Service], tmp_path: Path
) -> None:
    outcome = python(UP_ELSEWHERE, settings.home, tmp_path)
    assert (outcome.stdout, outcome.stderr) == (" ".join(str(service.pid) for service in running) + "\n", "")
    assert LocalServices(settings).status() == running


@pytest.mark.services
def test_flows_and_runs_go_to_the_servers_and_the_terminal_stays_quiet(
    settings: Settings, running: list[Service], tmp_path: Path
) -> None:
    outcome = python(FLOW, settings.home, tmp_path)
    assert outcome.stderr == ""
    result, run_id = outcome.stdout.split()
    assert result == "12"
    assert list(tmp_path.iterdir()) == []

    prefect, mlflow = (service.url for service in running)
    request = urllib.request.Request(
        f"{prefect}/api/flow_runs/filter", data=b"{}", headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert [run["state_name"] for run in json.load(response)] == ["Completed"]
    run = json.loads(get(f"{mlflow}/api/2.0/mlflow/runs/get?run_id={run_id}"))
    assert run["run"]["info"]["artifact_uri"].startswith(str(settings.home / "mlflow"))
    assert get(f"{mlflow}/get-artifact?run_uuid={run_id}&path=note.txt") == "hello"


@pytest.mark.services
def test_killed_servers_come_up_again_where_they_were_and_down_stops_them(
    settings: Settings, running: list[Service]
) -> None:
    services = LocalServices(settings)
    for service in running:
        process = psutil.Process(service.pid)
        process.kill()
        process.wait(10)
    assert [service.state for service in services.status()] == ["stopped", "stopped"]
    again = services.up()
    assert [service.url for service in again] == [service.url for service in running]
    assert not {service.pid for service in again} & {service.pid for service in running}
    assert services.down() == ["prefect", "mlflow"]
    assert [service.state for service in services.status()] == ["stopped", "stopped"]
    assert services.down() == []
    for log in settings.services.glob("*.log"):
        said = log.read_text()  # a Prefect server that is told to stop as its lifespan begins complains; no fault
        assert "Traceback" not in said or "in lifespan" in said, log


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[BackgroundServer]:
    server = echo_server(tmp_path / "remote", free_ports(1)[0])
    yield server
    server.stop()


def test_servers_of_somebody_else_are_asked_but_neither_started_nor_stopped(
    tmp_path: Path, remote: BackgroundServer
) -> None:
    address = f"http://127.0.0.1:{remote.ensure().port}"
    tracking = SecretStr(address.replace("//", "//ada:hunter2@"))
    services = LocalServices(
        Settings(home=tmp_path / "home", prefect_api_url=f"{address}/api/", mlflow_tracking_uri=tracking)
    )
    shown = address.replace("//", "//ada:***@")
    assert services.status() == [
        Service("prefect", "running", address, remote=True),
        Service("mlflow", "running", shown, remote=True),
    ]
    assert services.up() == services.status()
    assert services.prefect_api_url() == f"{address}/api/"
    assert services.down() == []
    remote.stop()
    assert [service.state for service in services.status()] == ["unreachable", "unreachable"]
    assert not (tmp_path / "home" / "services" / "prefect.json").exists()


def test_the_doctor_is_content_with_stopped_local_servers_but_not_with_silent_remote_ones(tmp_path: Path) -> None:
    assert [finding.level for finding in check_services(Settings(home=tmp_path))] == ["ok", "ok"]
    silent = f"http://127.0.0.1:{free_ports(1)[0]}"
    settings = Settings(home=tmp_path, prefect_api_url=f"{silent}/api", mlflow_tracking_uri=SecretStr(silent))
    findings = check_services(settings)
    assert [finding.level for finding in findings] == ["problem", "problem"]
    assert all(silent in finding.message and finding.remedy for finding in findings)
