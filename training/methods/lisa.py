"""LISA: full fine-tuning in which few blocks are awake at a time (Pan et al., arXiv 2403.17919).

    every K updates:   A ~ uniform over the γ-subsets of the N blocks
    in between:        AdamW on the blocks in A and on all that lies outside the blocks; the others sleep

Outside the blocks are embeddings, final norm and head: the paper gives them probability 1, and γ/N to each block,
after the layer-wise weight norms of LoRA trainings. Nothing is measured: the draw does not look at data or weights.
Defaults are those of the official arguments (LMFlow): γ = 2, K = 20. The learning-rate schedule runs on over the draws.

Memory: gradients and the optimiser's state exist for the awake parameters alone, at most 2·(P_outside + γ·P_block)
elements of moments. That is the paper's (each interval was a process of its own); LMFlow's callback keeps the moments
of every block that was ever awake, until they are all there: `keep_moments`. A block that wakes again starts with fresh
moments; what was awake before and after a draw keeps its own, as do embeddings and head.

Where LMFlow differs: it draws from NumPy's global generator, and a training resumed within an interval trains every
block until the next draw. Here the draw of interval i = ⌊step/K⌋ comes from (seed, i) alone, so that a resumed training
goes on to the same bits. The first is made when the adapter is attached.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn
from transformers import TrainerCallback

from infra.errors import InvalidInput
from training.methods.base_training import BaseTraining, TrainedBase, size
from training.methods.contract import MethodCard, MethodConfig
from training.methods.stacks import blocks


class LisaConfig(MethodConfig):
    """Hyper-parameters of LISA."""

    layers: int = Field(2, ge=1, description="γ, the number of blocks that are awake at a time.")
    interval: int = Field(20, ge=1, description="K, the updates after which other blocks are drawn.")
    embeddings_and_head: bool = Field(
        True,
        description="Train what lies outside the blocks (embeddings, final norm, head) all the time; false: never.",
    )
    keep_moments: bool = Field(
        False, description="Keep the optimiser's moments of blocks that go to sleep: as large as Adam's in the end."
    )


class LisaAdapted(TrainedBase):
    """One θ of a model, of which a few blocks are awake.

    Attributes:
        interval: i, whose draw is in force.
    """

    interval = 0

    def awake(self) -> list[str]:
        """The names of the blocks that interval i draws, in the model's order."""
        names = list(blocks(self.model))
        drawn = np.random.default_rng((self.seed, self.interval)).permutation(len(names))[: self.config.layers]
        return [names[number] for number in sorted(drawn)]

    def let_gradient_in(self) -> None:
        """Wake what interval i trains; the rest sleeps, and its gradients are gone."""
        awake = set(self.awake())
        for parameter in self.model.parameters():
            parameter.requires_grad_(self.config.embeddings_and_head and parameter.is_floating_point())
        for name, block in blocks(self.model).items():
            for parameter in block.parameters():
                parameter.requires_grad_(name in awake and parameter.is_floating_point())
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                parameter.grad = None  # of zeros, weight decay and momentum would move it

    def go_on(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Wake the blocks of the interval that the update after `step` belongs to; sleepers lose their moments."""
        self.interval = step // self.config.interval
        self.let_gradient_in()
        if not self.config.keep_moments:
            for parameter in [p for p in optimizer.state if not p.requires_grad]:
                del optimizer.state[parameter]

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW over all that will ever be awake; it passes over what has no gradient."""
        inside = {id(parameter) for parameter in _inside(self.model)}
        return torch.optim.AdamW(
            [
                parameter
                for parameter in self.model.parameters()
                if parameter.is_floating_point() and (self.config.embeddings_and_head or id(parameter) in inside)
            ],
            lr=learning_rate,
            weight_decay=weight_decay,
            fused=True,
        )

    def callbacks(self) -> list[TrainerCallback]:
        """What draws."""
        return [_Draw(self)]


class _Draw(TrainerCallback):
    """Draws before each interval's first update, and where a training is resumed."""

    def __init__(self, adapted: LisaAdapted) -> None:
        self.adapted = adapted

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See `TrainerCallback`."""
        del args, control
        self.adapted.go_on(state.global_step, others["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See `TrainerCallback`."""
        del args, control
        if state.global_step % self.adapted.config.interval == 0:
            self.adapted.go_on(state.global_step, others["optimizer"])


class Lisa(BaseTraining[LisaConfig]):
    """LISA."""

    name = "lisa"
    peft_type = "REGRAFT_LISA"
    config_type = LisaConfig
    adapted_type = LisaAdapted
    card = MethodCard(
        title="Full fine-tuning, a few randomly drawn blocks at a time",
        family="selective / memory-efficient schedule",
        paper="LISA: Layerwise Importance Sampling for Memory-Efficient LLM Fine-Tuning, arXiv 2403.17919",
        parameters="|θ outside the blocks| + γ·|θ of a block| at a time",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "vit"),
        modality=("language", "vision"),
        changes_base=True,
        sharding=False,
        processes=False,  # DDP reduces the gradients of those parameters that were awake when it began, and no others
    )

    def check(self, model: nn.Module, config: LisaConfig) -> None:
        """The blocks are there, enough of them, and alike, as the budget of γ blocks assumes.

        Raises:
            InvalidInput: they are not.
        """
        sizes = {name: size(block.parameters()) for name, block in blocks(model).items()}
        model_type = type(model).__name__
        if not sizes:
            raise InvalidInput(f"'lisa' finds no stack of blocks in {model_type}.", "Use another method: full, galore.")
        if len(set(sizes.values())) > 1:
            least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
            raise InvalidInput(
                f"'lisa' draws among blocks of one size; in {model_type}, {least} has {sizes[least]:,} parameters and "
                f"{most} {sizes[most]:,}.",
                "Use another method: full, galore.",
            )
        if config.layers > len(sizes):
            raise InvalidInput(
                f"method.layers is {config.layers}, but {model_type} has {len(sizes)} blocks.",
                f"Lower it to {len(sizes)}, which is full fine-tuning, or less.",
            )

    def count(self, model: nn.Module, config: LisaConfig) -> int:
        """P_outside + γ·P_block; a tied head counts once."""
        inside = size(_inside(model))
        outside = size(model.parameters()) - inside
        return config.embeddings_and_head * outside + config.layers * (inside // len(blocks(model)))


def _inside(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all blocks."""
    return (parameter for block in blocks(model).values() for parameter in block.parameters())


METHOD = Lisa()
