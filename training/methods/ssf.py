"""SSF: a scale and a shift after every operation of a frozen model (Lian et al., arXiv 2210.08823).

    y = γ ⊙ op(x) + β,    γ, β ∈ ℝᶜ, c the outputs of op;    start: γ ~ N(1, σ²), β ~ N(0, σ²), σ = 0.02

The operations are every linear layer, convolution and norm, before the activation; they fold into the operation itself,
W' = diag(γ)W, b' = γ ⊙ b + β, at no cost when serving. Where this differs from the paper:

- A norm without a bias (RMSNorm) is scaled only: its shift β could fold nowhere but into the layers that read it, each
  of which has a shift of its own that already reaches W·β. Gemma's norms compute 1 + w: w' = γ(1 + w) − 1.
- A linear layer without a bias gains one when merged. `shift: false` trains scales only and keeps the base's tensors,
  which a merged model needs if it is to be stored and loaded again by an architecture that has no place for biases.
- The paper trains the classifier's head whole; here a head is an operation like any other.
- σ = 0 starts at exactly the base's outputs. γ and β need a learning rate of 1e-3 and more, and no weight decay, which
  would draw γ to 0 and not to 1: the optimiser has none.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.errors import CorruptArtifact
from training.methods.contract import AttachContext, MethodCard, MethodConfig
from training.methods.injected import InjectedAdapted, InjectedMethod, Slot, base_of
from training.methods.targets import (
    ALL_LINEAR,
    EXCLUDE_HELP,
    TARGETS_HELP,
    Targets,
    convolution_modules,
    excluded,
    norm_modules,
    select,
)


class SsfConfig(MethodConfig):
    """Hyper-parameters of SSF."""

    init_std: float = Field(0.02, ge=0, description="σ of the start around γ = 1, β = 0; 0: exactly there.")
    shift: bool = Field(True, description="Train β, too; without it a merged model has the base's tensors, no more.")
    norms: bool = Field(True, description="Adapt the norms, beside the targets.")
    convolutions: bool = Field(True, description="Adapt the convolutions, beside the targets.")
    targets: Targets = Field(ALL_LINEAR, description=TARGETS_HELP)
    exclude: tuple[str, ...] = Field((), description=EXCLUDE_HELP)


class SsfSlot(Slot):
    """γ and β of one operation.

    Args:
        layer: the operation.
        shift: whether there is a β.
    """

    def __init__(self, layer: Any, shift: bool) -> None:
        super().__init__()
        size = outputs(layer)
        self.scale = nn.Parameter(torch.ones(size))
        self.offset = nn.Parameter(torch.zeros(size)) if shift else None
        self.trailing = max(0, int(layer.weight.ndim) - 2)  # axes after the channels
        self.one = 1.0 if adds_one(layer) else 0.0

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """γ ⊙ op(x) + β, in float32, in the dtype of op(x)."""
        output: Tensor = base(x)
        channels = (-1,) + (1,) * self.trailing
        scaled = output * self.scale.view(channels)
        if self.offset is not None:
            scaled = scaled + self.offset.view(channels)
        return scaled.to(output.dtype)

    def update(self, weight: Tensor) -> Tensor:
        """(γ − 1) ⊙ W along the outputs; (γ − 1) ⊙ (1 + w) for a norm that computes with 1 + w."""
        factor = (self.scale - 1).view((-1,) + (1,) * (weight.ndim - 1))
        return factor * (weight + self.one)

    def shift(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """(γ − 1) ⊙ b + β."""
        del weight
        scaled = None if bias is None else (self.scale - 1) * bias
        if self.offset is None:
            return scaled
        return self.offset.detach() if scaled is None else scaled + self.offset


class SsfAdapted(InjectedAdapted):
    """SSF on a model."""

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW without weight decay."""
        del weight_decay
        return torch.optim.AdamW(self.trainable().values(), lr=learning_rate, weight_decay=0.0)


class Ssf(InjectedMethod[SsfConfig]):
    """SSF."""

    name = "ssf"
    peft_type = "REGRAFT_SSF"
    config_type = SsfConfig
    adapted_type = SsfAdapted
    card = MethodCard(
        title="A scale and a shift after every operation",
        family="reparameterised / affine modulation",
        paper="Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, arXiv 2210.08823",
        parameters="Σ 2c over the operations with c outputs; c for a norm without a bias",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        adds_biases=True,
        identity_at_init=False,
        sharding=False,
    )

    def places(self, model: nn.Module, config: SsfConfig) -> list[str]:
        """The selected linear layers, the norms and the convolutions, in the model's order."""
        chosen = set(select(model, config.targets, config.exclude))
        others = (norm_modules(model) if config.norms else {}) | (
            convolution_modules(model) if config.convolutions else {}
        )
        chosen |= {name for name in others if not excluded(name, config.exclude)}
        return [name for name, _ in model.named_modules() if name in chosen]

    def fresh(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: SsfConfig, context: AttachContext
    ) -> dict[str, Slot]:
        """γ and β drawn around 1 and 0."""
        del model
        generator = context.generator()
        slots: dict[str, Slot] = {}
        for name, layer in layers.items():
            slot = SsfSlot(layer, shifts(layer, config))
            with torch.no_grad():
                for parameter in slot.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=config.init_std)
            slots[name] = slot
        return slots

    def blank(self, layer: nn.Module, config: SsfConfig, tensors: Mapping[str, Tensor]) -> Slot:
        """A slot of the layer's own shape."""
        del tensors
        if not isinstance(getattr(layer, "weight", None), Tensor):
            raise CorruptArtifact(f"a {type(layer).__name__} has no weight to scale")
        return SsfSlot(layer, shifts(layer, config))

    def count(self, model: nn.Module, config: SsfConfig) -> int:
        """Σ 2c, or c where there is no shift."""
        layers = [base_of(model.get_submodule(name)) for name in self.places(model, config)]
        return sum(outputs(layer) * (2 if shifts(layer, config) else 1) for layer in layers)


def outputs(layer: Any) -> int:
    """c, the outputs of an operation: channels of a convolution, features of a linear layer or norm."""
    return int(layer.weight.shape[1 if isinstance(layer, Conv1D) else 0])


def shifts(layer: nn.Module, config: SsfConfig) -> bool:
    """Whether the operation gets a β: where there is a place for a bias."""
    return config.shift and hasattr(layer, "bias")


def adds_one(layer: Any) -> bool:
    """Whether a norm computes with 1 + w (Gemma's) instead of w: its output is not 0 where w is."""
    if layer.weight.ndim != 1:
        return False
    probe = copy.deepcopy(layer).float()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        size = len(probe.weight)
        shown = probe(torch.arange(1.0, size + 1, device=probe.weight.device).expand(2, size))
    return bool(shown.abs().max() > 0)


METHOD = Ssf()
