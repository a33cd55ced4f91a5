"""The one rule that chooses between a Triton kernel and its plain-PyTorch reference."""

import os
from functools import cache
from importlib.util import find_spec

from torch import Tensor


@cache
def triton_is_there() -> bool:
    """Whether the `triton` package can be imported."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on_triton(tensor: Tensor) -> bool:
    """Whether the kernel, not the reference, computes on `tensor`.

    Triton on CUDA tensors; on any tensor under `TRITON_INTERPRET=1` (Triton's interpreter, for tests; the variable
    must be set before a kernel's module is imported); else the reference.
    """
    return triton_is_there() and (tensor.is_cuda or interpreted())
