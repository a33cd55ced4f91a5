"""Natural GaLore: GaLore whose projected gradient is preconditioned by an empirical Fisher matrix (arXiv 2410.16029).

    F = λI + GGᵀ,    G = [g₁ … g_s] ∈ ℝ^{k×s}: the last s projected gradients, flattened; g_s is the present one
    g̃ = F⁻¹g_s = G(λI + GᵀG)⁻¹e_s

Adam's moments are those of g̃; the rest is GaLore's (galore.py). The second form is Woodbury's identity, used as
g/λ − G(I + GᵀG/λ)⁻¹Gᵀg/λ² in the released code, with the difference of two large terms carried out: where ‖g‖² ≫ λ,
almost all of g/λ cancels. With ‖g‖² ≪ λ, g̃ ≈ g/λ, and Adam, which does not see the scale, makes plain GaLore of it:
λ is absolute, and the clipping of gradients changes the method. With ‖g‖² ≫ λ, Gᵀg̃ ≈ e_s: g̃ is orthogonal to the
history's other gradients, so that what every update asks for is dropped, and training stalls. λ should not be far below
the squared norm of one layer's gradient after clipping.

Everything of it is computed in float64, since GᵀG/λ has the condition ‖g‖²/λ. The history is kept as it comes, float32:
its products in float64 are the same as if it were wider. It is not cleared when the subspace changes, as in the code.

Where the code and the paper differ: the paper writes a one-sided R [r, n]; the code projects both sides, R [r, r],
which is the default here (`projection: std` for the paper's). Its Tucker decomposition of a matrix is, at the optimum,
the singular value decomposition that is used here. The history costs s·k elements a layer, k = r² or r·max(m, n),
against the paper's "no additional memory". The online variants are left out. Defaults are the code's.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from training.methods.contract import MethodCard
from training.methods.galore import Galore, GaloreConfig
from training.methods.projected_adamw import ProjectedAdamW, Projection


class NaturalGaloreConfig(GaloreConfig):
    """Hyper-parameters of Natural GaLore."""

    projection: Projection = Field("full", description=GaloreConfig.model_fields["projection"].description)
    history: int = Field(20, ge=1, description="s, the projected gradients that the Fisher matrix is made of.")
    damping: float = Field(1e-3, gt=0, description="λ, beside the squared norm of a projected gradient.")


class NaturalProjectedAdamW(ProjectedAdamW):
    """`ProjectedAdamW` on g̃; the state holds `history` [s, k], too, in which the newest replaces the oldest.

    Args:
        projected: as there.
        others: as there.
        lr: as there.
        weight_decay: as there.
        history: s.
        damping: λ.
        options: as there.
    """

    def __init__(
        self,
        projected: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        *,
        history: int,
        damping: float,
        **options: Any,
    ) -> None:
        super().__init__(projected, others, lr, weight_decay, **options)
        self.history = history
        self.damping = damping

    def low_rank_gradient(self, gradient: Tensor, state: dict[str, Any], step: int) -> Tensor:
        """g̃ for R."""
        if step == 0:  # a row of zeros is no gradient: it adds nothing to F
            state["history"] = gradient.new_zeros(self.history, gradient.numel())
        newest = step % self.history
        state["history"][newest] = gradient.flatten()
        return natural(state["history"], newest, self.damping).view_as(gradient)


def natural(history: Tensor, newest: int, damping: float) -> Tensor:
    """g̃ [k] in the history's precision, computed in float64.

    Args:
        history: Gᵀ [s, k].
        newest: the row of the present gradient.
        damping: λ.
    """
    G = history.double()
    kernel = G @ G.T
    kernel.diagonal().add_(damping)
    unit = torch.zeros(len(G), 1, dtype=G.dtype, device=G.device)
    unit[newest] = 1
    # Not checked: what is no number is told by whoever runs the training.
    factor, _ = torch.linalg.cholesky_ex(kernel)
    return (torch.cholesky_solve(unit, factor).squeeze(1) @ G).to(history.dtype)


class NaturalGalore(Galore):
    """Natural GaLore."""

    name = "natural-galore"
    peft_type = "REGRAFT_NATURAL_GALORE"
    config_type = NaturalGaloreConfig
    optimizer_type = NaturalProjectedAdamW
    card = MethodCard(
        title="GaLore with the natural gradient of the last few updates",
        family="selective / memory-efficient optimiser",
        paper="Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning, arXiv 2410.16029",
        parameters="|θ|; optimiser state (m + n)r + (2 + s)r² instead of 2mn",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        changes_base=True,
        sharding=False,
    )


METHOD = NaturalGalore()
