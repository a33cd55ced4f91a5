"""A moving average towards the mean of the older adapters (MOS, Sun et al., arXiv 2412.09441).

    θ ← (1 − α)θ + α · (1/b) Σ_{k<b} θₖ,    b older adapters; with none θ stays

In training: once after each optimiser step, never at evaluation, and never on the older ones. (The authors' code runs
it in every layer's forward pass, evaluation included: θ keeps about 0.9¹³ instead of 0.9 of itself a step, and the
older ones drift.) As a merge, `Ema` takes the newest adapter last; of LoRAs it averages the updates.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from training.merging.method import Mixture

MOMENTUM = 0.1


class Ema(Mixture):
    """The newest adapter, last in order, drawn to the mean of those before it."""

    title: ClassVar[str] = "The newest adapter, drawn to the mean of its predecessors"
    paper: ClassVar[str] = "MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning, arXiv 2412.09441"

    momentum: float = Field(MOMENTUM, ge=0, le=1, description="α, the share of the predecessors' mean.")

    def coefficients(self, count: int) -> list[float]:
        """α/b of each predecessor, 1 − α of the newest."""
        older = count - 1
        return [self.momentum / older] * older + [1 - self.momentum]


def towards_mean(theta: Tensor, older: Sequence[Tensor], momentum: float = MOMENTUM) -> Tensor:
    """(1 − α)θ + α·mean(older), in θ's dtype, accumulated in float64; θ itself where there are none or α is 0.

    Args:
        theta: the newest adapter's tensor.
        older: the same tensor of each older adapter, of the same shape.
        momentum: α.
    """
    if not older or not momentum:
        return theta
    mean = sum((each.double() for each in older), theta.double() * 0) / len(older)
    return ((1 - momentum) * theta.double() + momentum * mean).to(theta.dtype)
