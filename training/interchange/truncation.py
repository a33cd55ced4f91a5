"""The best approximation of an update by a lower rank, and how much is lost by it.

ΔW = UΣVᵀ ≈ B A,    B = U_r Σ_r^½,  A = Σ_r^½ V_rᵀ      (Eckart and Young, 1936)

loss = ‖ΔW − BA‖_F / ‖ΔW‖_F,  and over all layers  (Σ‖ΔW − BA‖_F² / Σ‖ΔW‖_F²)^½
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import hypot

from torch import Tensor

from training import low_rank
from training.interchange.lora_layers import LoraLayer
from training.low_rank import LowRank


@dataclass(frozen=True)
class Loss:
    """What a truncation lost.

    Attributes:
        layers: ‖ΔW − BA‖_F / ‖ΔW‖_F of each layer.
        total: the same over all layers together.
        left_out: ‖ΔW‖_F / ‖W‖_F of what changed and no LoRA can say: norms, biases, embeddings; not part of `total`.
    """

    layers: dict[str, float]
    total: float
    left_out: dict[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that lost most."""
        return max(self.layers.items(), key=lambda item: item[1])


@dataclass(frozen=True)
class Keep:
    """How much of an update is kept: a rank, or the lowest rank that holds a share of ‖ΔW‖_F²."""

    rank: int | None = None
    energy: float | None = None


Update = Tensor | LoraLayer  # ΔW [m, n], or its factors


def truncated(updates: Iterable[tuple[str, Update]], keep: Keep) -> tuple[dict[str, LoraLayer], Loss]:
    """Each layer's update as a LoRA of scale 1, and the loss.

    With a rank, every layer has exactly that rank, padded with zeros where less is enough: servers like one rank. What
    does not change at all is left out.

    Args:
        updates: ΔW or its factors by the layer's name, drawn one by one.
        keep: how much to keep.
    """
    layers, losses, errors, norms = {}, {}, [], []
    for place, update in updates:
        change = update if isinstance(update, Tensor) else LowRank(update.scale * update.A.double(), update.B.double())
        part = low_rank.truncated(change, keep.rank, keep.energy)
        if not part.norm:
            continue
        A, B = (factor.float().cpu().contiguous() for factor in (part.update.A, part.update.B))
        layer = LoraLayer(A, B)
        layers[place] = layer.padded(keep.rank) if keep.rank is not None else layer
        losses[place] = part.error / part.norm
        errors.append(part.error)
        norms.append(part.norm)
    return layers, Loss(losses, hypot(*errors) / hypot(*norms) if norms else 0.0, {})
