"""Programs that nobody trusts, run by tests: bounded in time, memory, files and processes, without a network.

    verdict = judge_program("def double(x): return 2 * x", "assert double(4) == 8")
    verdict.passed  # True

Linux only. `namespaces` is the isolation wherever the kernel allows it (as root, or with user namespaces): the program
sees no network, no process but its own, and a read-only file system of the Python installation and system libraries
with an empty working directory in memory. Elsewhere (a container without the privilege, say) it is `audit`: bounds and
an audit hook of the interpreter, which refuses sockets, processes, foreign code and other files; good against what
goes wrong by accident, not against an attack on the interpreter. Every verdict says which one was in force.

Tests and program run in processes of their own (see `training/evaluation/jail.py`): tests call the program's functions
by name, and arguments and results travel as plain values (numbers, texts, bytes, lists, tuples, sets, dicts). So no
program can read its tests, or pass by anything but right answers. Tests cannot use the program's classes, see what it
prints, or see an argument changed in place; a function of its own must do that and return what is to be seen.
"""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from infra.errors import InvalidInput, RegraftError

Isolation = Literal["namespaces", "audit"]
Status = Literal["passed", "failed", "timeout", "memory", "crashed", "output"]

JAIL = Path(__file__).with_name("jail.py")
GRACE = 20.0  # seconds, beyond its own, for a jail to start and to clean up on a busy machine


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program, and its tests, may use.

    Args:
        seconds: from start to verdict, by the clock.
        cpu_seconds: of each process.
        memory: bytes of address space, of each process; all together may take `processes` times as much.
        processes: and threads, the program itself included. Under `audit` there is but the program.
        disk: bytes of its working directory; under `audit` of each file.
        output: bytes that it may print.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory: int = 512 << 20
    processes: int = 12
    disk: int = 16 << 20
    output: int = 64 << 10


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a program.

    Attributes:
        status: `passed`: it ran, and so did every test to its end. `failed`: it or a test raised. `timeout`: of clock
            or processor. `memory`: it ran out. `crashed`: it ended before its tests did. `output`: it printed too much.
        reason: why it did not pass; empty where it did.
        seconds: from start to verdict.
        isolation: what held it.
        output: what it printed, up to the limit.
    """

    status: Status
    reason: str
    seconds: float
    isolation: Isolation
    output: str

    @property
    def passed(self) -> bool:
        """Whether every test ran and held."""
        return self.status == "passed"


def judge_program(
    program: str, tests: str = "", limits: Limits | None = None, isolation: Isolation | None = None
) -> Verdict:
    """Run a Python program, then tests of its functions; nothing of either is left afterwards.

    The Python is the one that runs this, without site-packages: the standard library is all there is.

    Args:
        program: source text.
        tests: source text: asserts on the functions and plain values that the program defines under public names.
        limits: the defaults of `Limits` where there are none.
        isolation: insist on it; else the strongest to be had.

    Raises:
        InvalidInput: not on Linux, or the isolation that is insisted on is not to be had.
    """
    if isolation is None:
        isolation = strongest_isolation()
    _require_linux()
    limits, began = limits or Limits(), time.monotonic()
    told, output = _run(program, tests, limits, isolation)
    if told is None:
        reason = f"it printed more than {limits.output:,} bytes"
        return Verdict("output", reason, time.monotonic() - began, isolation, output)
    if told["status"] == "broken":
        raise InvalidInput(
            f"Programs cannot be run under isolation '{isolation}' here: {told['reason']}.",
            "Allow user namespaces (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces; in a container "
            "CAP_SYS_ADMIN), or accept 'audit'.",
        )
    return Verdict(told["status"], told["reason"], told["seconds"], isolation, output)


def judge_programs(
    programs: Sequence[tuple[str, str]],
    limits: Limits | None = None,
    isolation: Isolation | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """Verdicts on many (program, tests), in their order.

    Args:
        workers: how many run at a time. Default: one for each processor.
        on_progress: told (judged, wanted).
    """
    isolation = isolation or strongest_isolation()
    done: list[Verdict] = []

    def judged(job: tuple[str, str]) -> Verdict:
        return judge_program(job[0], job[1], limits, isolation)

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        try:
            for verdict in pool.map(judged, programs):
                done.append(verdict)
                if on_progress:
                    on_progress(len(done), len(programs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done


@cache
def strongest_isolation() -> Isolation:
    """The isolation that this machine allows.

    Raises:
        InvalidInput: not on Linux.
    """
    _require_linux()
    told, _ = _run("", "", Limits(), "namespaces")
    return "namespaces" if told is not None and told["status"] == "passed" else "audit"


def _require_linux() -> None:
    if sys.platform != "linux":
        raise InvalidInput(
            f"Programs can be run safely on Linux only; this is {sys.platform}.", "Use a Linux machine or container."
        )


def _run(program: str, tests: str, limits: Limits, isolation: Isolation) -> tuple[dict[str, Any] | None, str]:
    """What the jail told (None: it was stopped because the program printed too much), and what was printed."""
    interpreter = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    job = {
        "program": program,
        "tests": tests,
        "isolation": isolation,
        "limits": asdict(limits),
        "interpreter": interpreter,
        "interpreter_folder": os.path.realpath(sys.base_prefix),
    }
    with tempfile.TemporaryDirectory(prefix="regraft-sandbox-") as folder, tempfile.TemporaryFile() as given:
        given.write(json.dumps(job).encode())
        given.seek(0)
        with _jail(interpreter, folder, given.fileno()) as process:
            told, output = _listen(process, limits)
    text = output[: limits.output].decode(errors="replace")
    if len(output) > limits.output:
        return None, text
    try:
        return json.loads(told), text
    except ValueError:
        raise RegraftError(
            f"The sandbox itself failed: {text[-500:] or 'it said nothing'}", "Is the machine short of memory?"
        ) from None


@contextmanager
def _jail(interpreter: str, folder: str, job: int) -> Iterator["subprocess.Popen[bytes]"]:
    """The jail's supervisor, which ends with all that it has started."""
    process = subprocess.Popen(
        [interpreter, "-I", "-S", str(JAIL)],
        stdin=job,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},  # some Pythons need it
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()  # nothing to one that has ended
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def _listen(process: "subprocess.Popen[bytes]", limits: Limits) -> tuple[bytes, bytes]:
    """What comes on standard output and on standard error, until both end or the latter is too much."""
    assert process.stdout is not None and process.stderr is not None
    told, output = bytearray(), bytearray()
    deadline = time.monotonic() + limits.seconds + GRACE
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, told)
        selector.register(process.stderr, selectors.EVENT_READ, output)
        while selector.get_map() and len(output) <= limits.output and time.monotonic() < deadline:
            for key, _ in selector.select(timeout=1.0):
                chunk = os.read(key.fd, 1 << 16)
                key.data.extend(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)
    return bytes(told), bytes(output)
