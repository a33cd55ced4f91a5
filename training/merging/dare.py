"""DARE: drop entries at random and rescale the others, before a merge (Yu et al., arXiv 2311.03099).

    Δ̃ᵢ = mᵢ ⊙ Δᵢ / p,    mᵢ ~ Bernoulli(p) for each entry, p = `density`;    E[Δ̃ᵢ] = Δᵢ

then λ Σ wᵢΔ̃ᵢ, or with `vote` the signs and the mean of TIES. The paper's drop rate is 1 − p, up to 0.9 for models of
7B and more. It drops entries of ΔW, as here and in peft's "dare_linear_svd"; peft's "dare_linear" drops entries of A
and of B. mergekit rescales to the norm that the update had instead of by 1/p.

What is drawn depends on the seed, the adapter's name and the tensor's name: not on the order of either.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from training.merging.method import WEIGHTS_HELP, EntryRule, given_weights
from training.merging.ties import VOTE_HELP, Vote, elected


class Dare(EntryRule):
    """λ Σ wᵢΔ̃ᵢ, or λ · the mean of those that agree."""

    title: ClassVar[str] = "Drop entries at random and rescale the rest; then a sum, or the signs of TIES"
    paper: ClassVar[str] = "Language Models are Super Mario, arXiv 2311.03099"

    weights: tuple[float, ...] | None = Field(None, description=f"{WEIGHTS_HELP} None given: the mean, 1/n each.")
    density: float = Field(0.5, gt=0, le=1, description="p, the probability of keeping an entry.")
    vote: Vote | None = Field(None, description=f"{VOTE_HELP} None given: no election, a weighted sum.")
    scale: float = Field(1.0, description="λ, on the merged update.")
    seed: int = Field(0, ge=0, description="Of what is dropped.")

    def entries(self, place: str, names: Sequence[str], updates: Tensor) -> Tensor:
        """One tensor of it."""
        weights = given_weights(self.weights, len(updates), 1 / len(updates))
        weighted = [
            w * dropped(update, self.density, generator(self.seed, name, place))
            for w, name, update in zip(weights, names, updates, strict=True)
        ]
        if self.vote is None:
            return self.scale * torch.stack(weighted).sum(0)
        return self.scale * elected(weighted, weights, self.vote)


def dropped(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Δ̃; the same draws whatever the device."""
    kept = torch.rand(update.shape, generator=generator) < density
    return update * kept.to(update.device) / density


def generator(seed: int, adapter: str, place: str) -> torch.Generator:
    """At the state that belongs to one tensor of one adapter."""
    digest = sha256("\0".join((str(seed), adapter, place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
