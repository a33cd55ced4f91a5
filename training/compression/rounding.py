"""What is rounded to a dtype, and what that looks like from behind."""

import math

import torch
from torch import Tensor


def moved(start: Tensor, sign: Tensor, scale: float) -> Tensor:
    """start + scale · sign, rounded to the dtype of `start`."""
    return (start.double() + scale * sign).to(start.dtype)


def preimage(values: Tensor) -> tuple[Tensor, Tensor]:
    """Between which two numbers (float64) everything rounds to each of the `values` in their dtype.

    Of float64 itself it is a little more: the whole way to the neighbours.
    """
    above = torch.nextafter(values, torch.full_like(values, math.inf)).double()
    below = torch.nextafter(values, torch.full_like(values, -math.inf)).double()
    if values.dtype == torch.float64:
        return below, above
    return (below + values.double()) / 2, (values.double() + above) / 2
