"""Next-token prediction: each label is predicted from the position before it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from training.objectives.labelled_positions import labelled_count, labelled_loss
from training.objectives.objective import Loss


class CausalLM:
    """L = −Σₜ log p(xₜ | x₍<ₜ₎) over the positions t > 0 that have a label.

    Batch: `input_ids` [B, L], `labels` [B, L] (−100: no label), and `attention_mask` [B, L] (padded rows) or
    `position_ids` [B, L] (packed rows).
    """

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """See `Objective`."""
        inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
        inputs["use_cache"] = False  # with a cache, transformers would not look for the boundaries of packed examples
        return labelled_loss(model, inputs, batch["labels"], shift=1)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """See `Objective`."""
        return labelled_count(batch["labels"], shift=1)
