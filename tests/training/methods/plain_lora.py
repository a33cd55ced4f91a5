"""A stock peft LoRA made of given pairs: what an update of low rank is exported as."""

from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from training.methods.injected import InjectedAdapted


def weight_of(layer: Any) -> Tensor:
    """W [m, n] of a linear layer."""
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().clone()


def stock_lora(model: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> peft.PeftModel:
    """`model` under peft's LoRA of scale 1 with A [r, n] and B [m, r] of each layer."""
    ranks = {name: len(A) for name, (A, _) in pairs.items()}
    transposed = {isinstance(model.get_submodule(name), Conv1D) for name in pairs}
    stock = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=1,
            lora_alpha=1,
            target_modules=list(pairs),
            rank_pattern={f"^{name}": rank for name, rank in ranks.items()},
            alpha_pattern={f"^{name}": rank for name, rank in ranks.items()},
            fan_in_fan_out=transposed == {True},
        ),
    )
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            layer: Any = stock.get_base_model().get_submodule(name)
            assert layer.scaling["default"] == 1
            for factor, own in ((A, layer.lora_A["default"].weight), (B, layer.lora_B["default"].weight)):
                assert factor.shape == own.shape
                own.copy_(factor)
    return stock


def plain_lora(base: nn.Module, adapted: InjectedAdapted) -> peft.PeftModel:
    """peft's LoRA of scale 1 on the bare `base`, of every slot's `low_rank`."""
    pairs = {name: slot.low_rank(weight_of(base.get_submodule(name))) for name, slot in adapted.slots().items()}
    assert {factor.dtype for pair in pairs.values() for factor in pair} == {torch.float32}
    return stock_lora(base, pairs)
