"""Training for a codebook: the forward pass sees a matrix as it will be stored, the gradient sees through.

Source: Jie, Wang, Deng (arXiv 2307.16867), `QLinear`.
"""

import torch
from torch import Tensor, nn

from training.compression.levels import cells, levels, moments, standardised


def fake_quantised(weight: Tensor, bits: int) -> Tensor:
    """What a `codebook` file of so many bits gives back for `weight`, with a straight-through gradient.

        z = (w − μ) / (σ + 1e-5);   z̃ = ẑ + z − stop(z);   w̃ = z̃·σ + μ

    Only the rounding of z to its level ẑ is passed over; the true gradients of μ and σ are kept. All of it is computed
    in float32, in whatever autocast.

    Args:
        weight: any shape; one μ and one σ for all of it.
        bits: 1, 2, 4 or 8.

    Returns:
        the same shape and dtype; at most 2^bits different values.
    """
    with torch.autocast(weight.device.type, enabled=False):
        mean, deviation = moments(weight)
        z = standardised(weight, mean, deviation)
        level = levels(bits).to(z)[cells(z, bits)]
        passed = level + (z - z.detach())
        return (passed * deviation + mean).to(weight.dtype)


class FakeQuantised(nn.Module):
    """`fake_quantised` as a parametrization: `torch.nn.utils.parametrize.register_parametrization(layer, "weight", …)`.

    What has to be compressed afterwards is the original, not the parametrized weight. A zero matrix stays zero: it has
    no σ, so start from small numbers (the paper: a normal of deviation 1e-3, cut off at twice that).

    Args:
        bits: 1, 2, 4 or 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it will be stored."""
        return fake_quantised(weight, self.bits)
