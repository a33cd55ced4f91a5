"""A stock peft LoRA made of given pairs: what an update of low rank is exported as."""

from collections.abc import Mapping

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


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
            layer = stock.get_base_model().get_submodule(name)
            assert layer.scaling["default"] == 1
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B)
    return stock
