"""DoRA: weight-decomposed low-rank adaptation (Liu et al., arXiv 2402.09353).

    W′ = m · (W₀ + (α/r)·BA) / ‖W₀ + (α/r)·BA‖_c,    m ∈ ℝ^{m×1} trained, from ‖W₀‖_c

Magnitude and direction of the weights learn apart; ‖·‖_c is the norm of each output's weight vector (a row of PyTorch's
W, a column in the paper's notation). peft, like the paper's §4.3, treats the norm as a constant in the backward pass.
Rank 32, α = 2r and dropout 0.05 are the paper's commonsense-reasoning setting.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft import PeftConfig
from peft.tuners.lora.variants import DoraLinearVariant
from pydantic import Field
from torch import nn

from training.methods.lora import METHOD as LORA
from training.methods.lora import Lora, LoraConfig
from training.methods.peft_method import PeftAdapted
from training.methods.targets import linear_modules, select, shape


class DoraConfig(LoraConfig):
    """Hyper-parameters of DoRA."""

    rank: int = Field(32, ge=1, description="r, the inner dimension of BA.")
    alpha: int | None = Field(None, ge=1, description="α of the scale α/r; none given: twice the rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Probability of dropping an input of A in training.")


class Dora(Lora):
    """LoRA on the direction, and a trained magnitude for every output."""

    name = "dora"
    config_type = DoraConfig
    card = replace(
        LORA.card,
        title="LoRA on the weights' direction, with a magnitude of its own",
        paper="DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353",
        parameters="Σ r(m + n) + m over the adapted m × n layers",
        sharding=False,  # its magnitudes are the norms of whole weights
    )

    def peft_config(self, model: nn.Module, config: LoraConfig) -> PeftConfig:
        """`peft.LoraConfig` with α = 2r where none is given."""
        return super().peft_config(model, config.model_copy(update={"alpha": config.alpha or 2 * config.rank}))

    def variant(self) -> dict[str, Any]:
        """peft's flag."""
        return {"use_dora": True}

    def recognises(self, adapter_config: Mapping[str, Any]) -> bool:
        """A LORA of peft with use_dora."""
        return adapter_config.get("peft_type") == self.peft_type and bool(adapter_config.get("use_dora"))

    def is_layer_active(self, layer: Any, adapted: PeftAdapted) -> bool:
        """peft's DoRA variant is in place."""
        return isinstance(layer.lora_variant.get(adapted.name), DoraLinearVariant)

    def count(self, model: nn.Module, config: LoraConfig) -> int:
        """Σ r(m + n) + m."""
        layers = linear_modules(model)
        names = select(model, config.targets, config.exclude)
        return super().count(model, config) + sum(shape(layers[name])[0] for name in names)


METHOD = Dora()
