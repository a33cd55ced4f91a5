"""Series and parallel adapters on linear layers (LLM-Adapters, Hu et al., arXiv 2304.01933).

    parallel            y = W x + c + a(x)
    series, after W     y = h + a(h), h = W x + c
    series, before W    y = W (x + a(x)) + c
    a(z) = s·U φ(D z),    D ∈ ℝ^{b×n}, U ∈ ℝ^{m×b}, no biases

b = 256, φ = tanh, s = 1 or one learned number a layer. The places are those of the paper's placement study: series
after the last layer of each feed-forward block, parallel on its first and last layers (of a gated block, not on the
gate). The official code decides between before and after by a table of module names and fails on any other
(`q_proj`); here a series adapter sits on the narrower side of its layer, before one that widens and after any other,
which is that table on every family it names. LoRA and prefix tuning, the paper's other two, are methods of their own.

The code trains with `init: bert`, both matrices from N(0, 0.02²), which moves a fresh model a little; with `init: mam`
(He et al., arXiv 2110.04366) D is Kaiming-uniform and U zero, and a fresh adapter changes nothing. Arithmetic is in
float32. The paper trains with a learning rate of 3e-4.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from training.methods.bottleneck import Activation, BottleneckSlot, DenseBottleneck, Place, draw, stored_size
from training.methods.contract import AttachContext, MethodCard, MethodConfig
from training.methods.injected import InjectedMethod, Slot
from training.methods.sublayers import FEEDFORWARD_INPUT, FEEDFORWARD_OUTPUT, known_layers
from training.methods.targets import EXCLUDE_HELP, Targets, linear_modules, select, shape


class LlmAdaptersConfig(MethodConfig):
    """Hyper-parameters of series and parallel adapters."""

    placement: Literal["series", "parallel"] = Field(
        "series", description="On one side of a layer (series), or from its input to its output (parallel)."
    )
    bottleneck: int = Field(256, ge=1, description="b, the inner width.")
    activation: Activation = Field("tanh", description="φ, between the two matrices.")
    scale: float | Literal["learned"] = Field(1.0, description="s, a number, or learned: one parameter a layer.")
    init: Literal["bert", "mam"] = Field(
        "bert", description="Both matrices normal, 0.02 wide (bert), or the second one zero (mam)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an input of D in training.")
    targets: Targets | None = Field(
        None,
        description="Linear layers to adapt; none given: the last layer of each feed-forward block, and for parallel "
        "adapters its first, too.",
    )
    exclude: tuple[str, ...] = Field((), description=EXCLUDE_HELP)

    @field_validator("scale")
    @classmethod
    def _weighs(cls, scale: float | str) -> float | str:
        if scale == 0:
            raise ValueError("at 0 nothing would train; give another number, or learned")
        return scale


class LlmAdapters(InjectedMethod[LlmAdaptersConfig]):
    """Series and parallel adapters."""

    name = "llm-adapters"
    peft_type = "REGRAFT_LLM_ADAPTERS"
    config_type = LlmAdaptersConfig
    card = MethodCard(
        title="Bottlenecks in series with linear layers, or parallel to them",
        family="additive / bottleneck adapter",
        paper="LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of Large Language Models, "
        "arXiv 2304.01933",
        parameters="series: Σ 2b·min(m, n); parallel: Σ b(m + n); over the adapted m × n layers",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        merge="no",
        identity_at_init="nearly",
        sharding=False,
    )

    def places(self, model: nn.Module, config: LlmAdaptersConfig) -> list[str]:
        """The targets, or the feed-forward layers of the paper's placement study."""
        if config.targets is not None:
            return select(model, config.targets, config.exclude)
        patterns = [FEEDFORWARD_OUTPUT] if config.placement == "series" else [FEEDFORWARD_INPUT, FEEDFORWARD_OUTPUT]
        for pattern in patterns:
            known_layers(model, pattern, self.name, "feed-forward layers", "Name them in method.targets.")
        return select(model, "|".join(patterns), config.exclude)

    def fresh(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: LlmAdaptersConfig, context: AttachContext
    ) -> dict[str, Slot]:
        """Slots with both matrices drawn, or with the second one zero."""
        del model, context
        slots: dict[str, Slot] = {}
        for name, layer in layers.items():
            slots[name] = slot = self._slot(layer, config, config.bottleneck)
            draw(slot)
            if config.init == "mam":
                nn.init.kaiming_uniform_(slot.stored()["down"], a=sqrt(5))
                nn.init.zeros_(slot.stored()["up"])
        return slots

    def blank(self, layer: nn.Module, config: LlmAdaptersConfig, tensors: Mapping[str, Tensor]) -> Slot:
        """A slot of the stored width."""
        return self._slot(layer, config, stored_size(tensors, *ends(layer, config)[1:]))

    def count(self, model: nn.Module, config: LlmAdaptersConfig) -> int:
        """Σ b(n + m) over the ends of each bottleneck, and the learned scales."""
        layers, places = linear_modules(model), self.places(model, config)
        scales = len(places) if config.scale == "learned" else 0
        return config.bottleneck * sum(sum(ends(layers[name], config)[1:]) for name in places) + scales

    def _slot(self, layer: nn.Module, config: LlmAdaptersConfig, size: int) -> BottleneckSlot:
        place, inputs, outputs = ends(layer, config)
        bottleneck = DenseBottleneck(
            inputs,
            size,
            outputs,
            bias=False,
            activation=config.activation,
            dropout=config.dropout,
            scale=nn.Parameter(torch.ones(1)) if isinstance(config.scale, str) else config.scale,
        )
        return BottleneckSlot(place, bottleneck)


def ends(layer: nn.Module, config: LlmAdaptersConfig) -> tuple[Place, int, int]:
    """Where the bottleneck of a linear layer sits, its inputs n and its outputs m."""
    outputs, inputs = shape(layer)
    if config.placement == "parallel":
        return "beside", inputs, outputs
    return ("before", inputs, inputs) if inputs < outputs else ("after", outputs, outputs)


METHOD = LlmAdapters()
