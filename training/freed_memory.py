"""Memory that a step of the CPU frees, kept for the next one.

A training step allocates and frees the same large tensors again and again. glibc maps each block above a threshold (at
most 32 MiB) anew and gives it back when it is freed, and the kernel zeroes it once more, page by page: on a small
machine that is a tenth to a fifth of the step (docs/benchmarks.md).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_MOST = 2**31 - 1


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Within it, memory freed on the CPU stays with the process; after it, what is free goes back to the machine.

    Does nothing where tensors live on another device or the C library is not glibc. glibc cannot be asked for its
    thresholds, so they stay as they are set here; freed memory then goes back at the end of the next such block.
    """
    libc = ctypes.CDLL(None)
    if device.type != "cpu" or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _MOST)
    try:
        yield
    finally:
        libc.malloc_trim(0)
