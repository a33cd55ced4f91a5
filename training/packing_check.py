"""Whether a model, as adapted, keeps packed examples apart."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from infra.errors import InvalidInput
from training.data.batching import Collate
from training.data.encoding import Encoded
from training.objectives.objective import Loss

_EXAMPLES = 4
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative; what lower precisions round off is …
_ROUGH_TOLERANCE = 2e-2


def check_packing(
    model: nn.Module,
    judge: Callable[[Mapping[str, Tensor]], Loss],
    examples: Sequence[Encoded],
    padding: Collate,
    packing: Collate,
) -> None:
    """Compare the loss of a few examples padded and packed; it must be one and the same.

    It is not where an architecture has no attention mask (state-space models), or where a method brings cached keys or
    virtual positions that make transformers overlook the boundaries (prefix and prompt tuning).

    Raises:
        InvalidInput: packed examples see each other.
    """
    few = sorted(examples, key=lambda example: len(example.input_ids))[:_EXAMPLES]
    if len(few) < 2:
        return
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    with torch.no_grad():
        padded, packed = (
            judge({name: tensor.to(parameter.device) for name, tensor in collate(few).items()}).total.item()
            for collate in (padding, packing)
        )
    model.train(was_training)
    if abs(padded - packed) > _TOLERANCE.get(parameter.dtype, _ROUGH_TOLERANCE) * abs(padded):
        raise InvalidInput(
            f"Packing would change what is learned: {len(few)} examples have a loss of {padded:.4f} apart and "
            f"{packed:.4f} in one row, so this model or method lets packed examples see each other.",
            "Set training.packing: false.",
        )
