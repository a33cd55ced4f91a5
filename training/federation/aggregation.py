"""What a server makes of its clients' LoRAs, of whatever ranks (FLoRA, Wang et al., arXiv 2409.05976).

    stack      ΔW = Σ pₖsₖBₖAₖ, as one LoRA of rank Σrₖ: exact
    average    ΔW = (Σ pₖBₖ)(Σ pₖsₖAₖ), lower ranks padded with zeros: with cross terms BᵢAⱼ that no client has learnt

p are the clients' shares of the examples; they weigh one factor alone.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from infra.errors import InvalidInput
from training.low_rank import LowRank, Part, norm, stacked
from training.merging.adapter import Adapter, Merged
from training.merging.linear import Linear
from training.merging.lora import merge_loras
from training.merging.method import MergeMethod

Aggregation = Literal["stack", "average"]


class PaddedMean(MergeMethod):
    """Σ pₖ of A and of B, padded to the highest rank."""

    title: ClassVar[str] = "Mean of padded factors"
    paper: ClassVar[str] = "FLoRA's baseline, arXiv 2409.05976"

    shares: tuple[float, ...]

    def low_rank(self, place: str, names: Sequence[str], updates: Sequence[LowRank]) -> Part:
        """B̄Ā, and how far it is from Σ pₖBₖAₖ."""
        rank = max(update.rank for update in updates)
        A, B = updates[0].A.new_zeros(rank, updates[0].A.shape[1]), updates[0].B.new_zeros(len(updates[0].B), rank)
        for p, update in zip(self.shares, updates, strict=True):
            A += p * nn.functional.pad(update.A, (0, 0, 0, rank - update.rank))
            B += p * nn.functional.pad(update.B, (0, rank - update.rank))
        made, meant = LowRank(A, B), stacked(updates, self.shares)
        return Part(made, norm(stacked([made, meant], [1, -1])), norm(meant))

    def entries(self, place: str, names: Sequence[str], updates: Tensor) -> Tensor:
        """Refused: there are no factors."""
        raise InvalidInput(f"Only LoRAs are gathered; {place} is no part of one.", "Train the clients with lora.")


def aggregated(clients: Sequence[Adapter], shares: Sequence[float], how: Aggregation) -> Merged:
    """The clients' LoRAs as one; its `deviation` says how far from Σ pₖΔₖ it is.

    Args:
        clients: their LoRAs, at least one.
        shares: p, of each; they sum to one.
        how: of the two.
    """
    weights = tuple(shares)
    method = Linear(weights=weights) if how == "stack" else PaddedMean(shares=weights)
    return merge_loras(clients, method, None)


def added(one: Adapter | None, update: Adapter, rank: int | None = None) -> Adapter:
    """Δ of both together, exactly, or the nearest of `rank`; `update` itself where there is nothing to add it to."""
    adapters = [update] if one is None else [one, update]
    if one is None and rank is None:
        return update
    return merge_loras(adapters, Linear(weights=(1.0,) * len(adapters), rank=rank), None)
