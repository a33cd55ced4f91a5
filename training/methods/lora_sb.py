"""LoRA-SB: LoRA-XS started from the first update of full fine-tuning (Ponkshe et al., arXiv 2411.19557).

    ΔW = −η·sign(Σ_i ∇L(W₀; x_i)) ≈ U_r·diag(S_r)·V_rᵀ
    A = V_rᵀ ∈ ℝ^{r×n}, B = U_r ∈ ℝ^{m×r} frozen,    R₀ = diag(S_r)/s,    h = W₀x + s·B·R·Ax

The sum runs over N samples; the sign is Adam's first step, and η its rate, that of the first step of the warm-up:
the learning rate over (warm-up ratio · steps), and never above the learning rate. A fresh adapter therefore holds one
step of training already. With orthonormal factors, R's own gradient gives the closest low-rank update to full
fine-tuning's whatever s is; α is the rank, and s = 1.

Where the authors' code differs: it counts the steps that the batches of the gradient pass would make, not those of the
training; it leaves dropout on; it weights samples of a smaller batch more, where each counts the same here; and it
rounds the factors to bfloat16. Its AdamW decays R by 0.01. Rank 96, N = 50 and the rates are those of its Mistral 7 B
on arithmetic; N is about a thousandth of the data.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from pydantic import Field
from torch import nn

from infra.errors import InvalidInput
from kernels.cross_entropy import IGNORE
from training.methods.calibration import draw, gradients
from training.methods.contract import AttachContext, Batch, MethodCard
from training.methods.frozen_factors import Factors
from training.methods.injected import matrix
from training.methods.lora_xs import LoraXs
from training.methods.singular import leading
from training.methods.started_lora import StartedLoraConfig


class LoraSbConfig(StartedLoraConfig):
    """Hyper-parameters of LoRA-SB."""

    rank: int = Field(96, ge=1, description="r: R is r × r.")
    samples: int = Field(50, ge=1, description="N, the number of samples whose gradients are summed.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Of the update taken first; as a rule, the training's.")
    warmup_ratio: float = Field(0.02, ge=0, le=1, description="Share of the steps that its warm-up is taken to last.")
    iterations: int | None = Field(
        10, ge=1, description="Subspace iterations of the randomised SVD of large layers; null for the full SVD."
    )


class LoraSb(LoraXs):
    """LoRA-SB."""

    name = "lora-sb"
    peft_type = "LORA_SB"
    config_type = LoraSbConfig
    card = MethodCard(
        title="LoRA-XS that starts as the first update of full fine-tuning",
        family="reparameterised / low rank, initialisation",
        paper=(
            "Initialization using Update Approximation is a Silver Bullet for "
            "Extremely Efficient Low-Rank Fine-Tuning, arXiv 2411.19557"
        ),
        parameters="Σ r² over the adapted layers",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        identity_at_init=False,
        needs_calibration=True,
        sharding=False,  # gradients and decomposition are of whole weights
    )

    def decided_by(self, layers: Mapping[str, nn.Module], config: Any, context: AttachContext) -> dict[str, Any]:
        """The number of steps, too, which η needs."""
        return super().decided_by(layers, config, context) | {"total_steps": context.total_steps}

    def factors(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: Any, context: AttachContext
    ) -> dict[str, Factors]:
        """The first update's leading singular vectors and values.

        Raises:
            InvalidInput: there are no calibration data, or the number of steps is not known.
        """
        if context.total_steps is None:
            raise InvalidInput("lora-sb needs the number of steps of the training.", "Give training.steps or epochs.")
        rate = config.learning_rate / max(1.0, config.warmup_ratio * context.total_steps)
        mean = gradients(
            model,
            layers,
            _samples(context, model, config.samples),
            lambda done: context.tell("gradients", done, config.samples),
        )
        found = {}
        for number, (name, layer) in enumerate(layers.items(), start=1):
            step = -mean.pop(name).to(matrix(layer).device).sign()
            U, S, Vh = leading(step, config.rank, config.iterations)
            found[name] = Factors(Vh, U, torch.diag(rate * S / config.scale))
            context.tell("factors of the first update", number, len(layers))
        return found


def _samples(context: AttachContext, model: nn.Module, number: int) -> Iterator[Batch]:
    """The first `number` samples with a label that counts, each a batch of its own."""
    labelled = (row for row in draw(context, model, "lora-sb", rows=1) if (row["labels"] != IGNORE).any())
    none = True
    for sample in islice(labelled, number):
        none = False
        yield sample
    if none:
        raise InvalidInput("'lora-sb' needs calibration data with labels.", "Give the examples completions.")


METHOD = LoraSb()
