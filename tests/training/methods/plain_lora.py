"""A stock LoRA of peft, made of what an adapter exports."""

from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from training.methods.injected import InjectedAdapted


def weight_of(layer: Any) -> Tensor:
    """W [m, n] of a linear layer."""
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().clone()


def plain_lora(base: nn.Module, adapted: InjectedAdapted) -> peft.PeftModel:
    """peft's LoRA of scale 1 on the bare `base`, of every slot's `low_rank`."""
    pairs = {name: slot.low_rank(weight_of(base.get_submodule(name))) for name, slot in adapted.slots().items()}
    ranks = {name: len(A) for name, (A, _) in pairs.items()}
    config = peft.LoraConfig(
        target_modules=list(pairs),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=all(isinstance(base.get_submodule(name), Conv1D) for name in pairs),
    )
    stock = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            layer: Any = stock.base_model.model.get_submodule(name)
            assert layer.scaling["default"] == 1
            for factor, own in ((A, layer.lora_A["default"].weight), (B, layer.lora_B["default"].weight)):
                assert factor.dtype == torch.float32
                assert factor.shape == own.shape
                own.copy_(factor)
    return stock
