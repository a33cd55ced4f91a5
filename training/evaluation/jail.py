"""The trusted half of the sandbox: shuts itself in, starts a program beside itself, and judges it by tests.

A script of its own (standard library only), started by `training.evaluation.sandbox` with a job on standard input.
Three processes, so that the judged one holds nothing worth stealing:

    supervisor  outside; keeps the time, ends everything, says what became of it on standard output
    └ judge     inside, process 1 of its own process namespace; runs the tests
      └ program inside; runs the judged code (`jailed_program.py`), answers the judge's calls with plain values

The program never sees the tests, cannot write the verdict (only the judge holds that pipe), cannot signal or trace the
judge, and what it leaves behind (`os._exit`, patched builtins, objects that equal everything) stays in its own process.
"""

import builtins
import ctypes
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("jailed_program.py")
WORK = "/work"  # the one writable folder inside
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
SETTLED = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}  # sets have one order, so verdicts do not hang on it
MOST_SENT = 8 << 20  # bytes of one answer of the program
MOST_FILES = 1_000  # in the working directory
REASON = 500  # characters

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/capability.h>
NEW_USER, NEW_NAMESPACES = 0x10000000, 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, DETACH = 2, 4, 0x1000, 0x4000, 0x40000, 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY_NO_SUID = 442, -100, 0x8000, 1 | 2
DEATH_SIGNAL, DUMPABLE, DROP_BOUNDING, SUBREAPER, NO_NEW_PRIVILEGES = 1, 4, 24, 36, 38
CAPABILITIES_VERSION_3 = 0x20080522
# The former needs more than a text; at the latter a test's own loops end, as if they had been gone through.
_NEVER_RAISED = (UnicodeError, StopIteration, StopAsyncIteration)
GARBLED = "the program wrote something else than answers into its pipe"
OWN_USERS = 1 << 30  # user ids from here on belong to nobody; root gives each jail one, so that it counts alone

_libc = ctypes.CDLL(None, use_errno=True)


class Stopped(Exception):
    """Whoever started the jail wants it to end."""


class Lost(Exception):
    """The program ended, or sent what is no answer."""


def _call(function: Callable[..., int], *arguments: object) -> None:
    if function(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind)]
    _call(_libc.mount, *texts, ctypes.c_ulong(flags), options.encode() if options else None)


def enter_namespaces(root: str, interpreter: str, disk: int) -> None:
    """Leave the machine: no network, no other processes, and of its files a few system folders, read-only.

    As root without, otherwise with a user namespace, in which one may do this without being root.

    Args:
        root: an empty folder, which the new root is mounted on.
        interpreter: folder of the Python that runs inside.
        disk: bytes of the working directory, a file system in memory.

    Raises:
        OSError: the kernel, or the container that this runs in, does not allow it.
    """
    user, group = os.geteuid(), os.getegid()
    _call(_libc.unshare, NEW_NAMESPACES | (NEW_USER if user else 0))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        with suppress(OSError):
            Path("/proc/sys/user/max_user_namespaces").write_text("0")  # of this one: none within it
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path in (*SYSTEM, *DEVICES, *([] if f"{interpreter}/".startswith("/usr/") else [interpreter])):
        _show(path, root)
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY_NO_SUID, 0, 0, 0)  # to set, to clear, propagation, user namespace
    Path(root + WORK).mkdir()
    where = root.encode()
    _call(_libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, where, AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    _mount("tmpfs", root + WORK, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=777,size={disk},nr_inodes={MOST_FILES}")
    os.chdir(root)
    _call(_libc.pivot_root, b".", b".")  # the old root lies on the new one, and is taken away
    _call(_libc.umount2, b".", DETACH)
    os.chdir(WORK)


def _show(path: str, root: str) -> None:
    """Let `path` be seen under the new root."""
    inside = Path(root + path)
    if Path(path).is_symlink():
        inside.symlink_to(Path(path).readlink())
    elif Path(path).exists():
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.mkdir() if Path(path).is_dir() else inside.touch()
        _mount(path, str(inside), None, MS_BIND | MS_REC)


def limit(limits: dict[str, int]) -> None:
    """Bounds for this process and all that it starts."""
    bounds = {
        resource.RLIMIT_CPU: (limits["cpu_seconds"], limits["cpu_seconds"] + 1),
        resource.RLIMIT_AS: (limits["memory"],) * 2,
        resource.RLIMIT_FSIZE: (limits["disk"],) * 2,
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
    }
    for what, (soft, hard) in bounds.items():
        most = resource.getrlimit(what)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(what, (soft, hard))


def give_up_privileges(user: int | None) -> None:
    """No capabilities, none to be had by running another program, and nobody may look into this process.

    Args:
        user: who to become; None: stay who one is.
    """
    for capability in range(64):
        _libc.prctl(DROP_BOUNDING, capability, 0, 0, 0)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION_3, 0)
    _call(_libc.capset, header, (ctypes.c_uint32 * 6)())
    _call(_libc.prctl, NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call(_libc.prctl, DUMPABLE, 0, 0, 0, 0)


class Program:
    """The judged code in a process of its own.

    Args:
        folders: that it may read, and the last one write, under audit; none in namespaces, where no others are there.
    """

    def __init__(self, interpreter: str, folders: tuple[str, ...]) -> None:
        home = str(Path.cwd())
        self._process = subprocess.Popen(
            [interpreter, "-s", "-P", "-S", "-u", "-c", PROGRAM_TEXT, *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=home,
            env={**os.environ, "HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin", **SETTLED},
        )
        assert self._process.stdin and self._process.stdout
        self._requests, self._replies = self._process.stdin, self._process.stdout

    def ask(self, request: dict[str, object]) -> dict[str, Any]:
        """Send a request, wait for the reply.

        Raises:
            Lost: there is none.
        """
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
            line = self._replies.readline(MOST_SENT)
        except BrokenPipeError:
            line = b""
        if len(line) == MOST_SENT:
            raise Lost(f"an answer of the program has more than {MOST_SENT >> 20} MiB")
        if not line.endswith(b"\n"):
            raise Lost(self._ended())
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise Lost(GARBLED)
        return reply

    def call(self, name: str, arguments: tuple[object, ...], named: dict[str, object]) -> object:
        """What the program's function returns; what it raises is raised here, as the nearest built-in exception."""
        sent = {each: encode(value) for each, value in named.items()}
        reply = self.ask({"call": name, "arguments": [encode(each) for each in arguments], "named": sent})
        if "raised" in reply:
            raise raised(reply)
        try:
            return decode(reply["value"])
        except (KeyError, TypeError, ValueError, RecursionError):
            raise Lost(GARBLED) from None

    def _ended(self) -> str:
        self._replies.close()
        status = self._process.wait()
        used, most = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrlimit(resource.RLIMIT_CPU)[0]
        spent = used.ru_utime + used.ru_stime > 0.9 * most  # the kernel counts in ticks
        if status == -signal.SIGXCPU or (status == -signal.SIGKILL and spent):  # killed: it ignored the former
            raise TimeoutError("the program used up its processor time")
        how = f"by signal {-status}" if status < 0 else f"with exit status {status}"
        return f"the program ended {how} before its tests were over"


def raised(reply: dict[str, Any]) -> BaseException:
    """The exception that the program tells of."""
    kind = getattr(builtins, str(reply["raised"]), None)
    text = f"{reply.get('kind')}: {reply.get('text')}"[:REASON]
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, _NEVER_RAISED):
        return RuntimeError(text)  # SystemExit and its like must not end the judge
    made = kind(text)
    made.from_program = True  # type: ignore[attr-defined]
    return made


def judge(job: dict[str, Any], program: Program) -> tuple[str, str]:
    """Run the program, then the tests on its functions; the verdict and its reason."""
    try:
        reply = program.ask({"program": job["program"]})
        if "raised" in reply:
            return (
                "memory" if reply["raised"] == "MemoryError" else "failed"
            ), f"{reply.get('kind')}: {reply.get('text')}"
        exec(compile(job["tests"], "<tests>", "exec"), _names(reply, program))
    except Lost as lost:
        return "crashed", str(lost)
    except TimeoutError as error:
        return ("failed" if hasattr(error, "from_program") else "timeout"), str(error)
    except MemoryError as error:
        return "memory", str(error) or "the tests ran out of memory"
    except BaseException as error:
        return "failed", _reason(error, job["tests"])
    return "passed", ""


def _names(reply: dict[str, Any], program: Program) -> dict[str, object]:
    """What tests see of a program: its functions, as calls to it, and its plain values; no builtin is replaced."""

    def calling(name: str) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            return program.call(name, arguments, named)

        call.__name__ = call.__qualname__ = name
        return call

    try:
        names: dict[str, object] = {name: decode(value) for name, value in reply["values"].items()}
        names.update({name: calling(name) for name in reply["functions"]})
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise Lost(GARBLED) from None
    return {"__name__": "tests"} | {name: value for name, value in names.items() if not hasattr(builtins, name)}


def _reason(error: BaseException, tests: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>"]
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError) or not lines or not lines[-1]:
        return text
    return f"{text}, at: {tests.splitlines()[lines[-1] - 1].strip()}"


def supervise(job: dict[str, Any], isolation: str) -> dict[str, object]:
    """Fork the judge, wait for its verdict as long as it may take, and end all that is left of it."""
    began, own_user = time.monotonic(), OWN_USERS + os.getpid()  # the judge does not see this number
    reading, writing = os.pipe()
    judge_id = os.fork()
    if judge_id == 0:
        os.close(reading)
        _be_judge(job, isolation, writing, own_user)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], job["limits"]["seconds"])
        told = os.fdopen(reading, "rb").read(1 << 16) if ready else b""
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows is what a stop would do
        _end_all(judge_id)
    seconds = time.monotonic() - began
    if not ready:
        return {"status": "timeout", "reason": f"not done after {job['limits']['seconds']} s", "seconds": seconds}
    if not told:
        return {"status": "crashed", "reason": "the tests ended before they were over", "seconds": seconds}
    status, reason = json.loads(told)
    return {"status": status, "reason": reason, "seconds": seconds}


def _be_judge(job: dict[str, Any], isolation: str, verdicts: int, own_user: int) -> None:
    """Judge, write the verdict, and leave; does not return."""
    try:
        _libc.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(2, 1)  # what tests print belongs to the output
        limit(job["limits"])
        inside = isolation == "namespaces"
        as_root = os.geteuid() == 0
        give_up_privileges(own_user if inside and as_root else None)
        if inside:
            processes = job["limits"]["processes"] + (1 if as_root else 2)  # this one, and its user's supervisor
            resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
        folders = () if inside else (job["interpreter_folder"], *SYSTEM, str(Path.cwd()))
        verdict = judge(job, Program(job["interpreter"], folders))
    except BaseException as error:
        verdict = ("broken", f"{type(error).__name__}: {error}")
    os.write(verdicts, json.dumps([verdict[0], verdict[1][:REASON]]).encode())
    os._exit(0)


def _end_all(judge_id: int) -> None:
    """Kill the judge and everything that descends from it.

    In a process namespace the kernel does that when the judge, its process 1, ends. Elsewhere orphans become children
    of this process (a subreaper), which goes on until it has none.
    """
    os.kill(judge_id, signal.SIGKILL)
    os.waitpid(judge_id, 0)
    own = Path(f"/proc/self/task/{os.getpid()}/children")
    try:
        while True:
            for child in own.read_text().split() if own.exists() else []:
                os.kill(int(child), signal.SIGKILL)
            os.waitpid(-1, 0)
    except ChildProcessError:
        return


def _stop(number: int, frame: object) -> None:
    raise Stopped


def main() -> None:
    """Do the job on standard input, under the isolation that it names."""
    signal.signal(signal.SIGTERM, _stop)
    _libc.prctl(DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
    job = json.load(sys.stdin)
    isolation = job["isolation"]
    try:
        if isolation == "namespaces":
            enter_namespaces(str(Path.cwd()), job["interpreter_folder"], job["limits"]["disk"])
        else:
            _call(_libc.prctl, SUBREAPER, 1, 0, 0, 0)
        outcome = supervise(job, isolation)
    except (OSError, AttributeError) as error:  # the latter: a C library without a call
        outcome = {"status": "broken", "reason": str(error), "seconds": 0.0}
    except Stopped:
        outcome = {"status": "crashed", "reason": "stopped", "seconds": 0.0}
    sys.stdout.write(json.dumps(outcome))


if __name__ == "__main__":
    PROGRAM_TEXT = PROGRAM.read_text(encoding="utf-8")
    _codec = runpy.run_path(str(PROGRAM))
    encode, decode = _codec["encode"], _codec["decode"]
    main()
