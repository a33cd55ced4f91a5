"""How much memory something takes at most."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Appends the most bytes in use inside, above those in use before: of the GPU, or of this process (Linux only)."""
    found: list[int] = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from what is resident now
    before = _resident("VmRSS")
    yield found
    found.append(_resident("VmHWM") - before)


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024
