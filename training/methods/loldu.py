"""LoLDU: the first diagonal entries of the weight's LDU factorisation train (Shi et al., arXiv 2410.13618).

    W₀ = P·L·diag(D)·U,    B = (P·L)[:, :r] ∈ ℝ^{m×r}, A = U[:r] ∈ ℝ^{r×n}, z₀ = D[:r]
    h = W₀x + B((σ·z − σ₀·z₀) ⊙ Ax),    z starts at z₀, σ at σ₀ = α/r

P is the permutation of partial pivoting, L unit lower and U unit upper trapezoidal; the entries kept are the first in
the order of the pivots, not the largest. The paper replaces W₀ by W₀ − σ₀·B·diag(z₀)·A and adds σ·B·diag(z)·A; the
difference above is the same function and leaves the base as it is. P is folded into B once, by its indices.

r is cut to a layer's smaller side: 768, the authors' default, means the whole diagonal of most layers. z is not
redrawn as their `init_method` allows: with σ frozen, as their parameter filter leaves it, the function is one of
z − z₀ alone, and where z₀ lies makes no difference. Where a pivot is zero, the row of U stays undivided and z₀ is 1,
which is the same product; theirs divides by zero. U's rows are as large as the pivots are small.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from training.methods.contract import MethodCard, MethodConfig
from training.methods.frozen_factors import FactorMethod, Factors, FactorSlot
from training.methods.injected import matrix
from training.methods.targets import ALL_LINEAR, EXCLUDE_HELP, TARGETS_HELP, Targets, linear_modules, select, shape


class LolduConfig(MethodConfig):
    """Hyper-parameters of LoLDU."""

    rank: int = Field(768, ge=1, description="r, the diagonal entries that train; at most a layer's smaller side.")
    alpha: float = Field(1.0, gt=0, description="α of the scale σ₀ = α/r.")
    train_scale: bool = Field(False, description="Train σ, too, one number a layer.")
    targets: Targets = Field(ALL_LINEAR, description=TARGETS_HELP)
    exclude: tuple[str, ...] = Field((), description=EXCLUDE_HELP)
    store_factors: bool = Field(
        False,
        description="Store A and B, too; without them the file holds z, and loading factorises the weights again.",
    )


class LolduSlot(FactorSlot):
    """z of one layer, between its factors.

    Args:
        factors: A, B and z₀.
        scale: σ₀.
        train_scale: whether σ trains.
        stores_factors: whether A and B are stored.
    """

    z0: Tensor

    def __init__(self, factors: Factors, scale: float, train_scale: bool, stores_factors: bool) -> None:
        super().__init__(factors, dropout=0.0, stores_factors=stores_factors)
        self.z = nn.Parameter(factors.start.clone())
        self.register_buffer("z0", factors.start.clone())
        self.scale = scale
        self.sigma = nn.Parameter(torch.tensor(scale)) if train_scale else None

    def between(self, hidden: Tensor) -> Tensor:
        """(σ·z − σ₀·z₀) ⊙ hidden."""
        if self.sigma is None:
            return hidden * (self.scale * (self.z - self.z0))
        return hidden * (self.sigma * self.z - self.scale * self.z0)


class Loldu(FactorMethod):
    """LoLDU."""

    name = "loldu"
    peft_type = "LOLDU"
    config_type = LolduConfig
    trained = "z"
    card = MethodCard(
        title="The diagonal of the weights' LDU factorisation",
        family="reparameterised / low rank",
        paper="LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition, arXiv 2410.13618",
        parameters="Σ min(r, m, n) over the adapted m × n layers, one more each with σ",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        sharding=False,  # the factorisation is of whole weights
    )

    def places(self, model: nn.Module, config: Any) -> list[str]:
        """The selected linear layers."""
        return select(model, config.targets, config.exclude)

    def derive(self, layer: nn.Module, config: Any) -> Factors:
        """P·L, U and D up to r."""
        W = matrix(layer)
        rank = min(config.rank, *W.shape)
        packed, swaps, _ = torch.linalg.lu_factor_ex(W)  # of a singular matrix, too
        order = list(range(len(W)))
        for row, other in enumerate((swaps - 1).tolist()):
            order[row], order[other] = order[other], order[row]
        L = packed[:, :rank].tril(-1)
        L.diagonal().fill_(1)
        U, D = packed[:rank].triu(), packed.diagonal()[:rank]
        D = torch.where(D.abs() > torch.finfo(D.dtype).eps * W.abs().max(), D, 1)
        B = torch.empty_like(L)
        B[torch.tensor(order, device=B.device)] = L  # W[order] = L·diag(D)·U
        return Factors(U / D[:, None], B, D)

    def slot(self, factors: Factors, config: Any) -> FactorSlot:
        """z between the factors."""
        return LolduSlot(factors, config.alpha / len(factors.start), config.train_scale, config.store_factors)

    def count(self, model: nn.Module, config: Any) -> int:
        """Σ min(r, m, n), one more a layer where σ trains."""
        layers = linear_modules(model)
        names = select(model, config.targets, config.exclude)
        return sum(min(config.rank, *shape(layers[name])) + config.train_scale for name in names)


METHOD = Loldu()
