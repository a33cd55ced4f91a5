"""(IA)³: scaling of keys, values and feed-forward activations (Liu et al., arXiv 2205.05638, T-Few).

    K ← l_k ⊙ K,    V ← l_v ⊙ V,    h ← W₂(l_ff ⊙ γ(W₁x))

All vectors start at one, so that a fresh adapter changes nothing. The places are found by the names that transformers'
families use. Where peft and the paper differ: peft's own table scales queries instead of keys on Gemma and Qwen and
the attention's output layer too on BERT; here they are the paper's on every family. A fused query-key-value layer is
scaled whole, queries included.
"""

import peft
from peft import PeftConfig
from pydantic import Field
from torch import nn
from transformers.pytorch_utils import Conv1D

from training.methods.contract import MethodCard, MethodConfig
from training.methods.peft_method import PeftAdapted, PeftMethod, adapter_layers
from training.methods.sublayers import FEEDFORWARD_OUTPUT, select_known
from training.methods.targets import Targets, linear_modules, shape, shortest

KEYS_VALUES = (
    r"(.*\.)?(k|v|key|value|[kv]_proj|key_proj|value_proj|[kv]_lin|to_[kv]"
    r"|c_attn|qkv|qkv_proj|in_proj|query_key_value|Wqkv)"
)


class Ia3Config(MethodConfig):
    """Hyper-parameters of (IA)³: only its places."""

    targets: Targets | None = Field(
        None, description="Layers whose outputs are scaled; none given: the key and value projections."
    )
    feedforward: Targets | None = Field(
        None, description="Layers whose inputs are scaled; none given: the second layer of each feed-forward block."
    )


class Ia3(PeftMethod[Ia3Config]):
    """(IA)³."""

    name = "ia3"
    peft_type = "IA3"
    config_type = Ia3Config
    card = MethodCard(
        title="Learned scales on keys, values and feed-forward activations",
        family="additive / scaling",
        paper="Few-Shot Parameter-Efficient Fine-Tuning is Better … than In-Context Learning, arXiv 2205.05638",
        parameters="Σ d_k + d_v + d_ff over the layers",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
    )

    def peft_config(self, model: nn.Module, config: Ia3Config) -> PeftConfig:
        """`peft.IA3Config` on exactly the places found."""
        outputs, inputs = places(model, config)
        layers = linear_modules(model)
        feedforward = shortest(model, inputs)
        return peft.IA3Config(
            target_modules=[*shortest(model, outputs), *feedforward],
            feedforward_modules=feedforward,
            fan_in_fan_out=all(isinstance(layers[name], Conv1D) for name in [*outputs, *inputs]),
        )

    def is_active(self, adapted: PeftAdapted) -> bool:
        """peft's (IA)³ layers are there."""
        return bool(adapter_layers(adapted, "ia3_l"))

    def count(self, model: nn.Module, config: Ia3Config) -> int:
        """Outputs of the scaled projections plus inputs of the scaled feed-forward layers."""
        layers = linear_modules(model)
        outputs, inputs = places(model, config)
        return sum(shape(layers[name])[0] for name in outputs) + sum(shape(layers[name])[1] for name in inputs)


def places(model: nn.Module, config: Ia3Config) -> tuple[list[str], list[str]]:
    """The layers whose outputs, and those whose inputs, are scaled.

    Raises:
        InvalidInput: the model names its layers in no known way and the configuration does not say.
    """
    outputs = select_known(model, config.targets, KEYS_VALUES, "ia3", "targets")
    inputs = select_known(model, config.feedforward, FEEDFORWARD_OUTPUT, "ia3", "feedforward")
    return [name for name in outputs if name not in inputs], inputs


METHOD = Ia3()
