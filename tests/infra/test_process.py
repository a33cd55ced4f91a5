import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import infra.process
from infra.errors import ServiceUnavailable
from infra.process import BackgroundServer, ProcessRecord
from tests.infra.echo import echo_server
from tests.services import free_ports


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[BackgroundServer]:
    server = echo_server(tmp_path, free_ports(1)[0])
    yield server
    server.stop()


def ensure_elsewhere(echo: BackgroundServer, *seconds: str) -> "subprocess.Popen[str]":
    """Another process that ensures the same server."""
    command = [sys.executable, "-m", "tests.infra.echo", str(echo.directory), str(echo.first_port), *seconds]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def record_of(process: "subprocess.Popen[str]") -> ProcessRecord:
    output, _ = process.communicate(timeout=60)
    return ProcessRecord.model_validate_json(output)


def children(record: ProcessRecord) -> list[psutil.Process]:
    assert record.pid is not None
    return psutil.Process(record.pid).children()


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(pid: int | None) -> None:
    """As the kernel's out-of-memory killer does; and wait for the end."""
    process = psutil.Process(pid)
    process.kill()
    process.wait(10)


def state_file(echo: BackgroundServer) -> Path:
    return echo.directory / "echo.json"


def test_a_server_is_started_once_and_found_again(echo: BackgroundServer) -> None:
    assert echo.find() is None
    record = echo.ensure()
    assert record.port == echo.first_port
    assert echo.ensure() == record == echo.find()
    assert echo.answers(record)


def test_another_process_finds_the_same_server(echo: BackgroundServer) -> None:
    assert record_of(ensure_elsewhere(echo)) == echo.ensure()


def test_starters_at_the_same_moment_get_one_server(echo: BackgroundServer) -> None:
    starters = [ensure_elsewhere(echo) for _ in range(3)]
    assert len({record_of(starter).pid for starter in starters}) == 1


def test_the_server_outlives_its_starter_and_the_terminals_ctrl_c(echo: BackgroundServer) -> None:
    starter = ensure_elsewhere(echo)
    record = record_of(starter)
    with pytest.raises(ProcessLookupError):
        os.killpg(starter.pid, signal.SIGINT)  # nobody is left in the group that Ctrl-C reaches
    assert echo.find() == record
    assert os.getsid(record.pid or 0) == record.pid


def test_a_starter_killed_half_way_leaves_a_server_that_the_next_one_waits_for(echo: BackgroundServer) -> None:
    starter = ensure_elsewhere(echo, "1.5")
    while not state_file(echo).exists():
        time.sleep(0.01)
    starter.kill()
    starter.communicate()
    begun = echo.find()
    assert begun is not None and not echo.answers(begun)
    assert echo.ensure() == begun


def test_stop_ends_the_server_and_its_children_and_the_port_is_remembered(echo: BackgroundServer) -> None:
    busy = socket.create_server(("127.0.0.1", echo.first_port))
    record = echo.ensure()
    family = children(record)
    assert family
    busy.close()
    assert echo.stop()
    assert not any(map(lives, family))
    assert not psutil.pid_exists(record.pid or 0)
    assert echo.find() is None
    assert not echo.stop()
    assert echo.ensure().port == record.port != echo.first_port


def test_a_server_that_was_killed_is_replaced_on_its_port_and_its_orphans_are_ended(echo: BackgroundServer) -> None:
    first = echo.ensure()
    (orphan,) = children(first)
    kill(first.pid)
    assert echo.find() is None
    second = echo.ensure()
    assert (second.port, second.pid != first.pid) == (first.port, True)
    assert not lives(orphan)


@pytest.mark.parametrize("pid", [os.getpid(), 1, 2**22 + 1], ids=["ours", "init", "none"])
def test_a_recycled_pid_is_neither_believed_nor_killed(echo: BackgroundServer, pid: int) -> None:
    record = echo.ensure()
    echo.stop()
    state_file(echo).write_text(record.model_copy(update={"pid": pid}).model_dump_json())
    assert echo.find() is None
    assert not echo.stop()
    state_file(echo).write_text(record.model_copy(update={"pid": pid}).model_dump_json())
    assert echo.ensure().pid not in {pid, record.pid}


@pytest.mark.parametrize("content", ["", '{"pid": 12', "[]", '{"pid": "me", "port": 1, "started_at": "today"}'])
def test_a_living_server_is_found_although_its_file_is_damaged(echo: BackgroundServer, content: str) -> None:
    record = echo.ensure()
    state_file(echo).write_text(content)
    found = echo.ensure()
    assert (found.pid, found.port) == (record.pid, record.port)
    assert echo.stop()
    assert not psutil.pid_exists(record.pid or 0)


def test_a_damaged_file_without_a_server_is_started_over(echo: BackgroundServer) -> None:
    state_file(echo).write_text('{"pid": 12')
    assert echo.answers(echo.ensure())


def test_a_stranger_on_the_port_that_answers_is_not_taken_for_the_server(
    echo: BackgroundServer, tmp_path: Path
) -> None:
    stranger = echo_server(tmp_path / "stranger", echo.first_port)
    strange = stranger.ensure()
    try:
        record = echo.ensure()
        assert record.port != strange.port
        assert not echo.answers(record.model_copy(update={"port": strange.port}))
        echo.stop()
        assert stranger.find() == strange
    finally:
        stranger.stop()


def test_a_port_that_is_taken_while_the_server_starts_is_given_up_for_the_next(echo: BackgroundServer) -> None:
    starter = ensure_elsewhere(echo, "1.5")
    while not state_file(echo).exists():
        time.sleep(0.01)
    with socket.create_server(("127.0.0.1", echo.first_port)):
        record = record_of(starter)
        assert record.port != echo.first_port
        assert echo.find() == record


def test_a_hung_server_is_replaced(echo: BackgroundServer, monkeypatch: pytest.MonkeyPatch) -> None:
    record = echo.ensure()
    psutil.Process(record.pid).suspend()
    monkeypatch.setattr(infra.process, "START_SECONDS", 5)
    monkeypatch.setattr(infra.process, "STOP_SECONDS", 1)
    monkeypatch.setattr(infra.process, "HEALTH_SECONDS", 0.5)
    assert not echo.answers(record)
    assert echo.ensure().pid != record.pid


def test_a_server_that_dies_at_start_shows_the_end_of_this_starts_log(tmp_path: Path) -> None:
    (tmp_path / "echo.log").write_text("an older complaint\n")
    broken = echo_server(tmp_path, free_ports(1)[0], program="import sys; print('no such database'); sys.exit(3)")
    with pytest.raises(ServiceUnavailable, match="no such database") as caught:
        broken.ensure()
    assert "older" not in caught.value.what
    assert str(tmp_path / "echo.log") in caught.value.remedy
    assert broken.find() is None


def test_an_overgrown_log_is_begun_afresh(echo: BackgroundServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infra.process, "LOG_BYTES", 10)
    echo.log.write_text("x" * 11)
    echo.ensure()
    assert echo.log.read_text() == f"listening on {echo.first_port}\n"
