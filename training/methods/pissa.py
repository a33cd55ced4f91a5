"""PiSSA: LoRA that starts as the weight's principal singular vectors (Meng et al., arXiv 2404.02948).

    W = U·diag(S)·Vᵀ,    s·B₀A₀ = U_r·diag(S_r)·V_rᵀ,    A₀ = diag(√(S_r/s))·V_rᵀ,    B₀ = U_r·diag(√(S_r/s))

What trains is the part of the weight that matters most, instead of noise beside it. The paper replaces W by what is
left of it; here the start is subtracted in the layer (see started_lora.py). Its learning rate, 2e-5, is lower than a
LoRA's, since the factors are as large as the weight. Rank 128 is the paper's for models of 7 B.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import nn

from training.methods.contract import AttachContext, MethodCard
from training.methods.injected import matrix
from training.methods.plain_lora import Pair
from training.methods.singular import leading
from training.methods.started_lora import StartedLora, StartedLoraConfig


class PissaConfig(StartedLoraConfig):
    """Hyper-parameters of PiSSA."""

    rank: int = Field(128, ge=1, description="r, the number of principal components that train.")
    iterations: int | None = Field(
        16, ge=1, description="Subspace iterations of the randomised SVD of large layers; null for the full SVD."
    )


class Pissa(StartedLora):
    """PiSSA."""

    name = "pissa"
    config_type = PissaConfig
    card = MethodCard(
        title="LoRA that starts as the principal part of the weights",
        family="reparameterised / low rank, initialisation",
        paper="PiSSA: Principal Singular Values and Singular Vectors Adaptation, arXiv 2404.02948",
        parameters="Σ r(m + n) over the adapted m × n layers",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        sharding=False,  # the decomposition is of whole weights
    )

    def pairs(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: Any, context: AttachContext
    ) -> dict[str, Pair]:
        """The principal components of every layer, the square root of S on either side."""
        del model
        pairs = {}
        for number, (name, layer) in enumerate(layers.items(), start=1):
            U, S, Vh = leading(matrix(layer), config.rank, config.iterations)
            root = (S / config.scale).sqrt()
            pairs[name] = (root[:, None] * Vh, U * root)
            context.tell("principal components", number, len(layers))
        return pairs


METHOD = Pissa()
