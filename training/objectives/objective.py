"""The objective contract: what is optimised, whatever the method, backbone or modality."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Loss:
    """What an objective makes of a batch.

    Args:
        total: the loss summed over everything in the batch that is judged, a float32 scalar with gradient.
        count: how many things were judged; total / count is the mean loss.
        outputs: what the model returned (`Adapted.extra_loss` may read it); its logits may be of no position.
    """

    total: Tensor
    count: int
    outputs: Any


class Objective(Protocol):
    """A function of model and batch. Sums, not means: only the trainer knows over what a step's mean is taken."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The summed loss of `model`, bare or wrapped for data parallelism, on `batch`.

        Raises:
            InvalidInput: nothing in the batch can be judged.
        """

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How many things of `batch` are judged, an integer scalar, without running the model."""
