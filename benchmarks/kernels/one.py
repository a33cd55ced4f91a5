"""One kernel's benchmark, of the GPU where there is one: measured, written and, of a GPU, drawn.

    python -m benchmarks.kernels.one NAME [--sweep]

A benchmark is a module of this folder with `on_gpu(ceilings)`, which gives its rows, those in GB/s and TFLOP/s being
shares of the ceilings; where there is something to see without a GPU, `on_cpu()`; with `DETAILS` for its results' file;
and where numbers of a kernel's launch might be others on other GPUs, `sweep(ceilings)`, which prints how they do.
"""

import argparse
import os
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.measuring import Ceilings, gpu_ceilings
from benchmarks.kernels.picture import draw
from benchmarks.results_file import write

FOLDER = Path(__file__).parent
REPEATS = 9


def benchmarks() -> list[str]:
    """The names of all."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef on_gpu(" in path.read_text(encoding="utf-8"))


def measure(name: str, ceilings: Ceilings | None = None, sweep: bool = False) -> None:
    """Write and draw what the benchmark `name` finds.

    Args:
        name: of its module.
        ceilings: of the GPU; measured, where they are not given.
        sweep: whether to call the benchmark's `sweep`, too, if it has one and there is a GPU.
    """
    if name not in benchmarks():
        raise SystemExit(f"There is no benchmark {name}; there are {', '.join(benchmarks())}.")
    module = import_module(f"benchmarks.kernels.{name}")
    details: dict[str, Any] = {"load": os.getloadavg()[0], **getattr(module, "DETAILS", {})}
    if not torch.cuda.is_available():
        if not hasattr(module, "on_cpu"):
            raise SystemExit(f"{name}: only a CUDA device can be measured.")
        write(name, module.on_cpu(), details=details)
        return
    ceilings = ceilings or gpu_ceilings(REPEATS)
    rows = module.on_gpu(ceilings)
    draw(write(name, rows, torch.cuda.get_device_name(), {**details, "ceilings": asdict(ceilings)}))
    if sweep and hasattr(module, "sweep"):
        module.sweep(ceilings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--ceilings", type=float, nargs=2, metavar=("BANDWIDTH", "RATE"))
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    measure(options.name, Ceilings(*options.ceilings) if options.ceilings else None, options.sweep)
