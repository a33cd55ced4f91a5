"""GOT-D's optimal transport: against POT's dense log-domain Sinkhorn, and on a million candidates.

    OMP_NUM_THREADS=1 nice python -m benchmarks.selection [--pool 1000000] [--target 2000] [--dense-pool 20000]

The dense peer gets its best case: told beforehand the fewest iterations after which its marginal error is within our
tolerance, it runs just those, in float64 (NumPy, its default) and in float32 (PyTorch). Its time takes in the cost
matrix, ours the check for rows that are not finite. Runs alternate, and medians are compared.

The million candidates are in a float16 file, which another process maps and solves, so that its peak of resident
memory is that of the whole job: Python, torch, the pages of the file, everything. It embeds nothing: the vectors are
ready.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ot
import torch
from torch import Tensor

from benchmarks.results_file import Row, write
from training.selection.gotd import choose
from training.selection.optimal_transport import solve

DIMENSIONS, DOMAINS, OF_TARGET, TOLERANCE = 384, 60, 5, 1e-3
CHUNK = 50_000


@dataclass(frozen=True)
class Mixture:
    """Unit vectors like those of a sentence encoder: domains of unequal weight, each spread in a few directions."""

    centres: Tensor  # (domains, d)
    directions: Tensor  # (domains, d, 40)

    @classmethod
    def drawn(cls) -> "Mixture":
        """One and the same each time."""
        generator = torch.Generator().manual_seed(0)
        shared = 0.7 * torch.randn(1, DIMENSIONS, generator=generator)
        centres = 0.8 * (torch.randn(DOMAINS, DIMENSIONS, generator=generator) + shared)
        return cls(centres, torch.randn(DOMAINS, DIMENSIONS, 40, generator=generator) / 40**0.5)

    def sample(self, domains: Tensor, generator: torch.Generator) -> Tensor:
        """One row for each domain number (rows, d)."""
        rows = self.centres[domains] + 0.5 * torch.randn(len(domains), DIMENSIONS, generator=generator)
        for domain in domains.unique():
            own = (domains == domain).nonzero()[:, 0]
            rows[own] += torch.randn(len(own), 40, generator=generator) @ self.directions[domain].T
        return torch.nn.functional.normalize(rows, dim=1)

    def target(self, rows: int) -> Tensor:
        """A few of the rarer domains, in equal parts (rows, d)."""
        generator = torch.Generator().manual_seed(1)
        return self.sample(torch.randint(20, 20 + OF_TARGET, (rows,), generator=generator), generator)

    def pool(self, rows: int, file: Path) -> None:
        """Write (rows, d) in float16, a chunk at a time."""
        stored = np.lib.format.open_memmap(file, "w+", np.float16, (rows, DIMENSIONS))
        generator = torch.Generator().manual_seed(2)
        weights = torch.arange(1, DOMAINS + 1) ** -0.7
        for begin in range(0, rows, CHUNK):
            domains = torch.multinomial(weights, min(CHUNK, rows - begin), True, generator=generator)
            stored[begin : begin + CHUNK] = self.sample(domains, generator).half().numpy()
        stored.flush()


def pot(target: Tensor, pool: Tensor, epsilon: float, iterations: int) -> tuple[Any, float]:
    """POT's log v and its marginal error on the target after some iterations, on arrays of whichever kind."""
    a, b = (torch.full((len(rows),), 1 / len(rows)).to(rows) for rows in (pool, target))
    arrays = [a, b, pool, target]
    if target.dtype == torch.float64:
        arrays = [each.numpy() for each in arrays]
    a, b, pool, target = arrays
    C = ot.dist(pool, target)
    plan, log = ot.bregman.sinkhorn_log(a, b, C, epsilon, numItermax=iterations, stopThr=0, log=True, warn=False)
    return log["log_u"], float(abs(plan.sum(0) - b).sum())


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, and the seconds by the clock and of the processor."""
    began = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - began[0], time.process_time() - began[1]


def against_pot(options: argparse.Namespace, scratch: Path) -> tuple[list[Row], dict[str, Any]]:
    mixture = Mixture.drawn()
    mixture.pool(options.dense_pool, scratch / "small.npy")
    target, pool = mixture.target(options.target), torch.from_numpy(np.load(scratch / "small.npy")).float()
    double = target.double(), pool.double()
    torch.set_num_threads(1)
    ours = solve(target, pool, epsilon=options.epsilon, tolerance=TOLERANCE)
    assert ours.converged
    iterations = next(k for k in range(1, 1000) if pot(*double, ours.epsilon, k)[1] <= TOLERANCE)
    work: dict[str, Callable[[], Any]] = {
        "ours": lambda: solve(target, pool, epsilon=options.epsilon, tolerance=TOLERANCE),
        "pot float64": lambda: pot(*double, ours.epsilon, iterations),
        "pot float32": lambda: pot(target, pool, ours.epsilon, iterations),
    }
    runs: dict[str, list[tuple[Any, float, float]]] = {name: [] for name in work}
    for _ in range(options.repeats):
        for name, each in work.items():
            runs[name].append(timed(each))
    took = {name: statistics.median(seconds for _, _, seconds in each) for name, each in runs.items()}
    log_u, error = runs["pot float64"][0][0]
    theirs, own = ours.epsilon * log_u, ours.g.double().numpy()
    difference = np.abs((own - own.mean()) - (theirs - theirs.mean())).max()
    claim = f"{options.dense_pool:,} candidates × {options.target:,} targets: marginal error {TOLERANCE:g} is reached"
    return [
        Row(claim, took["ours"], took["pot float64"], "POT's dense log-Sinkhorn", "s of one core", 1 / 3, "lower"),
        Row(
            claim, took["ours"], took["pot float32"], "the same in float32 on PyTorch", "s of one core", 1 / 3, "lower"
        ),
    ], {
        "passes": ours.passes,
        "marginal_error": ours.marginal_error,
        "pot_iterations": iterations,
        "pot_marginal_error": error,
        "largest_difference_of_g_in_mean_costs": difference / ours.mean_cost,
        "wall_seconds": {name: [seconds for _, seconds, _ in each] for name, each in runs.items()},
        "processor_seconds": {name: [seconds for _, _, seconds in each] for name, each in runs.items()},
    }


def selected(file: Path, target: Tensor, budget: int, epsilon: float) -> dict[str, Any]:
    """Choose from a file, in a process of its own."""
    torch.set_num_threads(2)
    before = _peak()
    choice, wall, processor = timed(
        lambda: choose(target, np.load(file, mmap_mode="r"), budget, epsilon=epsilon, tolerance=TOLERANCE)
    )
    transport = choice.transport
    return {
        "seconds": wall,
        "processor_seconds": processor,
        "peak_bytes": _peak(),
        "peak_bytes_before": before,
        "passes": transport.passes,
        "marginal_error": transport.marginal_error,
        "converged": transport.converged,
        "threads": torch.get_num_threads(),
    }


def _peak() -> int:
    """Bytes that were resident at most (Linux). `ru_maxrss` would begin with the peak of the parent process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def on_a_million(options: argparse.Namespace, scratch: Path) -> tuple[list[Row], dict[str, Any]]:
    mixture = Mixture.drawn()
    mixture.pool(options.pool, scratch / "pool.npy")
    with get_context("spawn").Pool(1) as process:
        work = scratch / "pool.npy", mixture.target(options.target), options.budget, options.epsilon
        found = process.apply(selected, work)
    assert found["converged"]
    sizes = f"{options.budget:,} of {options.pool:,} candidates × {DIMENSIONS}, {options.target:,} targets"
    claim = f"{sizes}, from ready float16 vectors"
    hour = 3600 * options.pool / 1e6
    return [
        Row(f"{claim}: peak memory", found["peak_bytes"] / 2**30, 4, "what we ask for", "GiB", 1, "lower"),
        Row(f"{claim}: time", found["seconds"], hour, "what we ask for: an hour a million", "s", 1, "lower"),
    ], found


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=1_000_000)
    parser.add_argument("--target", type=int, default=2000)
    parser.add_argument("--budget", type=int, default=50_000)
    parser.add_argument("--dense-pool", type=int, default=20_000)
    parser.add_argument("--epsilon", type=float, default=0.05, help="in mean costs")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        dense_rows, dense = against_pot(options, Path(folder))
        rows, million = on_a_million(options, Path(folder))
    details = {"dense": dense, "million": million, "epsilon": options.epsilon, "load": os.getloadavg()}
    write("selection", [*dense_rows, *rows], details=details)


if __name__ == "__main__":
    main()
