"""Calibration: what the start of an adapter learns of data, from the inputs or the gradients of the bare base.

Everything here sees the model as it is without any adapter, in evaluation mode (no dropout, so that the same data give
the same start), and leaves it as it was.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.errors import InvalidInput
from kernels.cross_entropy import IGNORE
from training.methods.contract import AttachContext, Batch
from training.methods.injected import switched_off
from training.methods.targets import output_embeddings

Hear = Callable[[str, Tensor, Tensor], None]


def draw(
    context: AttachContext, model: nn.Module, method: str, samples: int | None = None, rows: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Calibration batches on the model's device, in the order of the data, once through.

    Args:
        context: where they are drawn from.
        model: whose device they are moved to.
        method: named where there are none.
        samples: stop after so many rows; the last batch is cut. None: no limit.
        rows: split batches that have more rows. None: as they are drawn.

    Raises:
        InvalidInput: there are no calibration data.
    """
    device = next(model.parameters()).device
    left, found = samples, False
    for batch in context.calibration() if context.calibration else ():
        size = rows_of(batch) if left is None else min(left, rows_of(batch))
        found = found or size > 0
        for start in range(0, size, rows or max(size, 1)):
            end = min(start + (rows or size), size)
            yield {name: tensor[start:end].to(device).contiguous() for name, tensor in batch.items()}
        if left is not None:
            left -= size
            if left <= 0:
                return
    if not found:
        raise InvalidInput(
            f"'{method}' needs calibration data: it starts from what the base model makes of them.",
            "Train it by a recipe, which draws them from its training data, or pass AttachContext(calibration=…).",
        )


def rows_of(batch: Batch) -> int:
    """How many samples a batch holds."""
    return len(next(iter(batch.values())))


@contextmanager
def bare_and_evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, `model` computes what the bare base does in evaluation, and keeps no cache of keys and values."""
    modes = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    model.eval()
    if cache is not None:
        config.use_cache = False
    try:
        with switched_off(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        if cache is not None:
            config.use_cache = cache


def observe(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch, hear: Hear, labelled: bool = False
) -> None:
    """Let the bare base read `batch`, without gradient, and tell `hear` every input that one of `layers` gets.

    Args:
        model: the model.
        layers: linear layers of it, by name.
        batch: what it reads.
        hear: called with the layer's name, its input x [B, L, n] in the model's dtype, and which of the B × L tokens
            count, [B, L] boolean: neither padding nor, if `labelled`, without a label. Where a layer does not see
            tokens of the batch (the pooled ones of a classification head, the patches of an image), all count.
        labelled: whether tokens without a label are left out.

    Raises:
        InvalidInput: an input that counts is not finite.
    """
    tokens = _Tokens(model, batch, labelled)

    def watch(name: str, layer: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            del module
            (x, *_) = arguments
            width = x.shape[-1]
            rows = tokens.rows if x.numel() % (tokens.rows * width) == 0 else 1
            seen = x.detach().reshape(rows, -1, width)
            kept = tokens.counting(layer, x, seen.shape[:2])
            finite = seen.sum(dtype=torch.float32).isfinite()  # in one pass; looked at closely only if it is not
            if not finite and not (seen.isfinite().all(-1) | ~kept).all():
                raise InvalidInput(f"The inputs of {name} are not finite.", "Is the base model's own loss a number?")
            hear(name, seen, kept)

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name, layer)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), bare_and_evaluating(model), tokens.following_the_encoder():
            model(**_without_logits(model, layers, batch))
    finally:
        for hook in hooks:
            hook.remove()


def _without_logits(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> dict[str, Any]:
    """`batch` such that no logits or loss are computed that nobody looks at: a quarter of a small model's time."""
    head = output_embeddings(model)
    optional = "logits_to_keep" in signature(model.forward).parameters
    if not optional or head is None or any(layer is head for layer in layers.values()):
        return dict(batch)
    return {name: tensor for name, tensor in batch.items() if name != "labels"} | {"logits_to_keep": 1}


class _Tokens:
    """Which tokens of a batch count at a layer; an encoder-decoder's two sequences are told apart."""

    def __init__(self, model: nn.Module, batch: Batch, labelled: bool) -> None:
        self.rows = rows_of(batch)
        self._encoder: Any = model.get_encoder() if _is_encoder_decoder(model) else None  # type: ignore[operator]
        self._inside = set(self._encoder.modules()) if self._encoder else set()
        self._encoded: list[Tensor] = []  # what the decoder's cross-attention reads
        labels = batch.get("labels")
        self._source: Tensor | None = batch.get("attention_mask")
        self._target: Tensor | None = None if labels is None else labels != IGNORE
        if labelled and not self._encoder and self._target is not None and self._target.ndim == 2:
            self._source = self._target if self._source is None else (self._source != 0) & self._target

    @contextmanager
    def following_the_encoder(self) -> Iterator[None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            del module, arguments
            self._encoded.append(output[0])

        handle = self._encoder.register_forward_hook(hook) if self._encoder else None
        try:
            yield
        finally:
            if handle:
                handle.remove()

    def counting(self, layer: nn.Module, x: Tensor, wanted: torch.Size) -> Tensor:
        of_source = not self._encoder or layer in self._inside or any(x is encoded for encoded in self._encoded)
        mask = self._source if of_source else self._target
        if mask is None or mask.shape != wanted:
            return torch.ones(wanted, dtype=torch.bool, device=x.device)
        return mask != 0


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def sharing_inputs(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> dict[str, list[str]]:
    """`layers` in groups that read the very same tensor (query, key and value), each under its first member's name.

    Raises:
        InvalidInput: `batch` does not reach one of them.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}  # kept alive, or an address could come twice

    def watch(name: str) -> Callable[..., None]:
        return lambda module, arguments: inputs[name].append(arguments[0])

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), bare_and_evaluating(model):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    check_reached([name for name, seen in inputs.items() if not seen])
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, seen in inputs.items():
        groups.setdefault(tuple(map(id, seen)), []).append(name)
    return {members[0]: members for members in groups.values()}


def check_reached(missed: list[str]) -> None:
    """Raise `InvalidInput` where calibration has nothing to say of some layers."""
    if missed:
        raise InvalidInput(
            f"The calibration data do not reach {', '.join(missed[:3])}{' and more' if len(missed) > 3 else ''}.",
            "Leave the layers out: method.exclude.",
        )


def gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch], heard: Callable[[int], None]
) -> dict[str, Tensor]:
    """∂L/∂W [m, n] of each of `layers` at the bare base, float32, on the CPU: the mean over all rows of `batches`.

    A weight's gradient is added up as soon as it is there, and freed; a weight that is tied has that of all its uses.

    Args:
        model: computes L as `model(**batch).loss`.
        layers: linear layers of it, by name.
        batches: with labels.
        heard: called with the number of rows that have been read.

    Raises:
        InvalidInput: the model computes no loss, loss or gradient is not finite, or the loss does not depend
            on a layer.
    """
    weights: dict[nn.Parameter, Tensor | None] = {layer.weight: None for layer in layers.values()}  # type: ignore[misc]
    done = rows = 0

    def add(weight: nn.Parameter) -> None:
        gradient, weight.grad, total = weight.grad, None, weights[weight]
        if total is None:
            total = weights[weight] = torch.zeros(weight.shape)
        total.add_(gradient.to("cpu", torch.float32), alpha=rows)  # type: ignore[union-attr]

    held = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    hooks: list[Any] = []
    try:
        for parameter, _, _ in held:
            parameter.requires_grad_(parameter in weights)
            parameter.grad = None
        hooks += [weight.register_post_accumulate_grad_hook(add) for weight in weights]  # type: ignore[no-untyped-call]
        with torch.enable_grad(), bare_and_evaluating(model):
            for batch in batches:
                rows = rows_of(batch)
                loss = model(**batch).loss
                if loss is None:
                    raise InvalidInput(
                        f"{type(model).__name__} computes no loss of the calibration batches.", "Give them labels."
                    )
                if not loss.isfinite():
                    raise InvalidInput(
                        f"The loss of the base model is {loss.item()} after {done} calibration samples.",
                        "Does every example have a label?",
                    )
                loss.backward()
                done += rows
                heard(done)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, requires_grad, gradient in held:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
    check_reached([name for name, layer in layers.items() if weights[layer.weight] is None])  # type: ignore[index]
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        mean: Any = weights[layer.weight]  # type: ignore[index]
        if not mean.isfinite().all():
            raise InvalidInput(
                f"The gradient of {name} at the calibration data is not finite.",
                "Is the base a sound one?",
            )
        found[name] = (mean.T if isinstance(layer, Conv1D) else mean) / done
    return found
