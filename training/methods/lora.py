"""LoRA: low-rank adaptation of linear layers (Hu et al., arXiv 2106.09685).

    h = W₀x + (α/r)·BAx,    A ∈ ℝ^{r×n}, B ∈ ℝ^{m×r}, W₀ ∈ ℝ^{m×n} frozen

B starts at zero, so that a fresh adapter changes nothing. Where peft and the paper differ: the paper draws A from a
Gaussian, peft from Kaiming's uniform distribution; the paper adapts the query and value projections, later practice
(and `targets: all-linear`, the default here) every linear layer. α defaults to the rank, as in the paper's §4.1 ("we
simply set α to the first r we try"), so that α/r = 1.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import peft
import torch
from peft import PeftConfig
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.errors import CorruptArtifact, InvalidInput
from training.methods.contract import MethodCard, MethodConfig
from training.methods.foreign_config import ForeignLora
from training.methods.peft_method import PeftAdapted, PeftMethod, adapter_layers
from training.methods.targets import (
    ALL_LINEAR,
    EXCLUDE_HELP,
    TARGETS_HELP,
    Targets,
    linear_modules,
    select,
    select_with_room,
    shape,
    shortest,
)

PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # peft's other starts also change the base's weights

LARGEST = sqrt(torch.finfo(torch.float32).max)  # of the norm of an update


class LoraConfig(MethodConfig):
    """Hyper-parameters of LoRA."""

    rank: int = Field(8, ge=1, description="r, the inner dimension of BA.")
    alpha: int | None = Field(None, ge=1, description="α of the scale α/r; none given: the rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an input of A in training.")
    targets: Targets = Field(ALL_LINEAR, description=TARGETS_HELP)
    exclude: tuple[str, ...] = Field((), description=EXCLUDE_HELP)


class Lora(PeftMethod[LoraConfig]):
    """LoRA; its relatives in peft's LORA type (rsLoRA, DoRA) change one line each."""

    name = "lora"
    peft_type = "LORA"
    config_type = LoraConfig
    card = MethodCard(
        title="Low-rank update of linear layers",
        family="reparameterised / low rank",
        paper="LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685",
        parameters="Σ r(m + n) over the adapted m × n layers",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
    )

    def peft_config(self, model: nn.Module, config: LoraConfig) -> PeftConfig:
        """`peft.LoraConfig` on exactly the selected layers."""
        layers = linear_modules(model)
        names = select_with_room(model, config.targets, config.exclude, config.rank)
        return peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or config.rank,
            lora_dropout=config.dropout,
            target_modules=shortest(model, names),
            fan_in_fan_out=all(isinstance(layers[name], Conv1D) for name in names),
            **self.variant(),
        )

    def variant(self) -> dict[str, Any]:
        """What sets a relative apart in `peft.LoraConfig`."""
        return {}

    def recognises(self, adapter_config: Mapping[str, Any]) -> bool:
        """A LORA of peft that is neither rsLoRA nor DoRA."""
        return (
            super().recognises(adapter_config)
            and not adapter_config.get("use_rslora")
            and not adapter_config.get("use_dora")
        )

    def readable(self, adapter_config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        """As stored; refused where peft would change the base's own tensors for it, or make others than are stored."""
        start, bias = adapter_config.get("init_lora_weights", True), adapter_config.get("bias", "none")
        if start not in PLAIN_STARTS or bias != "none":
            raise InvalidInput(
                f"This LoRA changes the base model itself (init_lora_weights: {start}, bias: {bias}).",
                "Convert it to a plain LoRA: peft's save_pretrained(path_initial_model_for_weight_conversion=…).",
            )
        config = ForeignLora.read(adapter_config)
        for key, tensor in tensors.items():
            place, _, factor = key.removesuffix(".weight").rpartition(".")
            if factor in ("lora_A", "lora_embedding_A") and tensor.ndim and not config.target_parameters:
                config.require_rank(place, len(tensor))
                other = key.replace(f".{factor}", f".{factor[:-1]}B")
                _require_float32(place, config.scale(place), tensor, tensors.get(other))
        return adapter_config

    def is_active(self, adapted: PeftAdapted) -> bool:
        """peft's LoRA layers are there, and of the plain kind."""
        layers = adapter_layers(adapted, "lora_A") or adapter_layers(adapted, "lora_embedding_A")
        return bool(layers) and all(self.is_layer_active(layer, adapted) for layer in layers)

    def is_layer_active(self, layer: Any, adapted: PeftAdapted) -> bool:
        """Whether one of peft's layers computes this relative of LoRA."""
        return adapted.name not in layer.lora_variant

    def count(self, model: nn.Module, config: LoraConfig) -> int:
        """Σ r(m + n)."""
        layers = linear_modules(model)
        return sum(config.rank * sum(shape(layers[name])) for name in select(model, config.targets, config.exclude))


def _require_float32(place: str, scale: float, A: Tensor, B: Tensor | None) -> None:
    """Raise `CorruptArtifact` where s·BA, or the square of it that a norm behind the layer takes, is beyond float32."""
    if B is not None and abs(scale) * float(A.double().norm()) * float(B.double().norm()) > LARGEST:
        raise CorruptArtifact(
            f"{place} gets an update beyond float32: its scale is {scale:.3g}.", "Is its alpha or scale right?"
        )


METHOD = Lora()
