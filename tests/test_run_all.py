"""The run over all kernels tells right from wrong, and outlives what hangs."""

import os
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.kernels import run_all
from benchmarks.kernels.run_all import Kernel, Run, judge, main, missed, names, table, verdict


@pytest.fixture
def run(tmp_path: Path) -> Run:
    for folder in ("logs", "out"):
        (tmp_path / folder).mkdir()
    return Run("cpu", tmp_path / "logs", tmp_path / "out", time.monotonic() + 60)


@pytest.mark.parametrize(
    ("test", "said", "failed"),
    [
        ("def test_a(): pass\ndef test_b(): pass", "correct, 2 tests", False),
        ("def test_a(): pass\ndef test_b(): assert False", "WRONG: 1 of 2 tests", True),
        ("import pytest\n@pytest.fixture\ndef a(): 1 / 0\ndef test_a(a): pass", "WRONG: 1 of 1 tests", True),
        ("import pytest\ndef test_a(): pytest.skip()", "NOT TRIED: all tests skipped", True),
        ("import nothing_of_that_name", "NOT TRIED: pytest ended with 2", True),
        ("", "no tests", False),
    ],
)
def test_nothing_but_tests_that_passed_makes_a_kernel_right(
    test: str, said: str, failed: bool, run: Run, tmp_path: Path
) -> None:
    file, report = tmp_path / "test_it.py", tmp_path / "report.xml"
    file.write_text(test)
    code = run.python(["-m", "pytest", "--noconftest", "-c", os.devnull, str(file), f"--junitxml={report}"], "it", 60)
    assert verdict(code, report) == (said, failed)
    assert verdict(None, report) == ("NOT TRIED: no time", True)
    assert verdict(-11, report)[1]


def test_what_hangs_is_ended_with_all_that_it_started_and_what_it_printed_is_kept(run: Run) -> None:
    program = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
time.sleep(600)
"""
    assert run.python(["-c", program], "hang", 3) is None
    child = int(run.tail("hang").split("|")[1])
    deadline = time.monotonic() + 20
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
    assert run.python(["-c", "import sys; sys.exit(3)"], "end", 60) == 3


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    try:
        return "State:\tZ" not in status.read_text()  # a zombie has ended, and waits for whoever inherited it
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_is_kept_is_two_files_of_results_and_logs(run: Run, tmp_path: Path) -> None:
    run.python(["-c", "print(1)"], "one", 60)
    (tmp_path / "one.cpu.json").write_text("{}")
    run.written.append(tmp_path / "one.cpu.json")
    run.keep("summary")
    assert sorted(path.name for path in run.out.iterdir()) == ["kernels.tar.gz", "kernels.txt"]
    with tarfile.open(run.out / "kernels.tar.gz") as archive:
        assert archive.getnames() == ["one.cpu.json", "one.log"]


def test_the_table_counts_goals_and_tells_the_nearest_to_a_ceiling() -> None:
    row = {"claim": "c", "ours": 1.0, "peer": 2.0, "unit": "GB/s", "ratio": 0.5, "goal": 0.8, "better": "higher"}
    rows = [row | {"peer_name": "copying on the device", "met": False}, row | {"peer_name": "PyTorch", "met": True}]
    lines = table([Kernel("a", "correct, 1 tests", "measured", rows=rows), Kernel("b", benchmark="SKIPPED: no time")])
    assert [" ".join(line.split()) for line in lines.splitlines()[1:]] == [
        "a correct, 1 tests measured 1 of 2 50% to 50% 0 + 0",
        "b no tests SKIPPED: no time 0 + 0",
    ]
    assert missed([Kernel("a", rows=rows)]).startswith("✗ c: 1 against 2 GB/s (copying on the device)")


def test_every_benchmark_is_found_and_an_unknown_name_is_refused() -> None:
    assert {"codebook", "cross_entropy", "ternary"} <= set(names(()))
    assert not {"measuring", "one", "packed", "picture", "run_all"} & set(names(()))
    assert names(["ternary", "codebook", "ternary"]) == ["ternary", "codebook"]
    with pytest.raises(SystemExit, match="There is no terniary"):
        names(["terniary"])


def test_without_pytest_the_benchmarks_alone_judge(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_all, "find_spec", lambda name: None)
    kernel = Kernel("ternary")
    judge([kernel], run)
    assert (kernel.tests, kernel.failed) == ("no pytest: by the benchmark alone", False)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--minutes", "nan"], "invalid minutes value"),
        (["--minutes", "-5"], "invalid minutes value"),
        (["--out", "/dev/null/out"], "cannot be a folder"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(
    options: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run_all", *options])
    with pytest.raises(SystemExit):
        main()
    assert told in capsys.readouterr().err
