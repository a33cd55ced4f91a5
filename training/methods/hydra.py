"""Hydra: a parallel and a sequential low-rank branch at one layer (Kim et al., arXiv 2309.06922).

    y₀ = W₀x + b₀
    y = y₀ + s_p·[B_p(A_p·x + a_p) + c_p] + s_s·[B_s(A_s·y₀ + a_s) + c_s]
    A_p ∈ ℝ^{r_p×n}, B_p ∈ ℝ^{m×r_p}, A_s ∈ ℝ^{r_s×m}, B_s ∈ ℝ^{m×r_s}

The parallel branch is LoRA; the sequential one recombines what the frozen layer, its bias included, puts out. Nothing
between down and up is non-linear, so that both fold into the layer:

    W = W₀ + s_p·B_p·A_p + s_s·B_s·A_s·W₀,    b = b₀ + s_p(B_p·a_p + c_p) + s_s(B_s(A_s·b₀ + a_s) + c_s)

Up matrices and biases start at zero, so that a fresh adapter changes nothing. Placed on the last linear layer of each
feed-forward block (`targets` says otherwise: the vision runs adapt the attention's output projection, too). The biases
a and c are in the authors' vision code, not in their language code, whose ranks, 4 and 8, and start (Kaiming's uniform
distribution) are the defaults; dropout, if any, sits between down and up. That language code never runs its branches,
and the vision code folds the attention's with the feed-forward's weights: here it is as the equations say.

As a plain LoRA: A = [A_p; A_s·W₀], B = [s_p·B_p, s_s·B_s], of rank r_p + r_s. No plain LoRA carries the change of the
bias, which is there wherever the layer has one: that is `Slot.shift`'s, to be added to the base's bias.
"""

from collections.abc import Mapping
from math import sqrt

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from infra.errors import InvalidInput
from training.methods.contract import AttachContext, MethodCard, MethodConfig
from training.methods.injected import InjectedMethod, Slot
from training.methods.sublayers import FEEDFORWARD_OUTPUT, select_known
from training.methods.targets import Targets, linear_modules, shape


class HydraConfig(MethodConfig):
    """Hyper-parameters of Hydra."""

    parallel_rank: int = Field(4, ge=1, description="r_p, the inner dimension of the branch beside the layer.")
    sequential_rank: int = Field(8, ge=1, description="r_s, the inner dimension of the branch behind the layer.")
    parallel_scale: float = Field(1.0, gt=0, description="s_p.")
    sequential_scale: float = Field(1.0, gt=0, description="s_s.")
    bias: bool = Field(False, description="Train biases in both branches, too.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Between down and up, in training.")
    targets: Targets | None = Field(
        None, description="Layers to adapt; none given: the last linear layer of each feed-forward block."
    )


class HydraSlot(Slot):
    """Both branches of one layer.

    Args:
        m, n: outputs and inputs of the layer.
        config: ranks, scales, biases, dropout.
    """

    def __init__(self, m: int, n: int, config: HydraConfig) -> None:
        super().__init__()
        r_p, r_s = config.parallel_rank, config.sequential_rank
        self.A_p, self.B_p = nn.Parameter(torch.empty(r_p, n)), nn.Parameter(torch.zeros(m, r_p))
        self.A_s, self.B_s = nn.Parameter(torch.empty(r_s, m)), nn.Parameter(torch.zeros(m, r_s))
        self.a_p, self.a_s = _zeros(config.bias, r_p), _zeros(config.bias, r_s)
        self.c_p, self.c_s = _zeros(config.bias, m), _zeros(config.bias, m)
        for down in (self.A_p, self.A_s):
            nn.init.kaiming_uniform_(down, a=sqrt(5))
        self.scales = config.parallel_scale, config.sequential_scale
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """y."""
        s_p, s_s = self.scales
        output: Tensor = base(x)
        x, y0 = x.to(self.A_p.dtype), output.to(self.A_p.dtype)
        parallel = functional.linear(self.dropout(functional.linear(x, self.A_p, self.a_p)), self.B_p, self.c_p)
        sequential = functional.linear(self.dropout(functional.linear(y0, self.A_s, self.a_s)), self.B_s, self.c_s)
        return output + (s_p * parallel + s_s * sequential).to(output.dtype)

    def low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The change of the weight W₀ [m, n] as a plain LoRA of scale 1: [r_p + r_s, n] and [m, r_p + r_s], float32."""
        s_p, s_s = self.scales
        return torch.cat([self.A_p, self.A_s @ weight.float()]), torch.cat([s_p * self.B_p, s_s * self.B_s], dim=1)

    def update(self, weight: Tensor) -> Tensor:
        """s_p·B_p·A_p + s_s·B_s·A_s·W₀."""
        A, B = self.low_rank(weight)
        return (B @ A).to(weight.dtype)

    def shift(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """s_p(B_p·a_p + c_p) + s_s(B_s(A_s·b₀ + a_s) + c_s)."""
        if bias is None and self.a_p is None:
            return None
        s_p, s_s = self.scales
        inner = torch.zeros_like(weight[:, 0]) if bias is None else bias
        shift = s_s * functional.linear(functional.linear(inner, self.A_s, self.a_s), self.B_s, self.c_s)
        return shift if self.a_p is None else shift + s_p * functional.linear(self.a_p, self.B_p, self.c_p)


class Hydra(InjectedMethod[HydraConfig]):
    """Hydra."""

    name = "hydra"
    peft_type = "HYDRA"
    config_type = HydraConfig
    card = MethodCard(
        title="A low-rank branch beside a layer and one behind it",
        family="reparameterised / low rank",
        paper="Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning, arXiv 2309.06922",
        parameters="Σ r_p(m + n) + 2·r_s·m over the adapted m × n layers, r_p + r_s + 2m more each with biases",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        sharding=False,  # not tried
    )

    def places(self, model: nn.Module, config: HydraConfig) -> list[str]:
        """The last linear layers of the feed-forward blocks, or those given.

        Raises:
            InvalidInput: the model names its layers in no known way, or one is too small for a rank.
        """
        names, layers = (
            select_known(model, config.targets, FEEDFORWARD_OUTPUT, "hydra", "targets"),
            linear_modules(model),
        )
        for name in names:
            m, n = shape(layers[name])
            for option, room in (("parallel_rank", min(m, n)), ("sequential_rank", m)):
                if getattr(config, option) > room:
                    raise InvalidInput(
                        f"{option} {getattr(config, option)} is above the size of {name}, which is {(m, n)}.",
                        f"Lower method.{option} to {room}, or leave the layer out of method.targets.",
                    )
        return names

    def fresh(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: HydraConfig, context: AttachContext
    ) -> dict[str, Slot]:
        """Down drawn, up zero."""
        del model, context
        return {name: HydraSlot(*shape(layer), config) for name, layer in layers.items()}

    def blank(self, layer: nn.Module, config: HydraConfig, tensors: Mapping[str, Tensor]) -> Slot:
        """Of the stored options."""
        del tensors
        return HydraSlot(*shape(layer), config)

    def count(self, model: nn.Module, config: HydraConfig) -> int:
        """Σ r_p(m + n) + 2·r_s·m, and r_p + r_s + 2m with biases."""
        layers, r_p, r_s = linear_modules(model), config.parallel_rank, config.sequential_rank
        sizes = [shape(layers[n]) for n in select_known(model, config.targets, FEEDFORWARD_OUTPUT, "hydra", "targets")]
        return sum(r_p * (m + n) + 2 * r_s * m + config.bias * (r_p + r_s + 2 * m) for m, n in sizes)


def _zeros(wanted: bool, size: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(size)) if wanted else None


METHOD = Hydra()
