"""One background server of ours: started once, found again by any later command, stopped with all it spawned.

What is known about it is one JSON file. A file can lie: its process may have died, its pid may belong to somebody else
now, its port may have been taken, the file may be half written. So nothing in it is believed without asking the
machine: every process of the server carries a mark in its environment, which children inherit and a stranger that was
given a recycled pid does not have.
"""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from filelock import FileLock
from pydantic import BaseModel, ValidationError

from infra.errors import ServiceUnavailable
from infra.http import answers

START_SECONDS = 180  # generous: a cold disk and a busy machine
STOP_SECONDS = 15
HEALTH_SECONDS = 5.0
LOG_BYTES = 10_000_000
MARK = "REGRAFT_SERVER"


class ProcessRecord(BaseModel):
    """What is remembered of a server; `pid` is None once it was stopped, and the port is there for the next start."""

    pid: int | None
    port: int
    started_at: datetime


@dataclass(frozen=True)
class BackgroundServer:
    """A server process on 127.0.0.1, detached from the terminal, whose files are `directory/NAME.{json,lock,log}`.

    Args:
        name: names the files and the thing in messages.
        directory: of those files; also the server's working directory.
        first_port: asked for when no port is remembered; the next free one above it is taken.
        health: path that answers 200 when the server is ready.
        command: arguments after the Python interpreter, for a port.
        environment: the server's whole environment, for a port.
    """

    name: str
    directory: Path
    first_port: int
    health: str
    command: Callable[[int], list[str]]
    environment: Callable[[int], dict[str, str]]

    @property
    def log(self) -> Path:
        """Everything that the server printed."""
        return self.directory / f"{self.name}.log"

    def find(self) -> ProcessRecord | None:
        """The record of the living server, whichever process started it; it may not answer yet."""
        record = self.remembered() or self._rediscovered()
        return record if record is not None and self._process(record) is not None else None

    def answers(self, record: ProcessRecord) -> bool:
        """Whether the recorded server itself, and not another one on its port, answers."""
        url = f"http://127.0.0.1:{record.port}{self.health}"
        if self._process(record) is None or not answers(url, seconds=HEALTH_SECONDS):
            return False
        return any(record.port in _listening(process) for process in self._members())

    def ensure(self) -> ProcessRecord:
        """Find the server or start it; two starters at once get the same one.

        Raises:
            ServiceUnavailable: it died at start, or did not answer in 180 s; the message holds the tail of its log.
        """
        if (found := self.find()) is not None and self.answers(found):
            return found
        with self._alone():
            # Alive but silent: it is still starting, and whoever started it was interrupted.
            if (found := self.find()) is not None and self._wait(found):
                return found
            _end(self._members())  # a hung server, or the children of one that was killed
            remembered = self.remembered()
            return self._start(remembered.port if remembered is not None else self.first_port)

    def stop(self) -> bool:
        """Stop the server and all that it spawned; whether there was anything to stop."""
        with self._alone():
            members = self._members()
            _end(members)
            record = self.remembered()
            if record is not None and record.pid is not None:
                self._write(record.model_copy(update={"pid": None}))
            return bool(members)

    def _start(self, preferred_port: int) -> ProcessRecord:
        port = _free_port(preferred_port, self.first_port)
        for _ in range(3):
            offset = self._prepare_log()
            record = self._spawn(port)
            if self._wait(record):
                return record
            _end(self._members())
            self._write(record.model_copy(update={"pid": None}))
            if _is_free(port):  # it failed for a reason of its own
                break
            port = _free_port(port, self.first_port)  # somebody took the port while it was starting
        with self.log.open("rb") as log:
            log.seek(offset)
            lines = log.read().decode(errors="replace").splitlines()
        tail = "\n".join([line for line in lines if line.strip()][-20:]) or "(nothing)"
        raise ServiceUnavailable(
            f"The local {self.name} server did not start. Its log ends:\n{tail}",
            f"The whole log is {self.log}. Mend what it names, then: regraft up",
        )

    def _spawn(self, port: int) -> ProcessRecord:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *self.command(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,  # no prefect.toml, .env or ./mlruns of the user's working directory
                env={**self.environment(port), MARK: self._mark},
                start_new_session=True,  # Ctrl-C in the terminal is not for the server
            )
        # The kernel shows a new program's environment, and with it our mark, only a moment after `exec` has begun.
        while process.poll() is None and not self._is_ours(psutil.Process(process.pid)):
            time.sleep(0.01)
        process.returncode = 0  # it outlives us on purpose; keeps Popen from warning about that
        record = ProcessRecord(pid=process.pid, port=port, started_at=datetime.now(UTC))
        self._write(record)
        return record

    def _wait(self, record: ProcessRecord) -> bool:
        """Wait until the server answers; False once it has died or the time is up."""
        deadline = time.monotonic() + START_SECONDS
        while self._process(record) is not None and time.monotonic() < deadline:
            if self.answers(record):
                return True
            time.sleep(0.1)
        return False

    @property
    def _mark(self) -> str:
        return str(self.directory.absolute() / self.name)

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error, OSError):
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._mark
        return False

    def _process(self, record: ProcessRecord) -> psutil.Process | None:
        """The recorded process, if it lives and is ours."""
        if record.pid is None:
            return None
        with suppress(psutil.Error):
            process = psutil.Process(record.pid)
            return process if self._is_ours(process) else None
        return None

    def _members(self) -> list[psutil.Process]:
        """Every living process of the server, orphaned children too."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True)
        with FileLock(self.directory / f"{self.name}.lock"):
            yield

    @property
    def _file(self) -> Path:
        return self.directory / f"{self.name}.json"

    def remembered(self) -> ProcessRecord | None:
        """What the file says, true or not."""
        try:
            return ProcessRecord.model_validate_json(self._file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def _rediscovered(self) -> ProcessRecord | None:
        """The record of a server whose file was lost or half written, as the machine tells it."""
        for process in self._members():
            for port in _listening(process):
                started_at = datetime.fromtimestamp(process.create_time(), UTC)
                return ProcessRecord(pid=process.pid, port=port, started_at=started_at)
        return None

    def _write(self, record: ProcessRecord) -> None:
        draft = self._file.with_suffix(".json.tmp")
        draft.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        draft.replace(self._file)

    def _prepare_log(self) -> int:
        """Where in the log the coming start begins; an overgrown log is begun afresh."""
        size = self.log.stat().st_size if self.log.exists() else 0
        if size <= LOG_BYTES:
            return size
        self.log.unlink()
        return 0


def _listening(process: psutil.Process) -> list[int]:
    with suppress(psutil.Error):
        return [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return []


def _end(members: list[psutil.Process]) -> None:
    """SIGTERM, patience, SIGKILL."""
    for step in (signal.SIGTERM, signal.SIGKILL):
        for process in members:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(step)
        deadline = time.monotonic() + STOP_SECONDS
        while (members := [process for process in members if _lives(process)]) and time.monotonic() < deadline:
            time.sleep(0.05)


def _lives(process: psutil.Process) -> bool:
    try:
        process.wait(0)  # also collects a child of ours
    except psutil.TimeoutExpired:
        with suppress(psutil.NoSuchProcess):
            return process.status() != psutil.STATUS_ZOMBIE  # init may take its time to collect an orphan
    return False


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports in TIME_WAIT are free to a server
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_port(preferred: int, first: int) -> int:
    candidates: list[int] = [preferred, *range(first, first + 200)]
    for port in candidates:
        if _is_free(port):
            return port
    raise ServiceUnavailable(f"No free port on 127.0.0.1 between {first} and {first + 199}.", "Stop a server there.")
