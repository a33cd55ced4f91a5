"""All kernels on this machine, in minutes: first whether they are right, then how fast they are.

    python -m benchmarks.kernels.run_all [--minutes 8] [--only NAME ...] [--sweep] [--out FOLDER]

Needs torch, triton and numpy; transformers, peft and liger-kernel are compared with where they are installed. With
pytest the tests judge the kernels first: on a GPU those that need one, as kernels run there; without one every test, in
Triton's interpreter. Without pytest benchmarks alone do, which compare every result before they time it. All tests run
at once, as they wait for compilers more than for the device; benchmarks are measured one after the other, in processes
of their own, and what one has written is kept whatever becomes of the next. What there is no time for is named. Ends
with 1 if a kernel is wrong or could not be tried.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.kernels.one import benchmarks
from benchmarks.kernels.picture import IMAGES, is_share
from benchmarks.results_file import path_of

ROOT = Path(__file__).parents[2]
TESTS, BENCHMARKS = ROOT / "tests" / "kernels", ROOT / "benchmarks" / "kernels"
TESTS_SHARE = 0.5  # of the time, at most
LONGEST, SHORTEST = 120.0, 15.0  # seconds that a GPU's benchmark may take, and those without which none is begun
NO_PYTEST = "no pytest: by the benchmark alone"
TAIL = 25  # lines of a log that are shown where something went wrong


@dataclass
class Kernel:
    """What has become of one.

    Args:
        name: of its test's and its benchmark's file.
        tests: "correct, 3 tests", or what is wrong.
        benchmark: "measured", or why it is not.
        failed: whether something went wrong.
        rows: of its results file.
        seconds: that tests and benchmark took.
    """

    name: str
    tests: str = "no tests"
    benchmark: str = "none"
    failed: bool = False
    rows: Sequence[Mapping[str, Any]] = ()
    seconds: tuple[float, float] = (0.0, 0.0)


@dataclass
class Run:
    """One run on one device.

    Args:
        device: its name, or "cpu".
        logs: the folder of what processes print.
        out: a folder, which results, pictures and logs are copied to.
        deadline: on `time.monotonic`.
    """

    device: str
    logs: Path
    out: Path | None
    deadline: float
    written: list[Path] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def python(self, arguments: Sequence[str], log: str, limit: float, **environment: str) -> int | None:
        """The exit code of `python ARGUMENTS`; None if it was ended, and all that it started, after `limit` seconds."""
        with (self.logs / f"{log}.log").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(max(limit, 0.0))
            except subprocess.TimeoutExpired:
                return None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def tail(self, log: str) -> str:
        """The end of what a process printed, indented."""
        lines = (self.logs / f"{log}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        return "\n".join(f"    | {line}" for line in lines)

    def keep(self, summary: str) -> None:
        """Copy what there is so far: two files, whatever the number of kernels."""
        if self.out is None:
            return
        (self.out / "kernels.txt").write_text(summary + "\n", encoding="utf-8")
        with tarfile.open(self.out / "kernels.tar.gz", "w:gz") as archive:
            for path in [*self.written, *sorted(self.logs.glob("*.log"))]:
                archive.add(path, path.name)


def names(only: Sequence[str]) -> list[str]:
    """Whatever has tests or a benchmark; in the order of `only`, if that is given.

    Raises:
        SystemExit: `only` names what there is not.
    """
    tested = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")}
    found = sorted(tested.union(benchmarks()))
    if unknown := sorted(set(only) - set(found)):
        raise SystemExit(f"There is no {', '.join(unknown)}; there are {', '.join(found)}.")
    return list(dict.fromkeys(only)) or found


def judge(kernels: Sequence[Kernel], run: Run) -> None:
    """Let every kernel's tests say whether it is right; without pytest, that is left to the benchmarks."""
    if find_spec("pytest") is None:
        for kernel in kernels:
            kernel.tests = NO_PYTEST
        return
    processors = os.cpu_count() or 1
    workers = max(min(len(kernels), processors - 1), 1)
    deadline = time.monotonic() + TESTS_SHARE * run.left
    marks = "not gpu and not slow" if run.device == "cpu" else "gpu"

    def one(kernel: Kernel) -> None:
        began = time.monotonic()
        test, report = TESTS / f"test_{kernel.name}.py", run.logs / f"{kernel.name}.xml"
        if not test.is_file():
            return
        arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-m", marks, str(test)]
        arguments += [f"--junitxml={report}"]
        threads = str(max(processors // workers, 1))
        code = run.python(arguments, f"{kernel.name}.tests", deadline - began, OMP_NUM_THREADS=threads)
        kernel.tests, kernel.failed = verdict(code, report)
        kernel.seconds = (time.monotonic() - began, 0.0)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, kernels))


def verdict(code: int | None, report: Path) -> tuple[str, bool]:
    """What pytest's exit code and report come to, and whether that is a failure. Nothing but passed tests is right."""
    if code is None:
        return "NOT TRIED: no time", True
    if code == 5:
        return "no tests", False
    if code not in (0, 1) or not report.is_file():
        return f"NOT TRIED: pytest ended with {code}", True
    counts = ElementTree.parse(report).getroot().find("testsuite")
    assert counts is not None
    ran, skipped, wrong = (int(counts.get(name, 0)) for name in ("tests", "skipped", "failures"))
    wrong += int(counts.get("errors", 0))
    if code or wrong:
        return f"WRONG: {wrong} of {ran - skipped} tests", True
    if ran == skipped:
        return "NOT TRIED: all tests skipped", True
    return f"correct, {ran - skipped} tests", False


def measure(kernel: Kernel, ceilings: Sequence[float], sweep: bool, run: Run) -> None:
    """Run its benchmark, unless there is none or no time."""
    source = BENCHMARKS / f"{kernel.name}.py"
    if not source.is_file():
        return
    if run.device == "cpu" and "\ndef on_cpu(" not in source.read_text(encoding="utf-8"):
        kernel.benchmark = "of a GPU only"
        return
    if run.left < SHORTEST:
        kernel.benchmark = "SKIPPED: no time"
        return
    results, began, day = path_of(kernel.name, run.device), time.monotonic(), time.time()
    arguments = ["-m", "benchmarks.kernels.one", kernel.name, *(["--sweep"] if sweep else [])]
    if ceilings:
        arguments += ["--ceilings", *map(repr, ceilings)]
    limit = run.left if run.device == "cpu" else min(LONGEST, run.left)
    code = run.python(arguments, kernel.name, limit)
    kernel.seconds = (kernel.seconds[0], time.monotonic() - began)
    if results.is_file() and results.stat().st_mtime >= day - 1:
        kernel.rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
        pictures = [path for path in [IMAGES / f"{results.stem}.svg"] if path.is_file()]
        run.written += [results, *pictures]
    kernel.benchmark = "measured" if code == 0 else f"STOPPED after {limit:.0f} s" if code is None else "FAILED"
    kernel.failed = kernel.failed or code != 0


def measured_ceilings(run: Run) -> tuple[float, ...]:
    """Bandwidth and rate of the GPU; nothing without one.

    Raises:
        SystemExit: they cannot be measured.
    """
    if run.device == "cpu":
        return ()
    program = "from benchmarks.kernels.measuring import *; c = gpu_ceilings(9); print(c.bandwidth, c.rate)"
    if run.python(["-c", program], "ceilings", 90) != 0:
        raise SystemExit(f"{run.device} does not even copy and multiply:\n{run.tail('ceilings')}")
    bandwidth, rate = map(float, (run.logs / "ceilings.log").read_text(encoding="utf-8").split()[-2:])
    print(f"{run.device} copies {bandwidth / 1e12:.3g} TB/s and multiplies {rate / 1e12:.4g} TFLOP/s in bfloat16")
    return bandwidth, rate


def table(kernels: Sequence[Kernel]) -> str:
    """A line a kernel."""
    lines = [("kernel", "tests", "benchmark", "goals met", "of the roofline", "seconds")]
    for kernel in kernels:
        shares = sorted(row["ratio"] for row in kernel.rows if is_share(row))
        lines.append(
            (
                kernel.name,
                kernel.tests,
                kernel.benchmark,
                f"{sum(row['met'] for row in kernel.rows)} of {len(kernel.rows)}" if kernel.rows else "",
                f"{shares[0]:.0%} to {shares[-1]:.0%}" if shares else "",
                f"{kernel.seconds[0]:.0f} + {kernel.seconds[1]:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def missed(kernels: Sequence[Kernel]) -> str:
    """A line for each goal that was missed."""
    return "\n".join(
        f"✗ {row['claim']}: {row['ours']:,.4g} against {row['peer']:,.4g} {row['unit']} ({row['peer_name']}), "
        f"ratio {row['ratio']:.3f}, goal {'≥' if row['better'] == 'higher' else '≤'} {row['goal']:g}"
        for kernel in kernels
        for row in kernel.rows
        if not row["met"]
    )


def all_kernels(kernels: Sequence[Kernel], sweep: bool, run: Run) -> None:
    """Judge and measure them, telling how it goes."""
    ceilings = measured_ceilings(run)
    judge(kernels, run)
    for kernel in kernels:
        print(f"{kernel.name}: {kernel.tests}, {kernel.seconds[0]:.0f} s")
        if kernel.failed:
            print(run.tail(f"{kernel.name}.tests"))
    for kernel in kernels:
        measure(kernel, ceilings, sweep, run)
        if kernel.benchmark in ("none", "of a GPU only"):
            continue
        print(f"{kernel.name}: {kernel.benchmark}, {kernel.seconds[1]:.0f} s")
        if (sweep or kernel.benchmark != "measured") and (run.logs / f"{kernel.name}.log").is_file():
            print(run.tail(kernel.name))
        run.keep(table(kernels))


def minutes(text: str) -> float:
    """Of an option: positive, and not for ever."""
    if not 0 < (number := float(text)) < inf:
        raise ValueError
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=minutes, default=8.0, help="what has not begun by then is skipped")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="these kernels, in this order")
    parser.add_argument("--sweep", action="store_true", help="also try other numbers for the kernels' launches")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results, pictures and logs are copied, too")
    options = parser.parse_args()
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out: {options.out} cannot be a folder: {error.strerror}")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    kernels = [Kernel(name) for name in names(options.only)]
    with TemporaryDirectory(prefix="kernels-") as logs:
        run = Run(device, Path(logs), options.out, time.monotonic() + 60 * options.minutes)
        all_kernels(kernels, options.sweep, run)
        untried = "no tests", NO_PYTEST
        kernels = [kernel for kernel in kernels if kernel.tests not in untried or kernel.benchmark != "none"]
        summary = "\n\n".join(filter(None, [missed(kernels), table(kernels)]))
        run.keep(summary)
    print(f"\n{summary}")
    return int(any(kernel.failed for kernel in kernels))


if __name__ == "__main__":
    sys.exit(main())
