"""What a merging method is: options, and what they make of one layer's updates; everything else is the same for all."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from infra.documents import Section
from infra.errors import InvalidInput
from training.low_rank import LowRank, Part, stacked, truncated

WEIGHTS_HELP = "One number for each adapter, in their order; a negative one takes the adapter's update away."


class MergeMethod(Section, ABC):
    """The options of a method, and its rule.

    Attributes:
        title: what it does, one line.
        paper: where it is from.
    """

    model_config = ConfigDict(allow_inf_nan=False)
    title: ClassVar[str]
    paper: ClassVar[str]

    rank: int | None = Field(None, ge=1, description="Of LoRAs: the highest rank that a layer of the result may have.")
    energy: float | None = Field(
        None, gt=0, le=1, description="Of LoRAs: keep as low a rank as holds this share of each update's squared norm."
    )

    @abstractmethod
    def low_rank(self, place: str, names: Sequence[str], updates: Sequence[LowRank]) -> Part:
        """One layer's update of low rank.

        Args:
            place: the layer.
            names: of the adapters.
            updates: theirs, of one m and n; of rank 0 where an adapter leaves the layer alone.
        """

    @abstractmethod
    def entries(self, place: str, names: Sequence[str], updates: Tensor) -> Tensor:
        """One tensor's update, in the shape of each of the `updates` [k, …], float64, measured from the origin."""

    def coefficients(self, count: int) -> list[float] | None:
        """c where the merged update of `count` adapters is Σ cᵢΔᵢ with the same c everywhere; None where it is not.

        Raises:
            InvalidInput: the options are for another number of adapters.
        """
        del count
        return None


class Mixture(MergeMethod):
    """Σ cᵢΔᵢ, exact on LoRAs: stacked, and cut to a lower rank only where that is asked for."""

    @abstractmethod
    def coefficients(self, count: int) -> list[float]:
        """c."""

    def low_rank(self, place: str, names: Sequence[str], updates: Sequence[LowRank]) -> Part:
        """Σ cᵢBᵢAᵢ."""
        return truncated(stacked(updates, self.coefficients(len(updates))), self.rank, self.energy)

    def entries(self, place: str, names: Sequence[str], updates: Tensor) -> Tensor:
        """Σ cᵢΔᵢ."""
        return weighted_sum(updates, self.coefficients(len(updates)))


class EntryRule(MergeMethod):
    """A rule for single entries. A LoRA's updates are formed one layer at a time, and what comes out is factorised."""

    def low_rank(self, place: str, names: Sequence[str], updates: Sequence[LowRank]) -> Part:
        """The nearest of rank `rank`; of the sum of the updates' ranks where neither it nor `energy` is given."""
        merged = self.entries(place, names, torch.stack([update.dense() for update in updates]))
        rank = self.rank
        if rank is None and self.energy is None:
            rank = sum(update.rank for update in updates)
        return truncated(merged, rank, self.energy)


def weighted_sum(updates: Tensor, weights: Sequence[float]) -> Tensor:
    """Σ wᵢΔᵢ of the `updates` [k, …]."""
    total: Tensor = torch.tensordot(updates.new_tensor(weights), updates, dims=1)
    return total


def given_weights(weights: Sequence[float] | None, count: int, otherwise: float) -> list[float]:
    """The `weights`, or `otherwise` for each of `count` adapters.

    Raises:
        InvalidInput: there are not `count` of them.
    """
    if weights is None:
        return [otherwise] * count
    if len(weights) != count:
        raise InvalidInput(f"{len(weights)} weights are given for {count} adapters.", "Give one for each, in order.")
    return list(weights)
