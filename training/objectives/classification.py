"""One label for a whole input."""

from collections.abc import Mapping

from torch import Tensor, nn

from infra.errors import InvalidInput
from kernels.cross_entropy import IGNORE, cross_entropy
from training.objectives.objective import Loss


class Classification:
    """L = −Σᵢ log p(yᵢ | xᵢ) for a model whose logits are [B, classes].

    Batch: whatever the model reads, and `labels` [B] or [B, 1] (−100: no label).
    """

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """See `Objective`."""
        labels = batch["labels"].reshape(-1)
        count = int(self.count(batch))
        if not count:
            raise InvalidInput("None of the inputs of a batch has a label.", "Give every example its class.")
        outputs = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
        return Loss(cross_entropy(outputs.logits, labels).sum(), count, outputs)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """See `Objective`."""
        return (batch["labels"] != IGNORE).sum()
