"""AdaLoRA: low-rank updates whose ranks are shared out by importance in training (Zhang et al., arXiv 2303.10512).

    ΔW = (α/r₀)·PΛQ,    P [m, r₀], Λ = diag(λ), Q [r₀, n];    loss + γ·(‖PᵀP − I‖ + ‖QQᵀ − I‖)

λ starts at zero, P and Q Gaussian. A triplet (column of P, λᵢ, row of Q) is as important as S(λᵢ) + mean S(P_·ᵢ) +
mean S(Q_ᵢ·), with S(θ) = Ī·Ū, I = |θ·∂L/∂θ|, Ī ← β₁Ī + (1 − β₁)I, Ū ← β₂Ū + (1 − β₂)|I − Ī|. After `warmup` of the
steps the number of triplets kept over all layers falls along a cubic from r₀ to r a layer on average; every `interval`
steps the λ of the others are set to zero, from which they may return until the last `final` part of the training.

As in peft, the scale is α/r₀ and the regulariser the mean over all P and Q of the Frobenius norm, not squared. What
the allocation remembers (Ī, Ū, which λ are out) lies in the optimiser's state, so that it is in every checkpoint. A
stored adapter keeps r₀ rows in each layer, those out of use with λ = 0. warmup and final are the shares of the
paper's MNLI run; its interval, 100 there, goes down to 1 with the length of the training.
"""

from collections.abc import Iterator
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.adalora import AdaLoraConfig as PeftAdaLoraConfig
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from infra.errors import InvalidInput
from training.methods.contract import AttachContext, Batch, MethodCard, MethodConfig
from training.methods.peft_method import PeftAdapted, PeftMethod, adapter_layers
from training.methods.targets import (
    ALL_LINEAR,
    EXCLUDE_HELP,
    TARGETS_HELP,
    Targets,
    linear_modules,
    select,
    select_with_room,
    shape,
    shortest,
)


class AdaLoraConfig(MethodConfig):
    """Hyper-parameters of AdaLoRA."""

    rank: int = Field(8, ge=1, description="r, the average rank of a layer at the end.")
    initial_rank: int = Field(12, ge=1, description="r₀, the rank of every layer at the start.")
    alpha: int | None = Field(None, ge=1, description="α of the scale α/r₀; none given: initial_rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an input of Q in training.")
    orthogonality: float = Field(0.1, ge=0, description="γ, the weight of the regulariser.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps before any triplet is dropped.")
    final: float = Field(0.5, ge=0, lt=1, description="Share of the steps after the last triplet is dropped.")
    interval: int = Field(10, ge=1, description="Steps between two allocations.")
    beta1: float = Field(0.85, ge=0, lt=1, description="β₁, the smoothing of the importance.")
    beta2: float = Field(0.85, ge=0, lt=1, description="β₂, the smoothing of its uncertainty.")
    targets: Targets = Field(ALL_LINEAR, description=TARGETS_HELP)
    exclude: tuple[str, ...] = Field((), description=EXCLUDE_HELP)

    @model_validator(mode="after")
    def _falls(self) -> "AdaLoraConfig":
        if self.rank > self.initial_rank:
            raise ValueError(f"initial_rank must be no lower than rank, {self.rank}; it is {self.initial_rank}")
        if (total := self.warmup + self.final) >= 1:
            raise ValueError(f"warmup and final, shares of the steps, must be less than 1 together; they are {total:g}")
        return self


class AdaLoraAdapted(PeftAdapted):
    """AdaLoRA on a model."""

    @property
    def parts(self) -> list[dict[str, nn.Parameter]]:
        """P ("B"), λ ("E") and Q ("A") of every layer."""
        layers: list[Any] = list(adapter_layers(self, "lora_E"))
        return [{side: getattr(layer, f"lora_{side}")[self.name] for side in "AEB"} for layer in layers]

    def callbacks(self) -> list[TrainerCallback]:
        """The allocation of ranks."""
        return [Allocation(self)]

    def extra_loss(self, outputs: Any, batch: Batch) -> Tensor | None:
        """γ times the mean distance of all P and Q from orthonormal."""
        del outputs, batch
        weight = float(self.peft_config.orth_reg_weight)
        if not weight:
            return None
        grams = [gram for part in self.parts for gram in (part["A"] @ part["A"].T, part["B"].T @ part["B"])]
        distances = [(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).norm() for gram in grams]
        return weight * torch.stack(distances).mean()


class Allocation(TrainerCallback):
    """Which triplets are kept, step by step; the optimiser's state remembers."""

    def __init__(self, adapted: AdaLoraAdapted) -> None:
        self.adapted = adapted

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """After the update, while its gradients are there."""
        del args, control, kwargs
        self.step(state.global_step, optimizer.state)

    @torch.no_grad()
    def step(self, number: int, memory: Any) -> None:
        """Measure importance at update `number`, the first being 0, and set the λ that are out to zero."""
        config = self.adapted.peft_config
        parts = self.adapted.parts
        last = config.total_step - config.tfinal
        if number <= last:
            for parameter in (parameter for part in parts for parameter in part.values()):
                _measure(parameter, memory[parameter], config.beta1, config.beta2)
            budget = self.budget(number)
            if number == last or (config.tinit < number and number % config.deltaT == 0):
                self._allocate(parts, memory, budget)
        else:
            for part in parts:
                kept = memory[part["E"]].get("kept")
                part["E"].mul_(1 if kept is None else kept)

    def budget(self, number: int) -> int:
        """b(t), the triplets kept over all layers at update t."""
        config, layers = self.adapted.peft_config, len(self.adapted.parts)
        first, last = config.tinit, config.total_step - config.tfinal
        start, end = config.init_r * layers, config.target_r * layers
        left = 1 - (min(max(number, first), last) - first) / (last - first)
        return int((start - end) * left**3 + end)

    def _allocate(self, parts: list[dict[str, nn.Parameter]], memory: Any, budget: int) -> None:
        scores = []
        for part in parts:
            A, E, B = (memory[part[side]]["importance"] * memory[part[side]]["uncertainty"] for side in "AEB")
            scores.append(E[:, 0] + A.mean(dim=1) + B.mean(dim=0))  # [r₀]
        kept = torch.zeros(sum(map(len, scores)), device=scores[0].device)
        kept[torch.cat(scores).topk(budget).indices] = 1
        for part, mask in zip(parts, torch.split(kept, [len(score) for score in scores]), strict=True):
            part["E"].mul_(mask[:, None])
            memory[part["E"]]["kept"] = mask[:, None].clone()


def _measure(parameter: nn.Parameter, memory: dict[str, Any], beta1: float, beta2: float) -> None:
    assert parameter.grad is not None
    now = (parameter * parameter.grad).abs()
    importance = memory.setdefault("importance", torch.zeros_like(now))
    importance.lerp_(now, 1 - beta1)
    uncertainty = memory.setdefault("uncertainty", torch.zeros_like(now))
    uncertainty.lerp_((now - importance).abs(), 1 - beta2)


class AdaLora(PeftMethod[AdaLoraConfig]):
    """AdaLoRA."""

    name = "adalora"
    peft_type = "ADALORA"
    config_type = AdaLoraConfig
    adapted_type = AdaLoraAdapted
    card = MethodCard(
        title="LoRA whose ranks go where they matter",
        family="reparameterised / low rank, adaptive",
        paper="AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512",
        parameters="Σ r₀(m + n + 1) over the adapted m × n layers",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        sharding=False,
    )

    def configure(self, model: nn.Module, config: AdaLoraConfig, context: AttachContext) -> PeftConfig:
        """`peft.AdaLoraConfig`, its schedule laid over `context.total_steps`.

        Raises:
            InvalidInput: the number of steps is not known, or too small for a schedule.
        """
        steps = context.total_steps
        if steps is None:
            raise InvalidInput("adalora needs to know how many steps the training takes.", "Set training.steps.")
        first, last = int(config.warmup * steps), steps - int(config.final * steps)
        if first >= last:
            raise InvalidInput(f"{steps} steps are too few for adalora to drop ranks in.", "Raise training.steps.")
        peft_config: Any = self.peft_config(model, config)
        peft_config.total_step, peft_config.tinit, peft_config.tfinal = steps, first, steps - last
        return peft_config

    def peft_config(self, model: nn.Module, config: AdaLoraConfig) -> PeftConfig:
        """`peft.AdaLoraConfig` on exactly the selected layers, for a training of one step."""
        layers = linear_modules(model)
        names = select_with_room(model, config.targets, config.exclude, config.initial_rank)
        return peft.AdaLoraConfig(
            init_r=config.initial_rank,
            target_r=config.rank,
            lora_alpha=config.alpha or config.initial_rank,
            lora_dropout=config.dropout,
            orth_reg_weight=config.orthogonality,
            deltaT=config.interval,
            beta1=config.beta1,
            beta2=config.beta2,
            total_step=1,
            target_modules=shortest(model, names),
            fan_in_fan_out=all(isinstance(layers[name], Conv1D) for name in names),
        )

    def is_active(self, adapted: PeftAdapted) -> bool:
        """peft's triplets are there."""
        return bool(adapter_layers(adapted, "lora_E"))

    def count(self, model: nn.Module, config: AdaLoraConfig) -> int:
        """Σ r₀(m + n + 1)."""
        layers = linear_modules(model)
        names = select(model, config.targets, config.exclude)
        return sum(config.initial_rank * (sum(shape(layers[name])) + 1) for name in names)

    def _put(self, model: nn.Module, peft_config: PeftConfig, name: str) -> PeftAdapted:
        # peft allows one trainable adapter a model, for its own allocation, which is not used here.
        others = list(_others(model))
        for other in others:
            other.inference_mode = True
        try:
            adapted = super()._put(model, peft_config, name)
        finally:
            for other in others:
                other.inference_mode = False
        for layer in adapter_layers(adapted, "lora_E"):
            rank: Any = layer.ranknum[name]  # a constant, which peft unfreezes and widens on a base of low precision
            rank.requires_grad_(False)
            rank.data = rank.to(layer.get_base_layer().weight.dtype)
        return adapted


def _others(model: nn.Module) -> Iterator[PeftAdaLoraConfig]:
    if isinstance(model, PeftModel):
        yield from (config for config in model.peft_config.values() if isinstance(config, PeftAdaLoraConfig))


METHOD = AdaLora()
