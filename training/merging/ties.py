"""TIES: trim, elect signs, and average those that agree (Yadav et al., arXiv 2306.01708).

    trim      τ̂ᵢ: the `density` entries of largest |Δᵢ|, the others 0
    elect     γ = sgn(Σ wᵢτ̂ᵢ)   ("mass"),   or sgn(Σ sgn(wᵢτ̂ᵢ))   ("frequency")
    merge     τ = λ · Σ_{i∈𝒜} wᵢτ̂ᵢ / Σ_{i∈𝒜} |wᵢ|,    𝒜 = {i: sgn(wᵢτ̂ᵢ) = γ ≠ 0}, entry by entry

The paper has no weights (wᵢ = 1), elects by mass, and ranks the entries of a model's whole task vector, where here each
tensor is trimmed by itself, as peft and mergekit do: a LoRA's dense updates are never held together. On differences of
sparse masks the density is of the union of the masks.

An entry on which the signs are undecided stays at zero, sgn(0); by frequency, which often is, mass decides first. peft
and mergekit take the positive sign there. peft's "ties" works on the factors, its "ties_svd" on the updates, as here;
it elects before it weights, and divides by the number of adapters that agree, so that its weights scale the result.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from training.merging.method import WEIGHTS_HELP, EntryRule, given_weights
from training.methods.sparse_delta import largest

UNDECIDED = 1e-12  # of the mass: what rounding in float64 leaves of a sum that is zero

Vote = Literal["mass", "frequency"]
VOTE_HELP = "What elects a sign: the sum of the entries, or the number of them."


class Ties(EntryRule):
    """λ · the mean of those that agree."""

    title: ClassVar[str] = "Trim small entries, elect a sign for each, average those that agree with it"
    paper: ClassVar[str] = "TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708"

    weights: tuple[float, ...] | None = Field(None, description=f"{WEIGHTS_HELP} None given: 1 each.")
    density: float = Field(0.2, gt=0, le=1, description="Share of each tensor's entries that is kept.")
    vote: Vote = Field("mass", description=VOTE_HELP)
    scale: float = Field(1.0, description="λ, on the merged update.")

    def entries(self, place: str, names: Sequence[str], updates: Tensor) -> Tensor:
        """τ of one tensor."""
        weights = given_weights(self.weights, len(updates), 1.0)
        weighted = [w * trimmed(update, self.density) for w, update in zip(weights, updates, strict=True)]
        return self.scale * elected(weighted, weights, self.vote)


def trimmed(update: Tensor, density: float) -> Tensor:
    """The `density` entries of largest |Δ|, one at least, and zeros; of equal ones the first."""
    if not update.numel():
        return update
    count = max(1, int(density * update.numel() + 1e-9))
    return update * largest({"": update}, count)[""]


def elected(weighted: Sequence[Tensor], weights: Sequence[float], vote: Vote) -> Tensor:
    """Σ_{i∈𝒜} wᵢΔᵢ / Σ_{i∈𝒜} |wᵢ| by the elected signs; zero where none is elected.

    Args:
        weighted: wᵢΔᵢ, of one shape.
        weights: w.
        vote: how a sign is elected.
    """
    balance, mass = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for each in weighted:
        balance += each
        mass += each.abs()
    sign = torch.where(balance.abs() <= UNDECIDED * mass, 0.0, balance.sign())
    del balance, mass
    if vote == "frequency":
        number = torch.zeros_like(sign)
        for each in weighted:
            number += each.sign()
        sign = torch.where(number == 0, sign, number.sign())
    total, weight = torch.zeros_like(sign), torch.zeros_like(sign)
    for w, each in zip(weights, weighted, strict=True):
        agrees = (each.sign() == sign) & (sign != 0)
        total += each * agrees
        weight += abs(w) * agrees
    return torch.where(weight > 0, total / weight, 0.0)
