"""rsLoRA: rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732).

    h = W₀x + (α/√r)·BAx

LoRA's scale α/r lets the update fade as the rank grows; with α/√r outputs and gradients keep their size at any rank.
As in LoRA here, α defaults to the rank (the scale is then √r). peft and the paper agree.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isclose, sqrt
from typing import Any

from training.methods.lora import METHOD as LORA
from training.methods.lora import Lora
from training.methods.peft_method import PeftAdapted


class RsLora(Lora):
    """LoRA with the scale α/√r."""

    name = "rslora"
    card = replace(
        LORA.card,
        title="LoRA whose scale does not fade at high rank",
        paper="A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv 2312.03732",
    )

    def variant(self) -> dict[str, Any]:
        """peft's flag."""
        return {"use_rslora": True}

    def recognises(self, adapter_config: Mapping[str, Any]) -> bool:
        """A LORA of peft with use_rslora, but not DoRA."""
        return (
            adapter_config.get("peft_type") == self.peft_type
            and bool(adapter_config.get("use_rslora"))
            and not adapter_config.get("use_dora")
        )

    def is_layer_active(self, layer: Any, adapted: PeftAdapted) -> bool:
        """The scale is α/√r."""
        rank, alpha = layer.r[adapted.name], layer.lora_alpha[adapted.name]
        return super().is_layer_active(layer, adapted) and isclose(layer.scaling[adapted.name], alpha / sqrt(rank))


METHOD = RsLora()
