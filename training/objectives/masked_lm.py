"""Masked-token prediction (BERT, arXiv 1810.04805): a label is predicted from its own position."""

from collections.abc import Mapping

from torch import Tensor, nn

from training.objectives.labelled_positions import labelled_count, labelled_loss
from training.objectives.objective import Loss


class MaskedLM:
    """L = −Σ_{t masked} log p(xₜ | x with the masked positions hidden).

    Batch: `input_ids` [B, L], with the masked tokens hidden already; `attention_mask` [B, L]; `labels` [B, L], the true
    token where it is masked, −100 elsewhere.
    """

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """See `Objective`."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return labelled_loss(model, inputs, batch["labels"], shift=0)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """See `Objective`."""
        return labelled_count(batch["labels"], shift=0)
