"""LN-tuning: the norms' own scales and shifts train (Zhao et al., arXiv 2312.11420).

    h = w ⊙ norm(x) + b,    w and b of every LayerNorm or RMSNorm train, from their own values

peft puts a trainable copy beside each norm, so the base stays. Copies have the base's dtype, in which a step of 1e-4
is lost beside a weight of 1 if that is bfloat16: here they are held in float32, compute in it, and give their output
in the dtype of their input. The paper's best variant trains also the connector of a vision-language model; here there
are the norms only, found by class, not by peft's table of names. Merging puts the copy in the norm's place.
"""

from typing import Any

import peft
import torch
from peft import PeftConfig
from peft.tuners.ln_tuning.layer import LNTuningLayer
from pydantic import Field
from torch import Tensor, nn

from infra.errors import InvalidInput
from training.methods.contract import MethodCard, MethodConfig
from training.methods.peft_method import PeftAdapted, PeftMethod, adapter_layers
from training.methods.targets import EXCLUDE_HELP, check_exclude, excluded, norm_modules, shortest


class LnTuningConfig(MethodConfig):
    """Hyper-parameters of LN-tuning: only its places."""

    exclude: tuple[str, ...] = Field((), description=EXCLUDE_HELP)


class LnTuningAdapted(PeftAdapted):
    """Copies of the norms."""

    def merge(self) -> nn.Module:
        """A copy of the base with these norms, in the base's dtype."""
        merged = super().merge()
        norms = norm_modules(merged)
        for name, norm in norm_modules(self.model.get_base_model()).items():
            norms[name].to(next(norm.parameters()).dtype)
            norms[name]._forward_pre_hooks.clear()
            norms[name]._forward_hooks.clear()
        return merged


class LnTuning(PeftMethod[LnTuningConfig]):
    """LN-tuning."""

    name = "ln-tuning"
    peft_type = "LN_TUNING"
    config_type = LnTuningConfig
    adapted_type = LnTuningAdapted
    card = MethodCard(
        title="The norms' scales and shifts",
        family="selective / norms",
        paper="Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, arXiv 2312.11420",
        parameters="Σ d, or 2d with a bias, over the norms of width d",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        sharding=False,
    )

    def peft_config(self, model: nn.Module, config: LnTuningConfig) -> PeftConfig:
        """`peft.LNTuningConfig` on exactly the norms found."""
        return peft.LNTuningConfig(target_modules=shortest(model, list(self._norms(model, config))))

    def is_active(self, adapted: PeftAdapted) -> bool:
        """peft's copies are there."""
        return bool(adapter_layers(adapted, "ln_tuning_layers"))

    def count(self, model: nn.Module, config: LnTuningConfig) -> int:
        """The norms' weights and biases."""
        norms = self._norms(model, config).values()
        return sum(parameter.numel() for norm in norms for parameter in norm.parameters(recurse=False))

    def _norms(self, model: nn.Module, config: LnTuningConfig) -> dict[str, nn.Module]:
        check_exclude(model, config.exclude)
        norms = {name: norm for name, norm in norm_modules(model).items() if not excluded(name, config.exclude)}
        if not norms:
            raise InvalidInput(f"{type(model).__name__} has no norm with weights for ln-tuning.", "Try: lora, ia3")
        return norms

    def _put(self, model: nn.Module, peft_config: PeftConfig, name: str) -> PeftAdapted:
        adapted = super()._put(model, peft_config, name)
        for layer in adapted.model.modules():
            if isinstance(layer, LNTuningLayer) and name in layer.ln_tuning_layers:
                norm = layer.ln_tuning_layers[name].float()
                norm.register_forward_pre_hook(_widen)
                norm.register_forward_hook(_narrow)
        return adapted


def _widen(norm: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The norm's input in its own dtype; `_narrow` undoes it."""
    x, *others = args
    norm._outer_dtype = x.dtype
    return (x.to(torch.float32), *others)


def _narrow(norm: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    del args
    return output.to(norm._outer_dtype)


METHOD = LnTuning()
