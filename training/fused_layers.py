"""Layers of LoRA's kind computed by this project's kernels while they train.

The layers stay what they are, peft's or Regraft's own: for as long as a training lasts, their `forward` is another
that computes the same function, and leaves to the usual one whatever it is not made for. What is stored, merged,
switched off or sharded knows nothing of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kernels.dispatch import runs_on_triton
from kernels.dora import fused_dora, row_squares
from kernels.fused_lora import fused_lora
from training.methods.contract import Adapted
from training.methods.injected import InjectedAdapted
from training.methods.peft_method import PeftAdapted
from training.methods.started_lora import LoraSlot

_WORTH_LAUNCHING = 1e12  # operations: a millisecond of an H100's, as long as it takes to launch a layer's kernels

Kernels = Literal["auto", "on", "off"]
Forward = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class _Lora:
    """What a layer computes at this moment.

    Args:
        A: [r, n].
        B: [m, r].
        scale: s.
        dropout: p; 0 where the layer is not in training.
        magnitude: of DoRA.
        squares: of the base weight's rows, of DoRA.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: float
    magnitude: Tensor | None = None
    squares: Tensor | None = None


@contextmanager
def fused_layers(adapted: Adapted, kernels: Kernels) -> Iterator[None]:
    """Within it, what of the adapter's layers is of LoRA's kind is computed by kernels.

    Args:
        adapted: the adapter that trains.
        kernels: "auto": where they are faster, which is on a GPU in 16 bits where a layer has enough to do, and on the
            CPU unless LoRA's dropout is to be drawn; "on": wherever they give the same; "off": nowhere.
    """
    layers = [] if kernels == "off" else list(_layers_to_fuse(adapted, always=kernels == "on"))
    for layer, forward in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, _ in layers:
            del layer.forward


def _layers_to_fuse(adapted: Adapted, *, always: bool) -> Iterator[tuple[nn.Module, Forward]]:
    """Every layer that can be fused, with the `forward` that does so."""
    if isinstance(adapted, PeftAdapted):
        for layer in adapted.model.modules():
            if type(layer) is PeftLinear and _is_plain(layer, adapted.name):
                dora = adapted.name in layer.lora_variant
                squares = row_squares(_weight(layer.base_layer)) if dora else None
                yield layer, partial(_forward_of_peft, layer, layer.forward, adapted.name, squares, always)
    elif isinstance(adapted, InjectedAdapted):
        for name, wrapper in adapted.layers().items():
            slot = adapted.slots()[name]
            if type(slot) is LoraSlot and _is_plain_module(slot) and _is_frozen_linear(wrapper.base_layer):
                yield slot, partial(_forward_of_slot, slot, slot.forward, always)


def _forward_of_peft(
    layer: Any, usual: Forward, name: str, squares: Tensor | None, always: bool, x: Tensor, *others: Any, **options: Any
) -> Tensor:
    """Of peft's `lora.Linear` with one plain or DoRA adapter."""
    if others or options or layer.disable_adapters or layer.merged or list(layer.active_adapters) != [name]:
        return usual(x, *others, **options)
    dropout = layer.lora_dropout[name]
    lora = _Lora(
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.scaling[name],
        dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        None if squares is None else layer.lora_magnitude_vector[name].weight,
        squares,
    )
    output = _fused(layer.base_layer, lora, x, always)
    return usual(x) if output is None else output


def _forward_of_slot(slot: LoraSlot, usual: Forward, always: bool, base: nn.Module, x: Tensor) -> Tensor:
    """Of a `LoraSlot`; what is subtracted is never dropped, so with dropout that takes another product."""
    dropout = slot.dropout.p if slot.dropout.training else 0.0
    output = None
    if slot.A0 is None or not dropout:
        output = _fused(base, _Lora(*slot.factors(), slot.scale, dropout), x, always)
    return usual(base, x) if output is None else output


def _fused(base: Any, lora: _Lora, x: Tensor, always: bool) -> Tensor | None:
    """The layer's output, or None where it is not for the kernels to compute."""
    W, bias = _weight(base), base.bias
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if not _is_plain_module(base) or W.dtype != x.dtype or not (always or _is_faster(x, lora)):
        return None
    if lora.magnitude is None or lora.squares is None:
        return fused_lora(x, W, bias, lora.A, lora.B, lora.scale, lora.dropout)
    return fused_dora(x, W, bias, lora.A, lora.B, lora.magnitude, lora.scale, lora.squares, lora.dropout)


def _is_faster(x: Tensor, lora: _Lora) -> bool:
    """As benchmarks/kernels/fused_lora.py has it."""
    if runs_on_triton(x):
        operations = 4 * x.numel() * len(lora.B)  # of the products with W, forward and backward
        return x.dtype.itemsize == 2 and operations >= _WORTH_LAUNCHING
    return x.device.type == "cpu" and (not lora.dropout or lora.magnitude is not None)


def _is_plain(layer: PeftLinear, name: str) -> bool:
    """Whether an adapter of peft's computes nothing but LoRA or DoRA on a frozen linear layer."""
    if name not in layer.lora_A or not isinstance(layer.lora_dropout[name], nn.Identity | nn.Dropout):
        return False
    factors = layer.lora_A[name], layer.lora_B[name]
    variant = layer.lora_variant.get(name)
    return (
        (variant is None or type(variant) is DoraLinearVariant)
        and all(type(factor) is nn.Linear and factor.bias is None and _is_plain_module(factor) for factor in factors)
        and _is_plain_module(layer)
        and _is_frozen_linear(layer.base_layer)
    )


def _is_frozen_linear(base: Any) -> bool:
    """Whether a base layer is a linear one whose tensors are ordinary ones, not quantised or sharded, and frozen."""
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return False
    tensors = [tensor for tensor in (base.weight, base.bias) if tensor is not None]
    return all(type(tensor) in (Tensor, nn.Parameter) and not tensor.requires_grad for tensor in tensors)


def _is_plain_module(module: nn.Module) -> bool:
    """Whether nobody listens in on a module or has given it another `forward`."""
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks) and (
        "forward" not in vars(module)
    )


def _weight(base: Any) -> Tensor:
    """W [m, n]; `Conv1D` stores it transposed."""
    weight: Tensor = base.weight
    return weight.T if type(base) is Conv1D else weight
