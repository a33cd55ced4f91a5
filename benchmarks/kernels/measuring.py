"""How kernels are timed, and what a machine could do at best: the speed of copying and of a matrix product."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Work = Callable[[], object]
# Threads, which of `interleaved_seconds`, its unit.
CPU_CLOCKS = ((1, 1, "ms of processor on one thread"), (2, 0, "ms on two threads"))
_COPIED = 1 << 30  # bytes
_PRODUCT = 8192  # of the square matrices whose product tells a GPU's rate


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device does at most, measured in the same run.

    Args:
        bandwidth: bytes a second, read and written, of copying.
        rate: floating-point operations a second of a bfloat16 matrix product.
    """

    bandwidth: float
    rate: float


def gpu_ceilings(repeats: int) -> Ceilings:
    """Of the current CUDA device: copying 1 GiB, and a product of two matrices 8192 × 8192.

    What copies is a kernel, which negates, as in a graph `copy_` becomes a node that is a third slower on an H200.
    """
    source = torch.ones(_COPIED // 4, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * _COPIED / graph_seconds([lambda: torch.neg(source, out=target)], repeats)
    left, right = (torch.randn(_PRODUCT, _PRODUCT, device="cuda").bfloat16() for _ in range(2))
    return Ceilings(bandwidth, 2 * _PRODUCT**3 / graph_seconds([lambda: left @ right], repeats))


def require_equal(found: Tensor, expected: Tensor, what: str, tolerance: float = 2**-6) -> None:
    """End a benchmark where a result is wrong: the largest difference, in units of the largest number expected."""
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    if not error < tolerance:
        raise SystemExit(f"{what}: results differ by {error:.2g}; the comparison means nothing")


def processor_seconds(work: Work, repeats: int) -> float:
    """Median of the processor's seconds (all threads), after one run that does not count."""
    return _median(work, repeats, time.process_time)


def wall_seconds(work: Work, repeats: int) -> float:
    """Median seconds on the clock, after one run that does not count."""
    return _median(work, repeats, time.perf_counter)


def interleaved_seconds(works: Mapping[str, Work], repeats: int, calls: int = 1) -> dict[str, tuple[float, float]]:
    """Median seconds of a call of each on the clock, and of the processor (all threads): in turn, after one of each.

    What else the machine does then slows all of them down alike.

    Args:
        works: what is measured.
        repeats: turns of each.
        calls: in a turn. A call of a millisecond is shorter than the kernel takes to count what other threads have
            used, and runs beside threads that another work has left spinning.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter(), time.process_time()
            for _ in range(calls):
                work()
            took = time.perf_counter() - began[0], time.process_time() - began[1]
            if repeat:
                found[name].append((took[0] / calls, took[1] / calls))
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in found.items()}


def _median(work: Work, repeats: int, now: Callable[[], float]) -> float:
    work()
    found = []
    for _ in range(repeats):
        began = now()
        work()
        found.append(now() - began)
    return statistics.median(found)


def graph_seconds(work: Sequence[Work], repeats: int) -> float:
    """Median seconds of one piece of `work`, all of which are run in turn within one CUDA graph.

    Launching takes longer than the work of small kernels; and what goes through more bytes than a cache holds before
    one comes again is measured as it is when it comes from memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for each in work[:2]:  # kernels are compiled before a graph is captured
            each()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in work:
            each()
    graph.replay()
    return event_seconds(graph.replay, repeats) / len(work)


def event_seconds(work: Work, repeats: int, warm: int = 3) -> float:
    """Median seconds between CUDA events around `work`, launches included: for what no graph can capture."""
    for _ in range(warm):
        work()
    found = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)


def gpu_peak_bytes(work: Work) -> int:
    """The most memory that `work` takes on top of what is allocated before it, after one run that does not count."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
