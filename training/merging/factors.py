"""Averaging a LoRA's factors, as many tools do, to show what it costs: A and B are added separately.

    B̄Ā = (Σ wᵢsᵢ^½ Bᵢ)(Σ wᵢsᵢ^½ Aᵢ) = Σᵢ Σⱼ …BᵢAⱼ,    each factor with the root of |wᵢsᵢ|, the sign with A

The terms i ≠ j pair one adapter's B with another's A and are no adapter's update; it also depends on how each ΔW is
split into factors, which the model does not. peft's `combination_type="linear"` is this. The deviation that comes with
the result is from the exact Σ wᵢsᵢBᵢAᵢ.
"""

from collections.abc import Sequence
from math import copysign, sqrt
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from infra.errors import InvalidInput
from training.low_rank import LowRank, Part, norm, stacked, truncated
from training.merging.method import WEIGHTS_HELP, MergeMethod, given_weights


class Factors(MergeMethod):
    """B̄Ā."""

    title: ClassVar[str] = "Mean of the factors of LoRAs, with its cross terms; to compare with"
    paper: ClassVar[str] = "FLoRA, which shows why not, arXiv 2409.05976"

    weights: tuple[float, ...] | None = Field(None, description=f"{WEIGHTS_HELP} None given: 1/n each.")

    def low_rank(self, place: str, names: Sequence[str], updates: Sequence[LowRank]) -> Part:
        """B̄Ā, of LoRAs of one rank; those that leave the layer alone stay out of it."""
        weights = given_weights(self.weights, len(updates), 1 / len(updates))
        held = [(w, update) for w, update in zip(weights, updates, strict=True) if update.rank]
        if len({update.rank for _, update in held}) > 1:
            raise InvalidInput(
                f"The factors at {place} are of different ranks and have no mean.", "Merge the updates: linear"
            )
        mean = LowRank(
            sum((copysign(sqrt(abs(w)), w) * update.A for w, update in held), held[0][1].A * 0),
            sum((sqrt(abs(w)) * update.B for w, update in held), held[0][1].B * 0),
        )
        made = truncated(mean, self.rank, self.energy).update
        meant = stacked([update for _, update in held], [w for w, _ in held])
        return Part(made, norm(stacked([made, meant], [1, -1])), norm(meant))

    def entries(self, place: str, names: Sequence[str], updates: Tensor) -> Tensor:
        """Refused: there are no factors."""
        raise InvalidInput(f"'factors' averages the factors of LoRAs; {place} has none.", "Merge the updates: linear")
