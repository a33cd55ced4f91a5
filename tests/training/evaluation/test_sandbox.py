"""Programs that mean ill, or only do it: each is stopped, is not taken for right, and leaves nothing behind."""

import ctypes
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from infra.errors import InvalidInput
from training.evaluation import sandbox
from training.evaluation.jailed_program import decode, encode
from training.evaluation.sandbox import Isolation, Limits, Verdict, judge_program, judge_programs, strongest_isolation

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

LIMITS = Limits(seconds=60, cpu_seconds=2, memory=256 << 20)
TESTS = "assert double(4) == 8\nassert double('ab') == 'abab'"
RIGHT = "def double(x):\n    return 2 * x\n"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process (orphans come to us) and no folder outlives a verdict."""
    subreaper = 36
    ctypes.CDLL(None).prctl(subreaper, 1, 0, 0, 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(psutil.Process().children(recursive=True))
    yield
    ctypes.CDLL(None).prctl(subreaper, 0, 0, 0, 0)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert list(tmp_path.glob("regraft-sandbox-*")) == []


@pytest.fixture(params=["namespaces", "audit"])
def isolation(request: pytest.FixtureRequest) -> Isolation:
    if request.param == "namespaces" and strongest_isolation() != "namespaces":
        pytest.skip("this machine allows no namespaces")
    return request.param


def judged(program: str, isolation: Isolation, tests: str = TESTS, limits: Limits = LIMITS) -> Verdict:
    return judge_program(program, tests, limits, isolation)


def test_a_right_program_passes_and_a_wrong_one_fails_with_the_test_that_it_failed(isolation: Isolation) -> None:
    right = judged(RIGHT, isolation)
    assert (right.status, right.reason, right.isolation) == ("passed", "", isolation)
    wrong = judged("def double(x): return x + x if x != 4 else 9", isolation)
    assert wrong.status == "failed"
    assert wrong.reason.endswith("at: assert double(4) == 8")


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("import os; os._exit(0)", "crashed"),
        ("import sys; sys.exit()", "failed"),
        ("raise SystemExit(0)", "failed"),
        ("def double(x):\n    import os; os._exit(0)", "crashed"),
        ("def double(x):\n    raise SystemExit(0)", "failed"),
        ("def double(x):\n    raise KeyboardInterrupt", "failed"),
        ("import atexit, os; atexit.register(os._exit, 0)\ndef double(x): exit()", "failed"),
        ("class Always:\n    def __eq__(self, other): return True\ndef double(x): return Always()", "failed"),
        ("class Always(int):\n    def __eq__(self, other): return True\ndef double(x): return Always(3)", "failed"),
        ("import builtins; builtins.AssertionError = type('Fine', (BaseException,), {})\ndef double(x): 0", "failed"),
        ("def double(x):\n    import sys; sys.settrace(lambda *a: None); return None", "failed"),
        ('import os, json\ndef double(x): [os.write(fd, b\'["passed", ""]\') for fd in (1, 2)]', "failed"),
        (
            'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'["passed", ""]\\n\')\n    except OSError: 0',
            "crashed",
        ),
        ("def hasattr(*a): return False\ndef exec(*a): 0\ndef double(x): return 3", "failed"),
        ("double = 3", "failed"),
        ("def double(x): return 2 *", "failed"),
        ("", "failed"),
    ],
)
def test_what_gets_around_its_tests_does_not_pass(program: str, status: str, isolation: Isolation) -> None:
    verdict = judged(program, isolation)
    assert verdict.status == status, verdict


def test_a_program_cannot_replace_what_its_tests_are_written_with(isolation: Isolation) -> None:
    program = "def all(items): return True\ndef isinstance(*a): return True\ndef double(x): return 'wrong'"
    tests = "assert all(double(n) == 2 * n for n in range(3))"
    assert judged(program, isolation, tests).status == "failed"
    assert judged(program, isolation, "assert isinstance(double(1), int)").status == "failed"


@pytest.mark.parametrize(
    "tests",
    [
        "for n, wanted in zip([2, 3], map(double, [2, 3])):\n    assert wanted == 2 * n",
        "for found in map(double, [1, 2]):\n    assert found in (2, 4)",
        "assert list(map(double, [1, 2])) != [3, 3]",
    ],
)
def test_a_program_cannot_end_the_loops_of_its_tests(tests: str, isolation: Isolation) -> None:
    assert judged(RIGHT, isolation, tests).passed
    assert judged("def double(x): raise StopIteration", isolation, tests).status == "failed"


@pytest.mark.parametrize("answer", [{"status": "passed"}, {"values": 3, "functions": []}, {"values": {}}])
def test_what_a_program_writes_in_place_of_its_first_answer_is_no_answer(
    answer: dict[str, object], isolation: Isolation
) -> None:
    program = f"import os\nfor n in range(1, 20):\n    try: os.write(n, {json.dumps(answer).encode()!r} + b'\\n')\n"
    verdict = judged(program + "    except OSError: 0\nos._exit(0)", isolation)
    assert (verdict.status, verdict.reason) == (
        "crashed",
        "the program wrote something else than answers into its pipe",
    )


def test_a_program_finds_neither_its_tests_nor_the_verdict_in_its_memory(isolation: Isolation) -> None:
    """Everything that its interpreter holds is searched for the secret that is in the tests."""
    program = """
import gc, sys
def found(half):
    secret = half[::-1] + 'ly'
    try:
        held = [each for each in gc.get_objects() if type(each) in (dict, list, tuple)]
    except PermissionError:
        held = [vars(module) for module in sys.modules.values()]
    return any(secret in repr(each) for each in held)
"""
    verdict = judged(program, isolation, "assert found('suordnow') is False, 'wondrously'")
    assert verdict.passed, verdict


def test_an_endless_loop_ends(isolation: Isolation) -> None:
    spinning = judged("def double(x):\n    while True: pass", isolation, limits=Limits(seconds=60, cpu_seconds=1))
    assert (spinning.status, spinning.reason) == ("timeout", "the program used up its processor time")
    sleeping = judged("import time; time.sleep(3600)", isolation, limits=Limits(seconds=1.5))
    assert (sleeping.status, sleeping.reason) == ("timeout", "not done after 1.5 s")
    stubborn = (
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: 0\n"
    )
    assert judged(stubborn + "while True: pass", isolation, limits=Limits(60, 1)).status == "timeout"
    assert judged(RIGHT, isolation, "while True: pass", Limits(1.5)).status in ("timeout", "crashed")


def test_a_fork_bomb_is_bounded_and_ends(isolation: Isolation) -> None:
    bomb = """
import os, time
def forked():
    for number in range(40):
        try:
            if os.fork() == 0:
                time.sleep(600)
        except OSError:
            break
    return number
"""
    tests = f"assert 1 < forked() < {LIMITS.processes}" if isolation == "namespaces" else "assert forked() == 0"
    verdict = judged(bomb, isolation, tests)
    assert verdict.passed, verdict
    endless = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert judged(endless, isolation, limits=Limits(3, 1)).status == "timeout"
    threads = "import threading, time\nfor n in range(99): threading.Thread(target=time.sleep, args=(60,)).start()"
    assert not judged(threads, isolation, limits=Limits(5)).passed


def test_ten_threads_are_no_bomb() -> None:
    if strongest_isolation() != "namespaces":
        pytest.skip("without namespaces there is but the program, unless it is root's")
    program = (
        "import threading, time\ndef started(n):\n    all = [threading.Thread(target=time.sleep, args=(0.5,)) for _ in "
        "range(n)]\n    for each in all: each.start()\n    return threading.active_count()"
    )
    verdict = judge_program(program, "assert started(10) == 11", Limits(seconds=60))
    assert verdict.passed, verdict


def test_a_daemon_does_not_outlive_its_program() -> None:
    """Left in a session of its own, as a daemon is; the fixture sees to it that it is gone."""
    daemon = "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(600)\n os._exit(0)\n"
    if strongest_isolation() != "namespaces":
        pytest.skip("under audit nothing is forked")
    assert judged(daemon + RIGHT, "namespaces").passed


def test_eating_memory_ends_in_a_memory_error(isolation: Isolation) -> None:
    assert judged("x = bytearray(10**9)", isolation).status == "memory"
    assert (
        judged("def double(x):\n    hoard = []\n    while True: hoard.append(' ' * 10**6)", isolation).status
        == "memory"
    )
    assert judged(RIGHT, isolation, "x = [0] * 10**9").status == "memory"


def test_a_flood_of_output_is_cut(isolation: Isolation) -> None:
    verdict = judged("while True: print('x' * 1000)", isolation)
    assert verdict.status == "output"
    assert len(verdict.output) == LIMITS.output
    some = judged("print('hello')\n" + RIGHT, isolation)
    assert some.passed
    assert some.output == "hello\n"
    assert judged("def double(x): return 'x' * 10**7", isolation).status == "crashed"


def test_there_is_no_network(isolation: Isolation) -> None:
    """A real server of this machine is knocked at, and hears nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for attempt in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)",
            f"import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=5)",
            f"import _socket; _socket.socket(2, 1).connect(('127.0.0.1', {port}))",
        ):
            verdict = judged(attempt, isolation, "")
            assert verdict.status == "failed", verdict
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_outside_its_directory_is_written_or_removed(isolation: Isolation, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("untouched")
    mine.chmod(0o666)
    tmp_path.chmod(0o777)
    for attempt in (
        f"open({str(mine)!r}, 'w').write('x')",
        f"open({str(mine)!r}, 'a').write('x')",
        f"import os; os.write(os.open({str(mine)!r}, os.O_RDWR), b'x')",
        f"import os; os.remove({str(mine)!r})",
        f"import os; os.rename({str(mine)!r}, 'here')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.chmod({str(mine)!r}, 0)",
        f"import os; os.symlink({str(mine)!r}, 'link'); open('link', 'w').write('x')",
        f"import pathlib; pathlib.Path({str(tmp_path / 'new')!r}).touch()",
        "open('/usr/regraft', 'w')",
        "import encodings; open(encodings.__file__, 'a').write('#')",
    ):
        verdict = judged(attempt, isolation, "")
        assert verdict.status == "failed", (attempt, verdict)
    assert mine.read_text() == "untouched"
    assert sorted(tmp_path.iterdir()) == [mine]


def test_its_own_directory_is_its_own_and_bounded(isolation: Isolation) -> None:
    program = """
import os, shutil, tempfile
open('kept', 'w').write('yes')
def double(x):
    with tempfile.TemporaryDirectory() as other: pass
    os.mkdir('d', 0o700); open('d/f', 'w').close(); os.remove('d/f'); os.rmdir('d')
    return open(os.path.join(os.environ['HOME'], 'kept')).read()
"""
    assert judged(program, isolation, "assert double(1) == 'yes'").passed
    deleting = "import os, shutil\nhome = os.getcwd()\nshutil.rmtree(home, ignore_errors=True)\n" + RIGHT
    assert judged(deleting, isolation).status in ("passed", "failed")
    full = judged("open('big', 'wb').write(bytes(20 << 20))", isolation, limits=Limits(60, disk=1 << 20))
    assert full.status in ("failed", "crashed")


def test_secrets_of_this_process_cannot_be_read(isolation: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_TEST_SECRET", "tolstoy")
    program = f"""
import glob, os
def look():
    found = repr(dict(os.environ))
    for pid in ('self', '1', str(os.getppid()), '{os.getpid()}'):
        for name in ('environ', 'cmdline', 'fd/0', 'fd/1', 'mem'):
            try: found += open(f'/proc/{{pid}}/{{name}}', 'rb').read(10_000).decode(errors='replace')
            except (OSError, ValueError): pass
    return found
"""
    assert judged(program, isolation, "assert 'tolstoy' not in look()").passed
    own = judged(f"print(open({__file__!r}).read())", isolation, "")
    assert own.status == "failed"


def test_standard_input_is_empty(isolation: Isolation) -> None:
    assert "EOFError" in judged("input()", isolation).reason


def test_the_judge_can_be_neither_signalled_nor_traced(isolation: Isolation) -> None:
    killer = "import os\nfor pid in (1, os.getppid()):\n    try: os.kill(pid, 9)\n    except OSError: 0\n"
    verdict = judged(killer + "def double(x): return 0", isolation)
    assert verdict.status in ("failed", "crashed")
    tracer = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
attached = libc.ptrace(16, os.getppid(), 0, 0)
def double(x): return 2 * x if attached != 0 else None
"""
    assert judged(tracer, isolation).status == ("passed" if isolation == "namespaces" else "failed")


def test_no_privilege_is_left_or_to_be_had() -> None:
    if strongest_isolation() != "namespaces":
        pytest.skip("this machine allows no namespaces")
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def tries():
    done = [os.getuid() == 0, libc.mount(b'none', b'/work', b'tmpfs', 0, None) == 0, libc.chroot(b'/work') == 0]
    try: os.setuid(0); done.append(True)
    except OSError: pass
    return any(done)
"""
    assert judged(program, "namespaces", "assert tries() is False").passed


def test_values_and_exceptions_pass_between_program_and_tests(isolation: Isolation) -> None:
    program = """
import collections
LIMIT = 7
def same(*values, **named): return [*values, named]
def counted(text): return collections.Counter(text)
def fails(): raise IndexError('nothing there')
class Odd(ValueError): pass
def odd(): raise Odd('how odd')
def stuck(): raise TimeoutError('mine')
"""
    tests = """
import math
values = (1, -2**70, 1.5, math.inf, 2j, 'é\\ud800', b'x', None, True, [1, (2,)], {1: {2, 3}}, frozenset({4}))
assert same(*values, key=0) == [*values, {'key': 0}]
assert math.isnan(same(math.nan)[0]) and type(same((1,))[0]) is tuple
assert counted('aab') == {'a': 2, 'b': 1} and LIMIT == 7
for function, error in ((fails, IndexError), (odd, ValueError), (stuck, TimeoutError)):
    try: function()
    except error: pass
    else: assert False, error
try: same(lambda: 0)
except TypeError: pass
else: assert False
"""
    verdict = judged(program, isolation, tests)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    "value", [0, -(2**80), 0.1, float("inf"), 1j, "x", b"\0", None, True, [(1,)], {(1, 2): {3}}, set()]
)
def test_values_travel_unchanged(value: object) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_many_programs_are_judged_in_their_order() -> None:
    programs = [
        (f"import time; time.sleep({0.3 * (n % 2)})\ndef f(): return {n}", f"assert f() == {n - n % 3}")
        for n in range(6)
    ]
    seen: list[tuple[int, int]] = []
    verdicts = judge_programs(programs, LIMITS, workers=3, on_progress=lambda *done: seen.append(done))
    assert [verdict.passed for verdict in verdicts] == [n % 3 == 0 for n in range(6)]
    assert seen == [(n, 6) for n in range(1, 7)]


def test_programs_that_run_at_once_do_not_share_their_bounds(isolation: Isolation) -> None:
    """Each may have one process and a few threads more; together they are more than one of them may have."""
    allowed = Limits(seconds=60, processes=3)
    program = (
        "import threading, time\ndef f():\n t = threading.Thread(target=time.sleep, args=(1,)); t.start(); return 1"
    )
    if isolation == "audit":
        program = "import time\ndef f(): time.sleep(0.5); return 1"
    verdicts = judge_programs([(program, "assert f() == 1")] * 12, allowed, isolation, workers=12)
    assert [verdict.status for verdict in verdicts] == ["passed"] * 12, verdicts


def test_a_verdict_can_be_had_from_any_thread() -> None:
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.append(judge_program(RIGHT, TESTS, LIMITS)))
    thread.start()
    thread.join()
    assert found[0].passed


def test_an_isolation_that_is_not_to_be_had_is_an_error_not_a_weaker_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jail = tmp_path / "jail.py"  # one that finds no kernel to its liking
    text = sandbox.JAIL.read_text().replace("_call(_libc.unshare, ", "_call(_libc.unshare, -1 + 0 * ")
    jail.write_text(text)
    (tmp_path / "jailed_program.py").write_text(sandbox.JAIL.with_name("jailed_program.py").read_text())
    monkeypatch.setattr(sandbox, "JAIL", jail)
    with pytest.raises(InvalidInput, match=r"here: .Errno 22. unshare: Invalid argument"):
        judge_program(RIGHT, TESTS, isolation="namespaces")


def test_on_another_system_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InvalidInput, match="on Linux only; this is darwin"):
        judge_program(RIGHT, TESTS, isolation="audit")


def test_a_jail_whose_owner_is_killed_ends_itself(isolation: Isolation) -> None:
    """`kill -9` of the process that asks for a verdict, in the middle of it; the fixture sees to what is left."""
    owner = os.fork()
    if owner == 0:
        try:
            judge_program("import time; time.sleep(600)", "", Limits(seconds=600), isolation)
        finally:
            os._exit(0)
    child = psutil.Process(owner)
    _wait_until(lambda: any("untrusted half" in " ".join(each.cmdline()) for each in child.children(recursive=True)))
    family = child.children(recursive=True)
    child.kill()
    os.waitpid(owner, 0)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    for folder in Path(tempfile.gettempdir()).glob("regraft-sandbox-*"):
        folder.rmdir()  # empty, as nobody was left to remove it


def _wait_until(happened: Callable[[], bool]) -> None:
    while not happened():
        time.sleep(0.05)
