"""Encoder-decoder prediction: the decoder reads the labels shifted right and predicts them in place."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from training.objectives.labelled_positions import bare, labelled_count, labelled_loss
from training.objectives.objective import Loss


class SequenceToSequence:
    """L = −Σₜ log p(yₜ | y₍<ₜ₎, x).

    Batch: `input_ids` [B, S] and `attention_mask` [B, S] for the encoder, `labels` [B, T] (−100: no label).
    """

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """See `Objective`."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        shift_right: Callable[..., Tensor] = bare(model).prepare_decoder_input_ids_from_labels  # type: ignore[assignment]
        inputs["decoder_input_ids"] = shift_right(batch["labels"])
        return labelled_loss(model, inputs, batch["labels"], shift=0)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """See `Objective`."""
        return labelled_count(batch["labels"], shift=0)
