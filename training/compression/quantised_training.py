"""Training an adapter as it will be stored, in b bits: forward and backward see the quantised matrices, the optimiser
moves those behind them.

Source: Jie, Wang, Deng (arXiv 2307.16867). Works on any parameters, wherever they sit in a model: nothing is wrapped.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from infra.errors import InvalidInput
from training.compression.straight_through import fake_quantised

START = 1e-3  # deviation of what a matrix of zeros starts from, cut off at twice that


class QuantisedTraining:
    """The matrices among parameters that train, and what they look like in `bits` bits.

    Args:
        parameters: what trains, by name; those of fewer than two dimensions stay as they are.
        bits: 1, 2, 4 or 8.

    Raises:
        InvalidInput: there is no matrix among them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], bits: int) -> None:
        self.bits = bits
        self._matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
        if not self._matrices:
            raise InvalidInput(
                "training.adapter_bits quantises matrices, and this method trains none.", "Leave it out."
            )

    def start(self, seed: int) -> None:
        """Give matrices of equal entries, as a LoRA's B, a small deviation: no gradient would ever part them."""
        generator = torch.Generator().manual_seed(seed)
        for matrix in self._matrices:
            if not torch.any(matrix != matrix.flatten()[0]):
                drawn = nn.init.trunc_normal_(
                    torch.empty(matrix.shape), 0.0, START, -2 * START, 2 * START, generator=generator
                )
                matrix.data += drawn.to(matrix.device, matrix.dtype)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within it the parameters hold w̃; gradients that arrive are of w̃, until `pass_gradients_through`."""
        behind = [matrix.data for matrix in self._matrices]
        with torch.no_grad():
            for matrix in self._matrices:
                matrix.data = fake_quantised(matrix.data, self.bits)
        try:
            yield
        finally:
            for matrix, own in zip(self._matrices, behind, strict=True):
                matrix.data = own

    def pass_gradients_through(self) -> None:
        """∂L/∂w from the gradients ∂L/∂w̃ that have come together, once an update."""
        for matrix in self._matrices:
            if matrix.grad is not None:
                own: Tensor = matrix.detach().requires_grad_()
                with torch.enable_grad():
                    (matrix.grad,) = torch.autograd.grad(fake_quantised(own, self.bits), own, matrix.grad)

    def settle(self) -> None:
        """The parameters hold w̃ from now on: what a `codebook` file of so many bits stores without any loss."""
        with torch.no_grad():
            for matrix in self._matrices:
                matrix.data = fake_quantised(matrix.data, self.bits)
