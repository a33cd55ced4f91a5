"""What a model says of itself on a few batches of the data to come."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.errors import InvalidInput
from training.methods.contract import Batch
from training.methods.injected import switched_off


def weight_gradients(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Σ over the batches of ∂L/∂W of the bare base, L the model's own loss, for each of `layers`.

    Adapters and dropout are off meanwhile; `requires_grad`, gradients and training modes are as they were afterwards. A
    layer's gradient leaves the model's device as soon as it is there, so that there are never two of a batch's.

    Args:
        model: called as `model(**batch).loss`.
        layers: linear layers of the model, bare; layers that share one weight get the same sum.
        batches: with labels; moved to the model's device.

    Returns:
        [m, n] a layer, outputs first (`Conv1D`'s, too), float32, on the CPU; zero where the loss does not reach.

    Raises:
        InvalidInput: a batch's loss is missing or not finite.
    """
    weights = {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()}
    sums = {weight: torch.zeros(weight.shape) for weight in weights.values()}  # a tied weight once
    device = next(model.parameters()).device

    def collect(weight: Tensor) -> None:
        if weight.grad is not None:
            sums[weight] += weight.grad.to("cpu", torch.float32)  # type: ignore[index]
            weight.grad = None

    with ExitStack() as stack:
        stack.enter_context(switched_off(model))
        stack.enter_context(_only_these_need_gradient(model, sums))
        stack.enter_context(torch.enable_grad())
        for weight in sums:
            stack.callback(weight.register_post_accumulate_grad_hook(collect).remove)  # type: ignore[no-untyped-call]
        for batch in batches:
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            if loss is None or not torch.isfinite(loss):
                raise InvalidInput(
                    f"The loss of {type(model).__name__} on a calibration batch is {loss}.",
                    "Are there labels in the batch, and are the base's weights and precision sound?",
                )
            loss.backward()
    return {
        name: sums[weight].T if isinstance(layers[name], Conv1D) else sums[weight] for name, weight in weights.items()
    }


@contextmanager
def _only_these_need_gradient(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = {weight: weight.grad for weight in weights}
    training = {module: module.training for module in model.modules()}
    model.requires_grad_(False).eval()
    for weight in gradients:
        weight.requires_grad_(True)
        weight.grad = None
    try:
        yield
    finally:
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
        for weight, gradient in gradients.items():
            weight.grad = gradient
        for module, mode in training.items():
            module.training = mode
