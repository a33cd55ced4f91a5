"""LoRA-XS: a small trained matrix between frozen singular vectors of the weight (Bałazy et al., arXiv 2405.17604).

    W₀ ≈ U_r·diag(S_r)·V_rᵀ,    A = diag(S_r)·V_rᵀ ∈ ℝ^{r×n}, B = U_r ∈ ℝ^{m×r}
    h = W₀x + s·B·R·Ax,    R ∈ ℝ^{r×r} ~ N(0, (10⁻⁵)²), s = α/r

Only R trains: its size does not depend on the layer's. The paper writes rows, x·A·R·B, so that the singular values lie
on the side of the input; so they do here. α is the rank, as in its scripts, and rank 64 that of its 7 B models; their
learning rates, 2e-3 and 4e-3, are higher than a LoRA's. Singular vectors come in two signs: of each pair, the one
whose largest entry on the input's side is positive.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from training.methods.contract import AttachContext, MethodCard
from training.methods.frozen_factors import FactorMethod, Factors, FactorSlot
from training.methods.injected import matrix
from training.methods.singular import leading
from training.methods.started_lora import StartedLoraConfig
from training.methods.targets import select, select_for_rank


class LoraXsConfig(StartedLoraConfig):
    """Hyper-parameters of LoRA-XS."""

    rank: int = Field(64, ge=1, description="r: R is r × r.")
    init_std: float = Field(1e-5, ge=0, description="Standard deviation of R at the start.")
    iterations: int | None = Field(
        10, ge=1, description="Subspace iterations of the randomised SVD of large layers; null for the full SVD."
    )
    store_factors: bool = Field(
        True, description="Store A and B, too; without them the file holds R, and loading decomposes the weights again."
    )


class CoreSlot(FactorSlot):
    """R of one layer, between its factors.

    Args:
        factors: A, B and R at the start.
        scale: s.
        dropout: of the input of A.
        stores_factors: whether A and B are stored.
    """

    def __init__(self, factors: Factors, scale: float, dropout: float, stores_factors: bool = True) -> None:
        super().__init__(factors, dropout, stores_factors)
        self.R = nn.Parameter(factors.start.clone())
        self.scale = scale

    def between(self, hidden: Tensor) -> Tensor:
        """s·R·hidden."""
        return self.scale * functional.linear(hidden, self.R)


class LoraXs(FactorMethod):
    """LoRA-XS; LoRA-SB starts it elsewhere."""

    name = "lora-xs"
    peft_type = "LORA_XS"
    config_type: Any = LoraXsConfig
    trained = "R"
    card = MethodCard(
        title="A small matrix between frozen singular vectors of the weights",
        family="reparameterised / low rank",
        paper="LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv 2405.17604",
        parameters="Σ r² over the adapted layers",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        sharding=False,  # the decomposition is of whole weights
    )

    def places(self, model: nn.Module, config: Any) -> list[str]:
        """The selected linear layers."""
        return select_for_rank(model, config.targets, config.exclude, config.rank)

    def derive(self, layer: nn.Module, config: Any) -> Factors:
        """The principal singular vectors; R at zero."""
        U, S, Vh = leading(matrix(layer), config.rank, config.iterations)
        sign = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).sign()
        return Factors(S[:, None] * sign * Vh, U * sign.T, torch.zeros(config.rank, config.rank))

    def factors(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: Any, context: AttachContext
    ) -> dict[str, Factors]:
        """The principal singular vectors of every layer, and R drawn."""
        found = super().factors(model, layers, config, context)
        return {
            name: f._replace(start=torch.empty_like(f.start).normal_(0, config.init_std)) for name, f in found.items()
        }

    def slot(self, factors: Factors, config: Any) -> FactorSlot:
        """R between the factors."""
        return CoreSlot(factors, config.scale, config.dropout, getattr(config, "store_factors", True))

    def count(self, model: nn.Module, config: Any) -> int:
        """Σ r²."""
        return len(select(model, config.targets, config.exclude)) * int(config.rank) ** 2


METHOD = LoraXs()
