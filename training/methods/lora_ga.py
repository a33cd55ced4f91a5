"""LoRA-GA: LoRA whose first step follows the full gradient (Wang et al., arXiv 2407.05000).

    G = ∂L/∂W at the base, averaged over some samples,    G = U·diag(S)·Vᵀ
    A₀ = c·Vᵀ[:r],    B₀ = c·U[:, r:2r],    c = m^¼/√γ,    s = α/√r

The first step of gradient descent moves the weight by s²(B₀B₀ᵀG + GA₀ᵀA₀), which for these two disjoint sets of
directions is s²c² times the best approximation of G of rank 2r; the singular values themselves are not used. c keeps
the size of outputs and gradients independent of r and m. The paper's runs: r = 8, α = 16, γ = 16, learning rate 2e-5.

This is the paper and the authors' code, not peft's `init_lora_weights="lora_ga"`: peft multiplies B₀ by the gradient's
singular values and leaves A₀ without c. Unlike the authors' code, the mean is over samples, which is the mean over
batches where they are of one size; W − s·B₀A₀ is not written into the base (see started_lora.py), so the paper's
`norm_clip` of that offset has nothing to do; and a layer that no gradient reaches is an error.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from infra.errors import InvalidInput
from training.methods.calibration import draw, gradients
from training.methods.contract import AttachContext, MethodCard
from training.methods.injected import matrix
from training.methods.plain_lora import Pair
from training.methods.singular import leading
from training.methods.started_lora import StartedLora, StartedLoraConfig

ITERATIONS = 4  # of the randomised SVD of large gradients
NOTHING = 1e-6  # of the largest singular value: below it there is only rounding


class LoraGaConfig(StartedLoraConfig):
    """Hyper-parameters of LoRA-GA."""

    alpha: float | None = Field(16, gt=0, description="α of the scale; null: the rank.")
    rank_stabilised: bool = Field(True, description="Scale by α/√r, as the paper does; false: by α/r.")
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = Field(
        "ArB2r",
        description="Which of the gradient's first 2r directions A and B take: A the first r and B the next (ArB2r), "
        "the reverse (A2rBr), in turns (ArBr), or any (random).",
    )
    size: Literal["stable", "gd", "unit", "weightS"] = Field(
        "stable",
        description="c, the size of A's rows and B's columns: m^¼/√γ (stable), 1/s (gd), 1 (unit), or the mean root of "
        "the weight's r largest singular values over s (weightS).",
    )
    gamma: float = Field(16, ge=1e-3, le=1e6, description="γ of the size `stable`; larger is smaller.")
    samples: int = Field(128, ge=1, description="Calibration samples that the gradient is averaged over.")
    batch_size: int = Field(2, ge=1, description="Most samples in one backward pass through the whole base.")

    @property
    def scale(self) -> float:
        """s."""
        alpha = self.alpha or self.rank
        return alpha / sqrt(self.rank) if self.rank_stabilised else alpha / self.rank


class LoraGa(StartedLora):
    """LoRA-GA."""

    name = "lora-ga"
    config_type = LoraGaConfig
    directions = 2
    card = MethodCard(
        title="LoRA whose first step follows the gradient of all weights",
        family="reparameterised / low rank, initialisation",
        paper="LoRA-GA: Low-Rank Adaptation with Gradient Approximation, arXiv 2407.05000",
        parameters="Σ r(m + n) over the adapted m × n layers",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        needs_calibration=True,
        sharding=False,
    )

    def pairs(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: Any, context: AttachContext
    ) -> dict[str, Pair]:
        """Disjoint singular directions of every layer's gradient.

        Raises:
            InvalidInput: a gradient has too few.
        """
        found = gradients(
            model,
            layers,
            draw(context, model, self.name, config.samples, config.batch_size),
            lambda done: context.tell("gradient of the whole base", done, config.samples),
        )
        pairs = {}
        for number, (name, layer) in enumerate(layers.items(), start=1):
            W = matrix(layer)
            U, S, Vh = leading(found.pop(name).to(W.device), 2 * config.rank, ITERATIONS)
            if S[-1] <= NOTHING * S[0]:
                raise InvalidInput(
                    f"The gradient of {name} at the calibration data has {int((NOTHING * S[0] < S).sum())} directions; "
                    f"rank {config.rank} takes {2 * config.rank}.",
                    "Lower method.rank, give more data, or leave the layer out: method.exclude.",
                )
            of_a, of_b = chosen(config.direction, config.rank)
            c = size(config, W)
            pairs[name] = (c * Vh[of_a], c * U[:, of_b])
            context.tell("directions of the gradient", number, len(layers))
        return pairs

    def options_of(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        """As stored: peft's own scale is α/r."""
        options = super().options_of(content, tensors)
        return options.model_copy(update={"rank_stabilised": False})


def chosen(direction: str, r: int) -> tuple[list[int], list[int]]:
    """Which of the 2r leading components A takes, and which B: r each, none twice."""
    order = list(range(2 * r))
    if direction == "ArBr":
        return order[1::2], order[::2]
    if direction == "random":
        order = torch.randperm(2 * r).tolist()
    first, second = order[:r], order[r:]
    return (second, first) if direction == "A2rBr" else (first, second)


def size(config: LoraGaConfig, W: Tensor) -> float:
    """c for the layer of weight W [m, n]."""
    if config.size == "stable":
        return float(len(W) ** 0.25 / sqrt(config.gamma))
    if config.size == "weightS":
        return float((leading(W, config.rank, ITERATIONS)[1] / config.scale).sqrt().mean())
    return 1 / config.scale if config.size == "gd" else 1.0


METHOD = LoraGa()
