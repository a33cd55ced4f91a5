"""Weighted sums of updates: one rule under the names of task arithmetic, model soups and `cat`.

    ΔW = λ Σ wᵢΔᵢ,    of LoRAs Σ (λwᵢsᵢ)·BᵢAᵢ, stacked: exact, of rank Σrᵢ

With weights that sum to one it is a mean (model soups, Wortsman et al., arXiv 2203.05482); with any others, task
arithmetic (Ilharco et al., arXiv 2212.04089), in which a negative weight makes the model forget and λ scales the sum.
What peft calls "cat" is this rule. Its "linear" averages factors instead, which gives cross terms: see factors.py.
"""

from typing import ClassVar

from pydantic import Field

from training.merging.method import WEIGHTS_HELP, Mixture, given_weights


class Linear(Mixture):
    """λ Σ wᵢΔᵢ."""

    title: ClassVar[str] = "Weighted sum of the updates; by default their mean"
    paper: ClassVar[str] = "Model soups, arXiv 2203.05482; Editing Models with Task Arithmetic, arXiv 2212.04089"

    weights: tuple[float, ...] | None = Field(None, description=f"{WEIGHTS_HELP} None given: the mean, 1/n each.")
    scale: float = Field(1.0, description="λ, on the whole sum.")

    def coefficients(self, count: int) -> list[float]:
        """λwᵢ."""
        return [self.scale * weight for weight in given_weights(self.weights, count, 1 / count)]


class Sum(Mixture):
    """λ Σ Δᵢ: all of each; the composition of sparse differences, language + task (LT-SFT)."""

    title: ClassVar[str] = "Sum of the updates, as sparse differences are composed"
    paper: ClassVar[str] = "Composable Sparse Fine-Tuning for Cross-Lingual Transfer, arXiv 2110.07560"

    scale: float = Field(1.0, description="λ, on the whole sum.")

    def coefficients(self, count: int) -> list[float]:
        """λ."""
        return [self.scale] * count
