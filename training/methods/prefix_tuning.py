"""Prefix tuning: trained keys and values before every layer's own (Li & Liang, arXiv 2101.00190).

    head = Attn(xW_q, [P_k; xW_k], [P_v; xW_v]),    P = MLP(P′) while training, P ∈ ℝ^{p×2Ld}

The paper trains P through an MLP on a smaller P′, which it then throws away; here MLP and P′ are stored beside P
("projection.…"), so that training can go on, and an adapter stored without them (peft's) goes on as plain P. p = 10 and
the MLP's 512 are the paper's table-to-text setting. Where peft and the paper differ: P′ has the width of the keys, and
an encoder-decoder has prefixes on the decoder's self-attention only. The prefix travels in the key-value cache, which
gradient checkpointing switches off, so that the two are refused together.
"""

from collections.abc import Mapping
from typing import Any

import peft
from peft import PeftConfig, TaskType
from pydantic import Field
from torch import Tensor, nn

from infra.errors import InvalidInput
from training.methods.contract import MethodCard, MethodConfig, check_fit
from training.methods.soft_prompt import SoftPromptAdapted, SoftPromptMethod, check_positions, task_type

PROJECTION = "projection."


class PrefixTuningConfig(MethodConfig):
    """Hyper-parameters of prefix tuning."""

    virtual_tokens: int = Field(10, ge=1, description="p, the number of trained keys and values a layer.")
    projection: bool = Field(True, description="Train the prefix through an MLP.")
    projection_size: int = Field(512, ge=1, description="Hidden width of that MLP.")


class PrefixAdapted(SoftPromptAdapted):
    """A prefix, with the MLP that makes it where there is one."""

    def tensors(self) -> dict[str, Tensor]:
        """`prompt_embeddings` (p, 2Ld), and the MLP's own tensors under "projection."."""
        tensors = super().tensors()
        if self.peft_config.prefix_projection:
            tensors |= {PROJECTION + name: tensor.detach() for name, tensor in self.encoder.state_dict().items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` in place of the adapter's own; with an MLP, the prefix follows from it."""
        if not self.peft_config.prefix_projection:
            return super().restore(tensors)
        check_fit(self.name, self.tensors(), tensors)
        own = {name.removeprefix(PROJECTION): value for name, value in tensors.items() if name.startswith(PROJECTION)}
        self.encoder.load_state_dict(own)
        return None


class PrefixTuning(SoftPromptMethod[PrefixTuningConfig]):
    """Prefix tuning."""

    name = "prefix-tuning"
    peft_type = "PREFIX_TUNING"
    config_type = PrefixTuningConfig
    adapted_type = PrefixAdapted
    card = MethodCard(
        title="Trained keys and values before every layer's own",
        family="additive / soft prompt",
        paper="Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv 2101.00190",
        parameters="2pLd; through an MLP of width h: pd + (d + 1)h + (h + 1)2Ld",
        backbones=("llama", "gpt2", "gemma3_text", "t5"),
        merge="no",
        identity_at_init=False,
        packing=False,
        checkpointing=False,
    )

    def peft_config(self, model: nn.Module, config: PrefixTuningConfig) -> PeftConfig:
        """`peft.PrefixTuningConfig` with the shapes of the model's keys and values."""
        kind = task_type(model)
        if kind == TaskType.FEATURE_EXTRACTION:
            raise InvalidInput(f"{type(model).__name__} keeps no keys and values for a prefix.", "Try: prompt-tuning")
        if model.is_activation_checkpointing:
            raise InvalidInput(
                "A prefix lives in the key-value cache, which gradient checkpointing switches off.",
                "Set gradient_checkpointing: false, or use prompt-tuning.",
            )
        check_positions(model, config.virtual_tokens)
        layers, heads, size = key_shape(model)
        return peft.PrefixTuningConfig(
            task_type=kind,
            num_virtual_tokens=config.virtual_tokens,
            num_layers=layers,
            num_attention_heads=heads,
            token_dim=heads * size,
            prefix_projection=config.projection,
            encoder_hidden_size=config.projection_size,
        )

    def readable(self, adapter_config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        """A plain prefix where the MLP was thrown away."""
        projected = any(name.startswith(PROJECTION) for name in tensors)
        return adapter_config | {"prefix_projection": projected}

    def count(self, model: nn.Module, config: PrefixTuningConfig) -> int:
        """2pLd, or pd + (d + 1)h + (h + 1)2Ld through the MLP."""
        layers, heads, size = key_shape(model)
        p, h, d = config.virtual_tokens, config.projection_size, heads * size
        return p * d + (d + 1) * h + (h + 1) * 2 * layers * d if config.projection else 2 * p * layers * d


def key_shape(model: nn.Module) -> tuple[int, int, int]:
    """(layers, key-value heads, size of a head) of the model's decoder."""
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    return layers, getattr(config, "num_key_value_heads", None) or heads, size


METHOD = PrefixTuning()
