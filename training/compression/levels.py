"""Codebooks of 2^b levels for numbers from N(0, 1), and the moments that standardise a matrix.

Source: Jie, Wang, Deng, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy"
(ICCV 2023, arXiv 2307.16867). The levels minimise the expected |z − ẑ|: each is the median of its cell, and the cells'
borders lie midway between levels.
"""

import math
from functools import cache

import torch
from torch import Tensor

ITERATIONS = 500
EPSILON = 1e-5  # of (w − μ) / (σ + ε)


@cache
def levels(bits: int) -> Tensor:
    """The 2^bits levels c (float64, ascending, symmetric), by iteration to the fixed point:

        r_i = (c_i + c_{i+1}) / 2;   P = [0, Φ(r), 1];   c_i = Φ⁻¹((P_i + P_{i+1}) / 2)

    It starts from where many levels would lie, with density ∝ √φ: c_i = √2·Φ⁻¹((2i+1) / 2^{b+1}).
    """
    number = 2**bits
    found = math.sqrt(2) * torch.special.ndtri((2 * torch.arange(number, dtype=torch.float64) + 1) / (2 * number))
    for _ in range(ITERATIONS):
        below = torch.cat([found.new_zeros(1), torch.special.ndtr((found[:-1] + found[1:]) / 2)])
        above = 1 - below.flip(0)  # the borders are symmetric
        found = torch.special.ndtri((below + above) / 2)
    symmetric: Tensor = (found - found.flip(0)) / 2
    return symmetric


def borders(bits: int) -> Tensor:
    """The 2^bits − 1 borders between the cells of `levels` (float64)."""
    found = levels(bits)
    return (found[:-1] + found[1:]) / 2


def moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """μ and the unbiased σ of all elements, as float32; gradients flow through both.

    They are computed in float64, so that the order of the sum does not show. σ is 0, with no gradient, where all
    elements are equal or there is only one.
    """
    wide = weight.double()
    mean = wide.mean() if weight.numel() else wide.sum()
    variance = (wide - mean).square().sum() / max(weight.numel() - 1, 1)
    varies = variance > 0
    deviation = torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)  # √ has no slope at 0
    return mean.float(), deviation.float()


def standardised(weight: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """z = (w − μ) / (σ + 1e-5), in float32."""
    return (weight.float() - mean) / (deviation + EPSILON)


def cells(z: Tensor, bits: int) -> Tensor:
    """Which level is nearest to each z (int64); a z on a border belongs to the lower one."""
    return torch.bucketize(z.detach(), borders(bits).to(z))
