"""Memory that a step of the CPU frees, kept for the next one.

A training step allocates and frees the same large tensors again and again. glibc maps each block above a threshold (at
most 32 MiB) anew and gives it back when it is freed, and the kernel zeroes it once more, page by page: on a small
machine that is a tenth to a fifth of the step (docs/benchmarks.md).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_KEEP = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
# glibc cannot be asked for what was in force. This is where its own adaptation ends, once a block of 32 MiB was freed.
_GIVE_BACK = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 2**25, _M_TRIM_THRESHOLD: 2**26}


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Within it, memory freed on the CPU stays with the process; after it, what is free goes back to the machine.

    Does nothing where tensors live on another device or the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if device.type != "cpu" or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    for parameter, value in _KEEP.items():
        libc.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _GIVE_BACK.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
