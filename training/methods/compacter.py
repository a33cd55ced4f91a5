"""Compacter: adapters of Kronecker products (Karimi Mahabadi et al., arXiv 2106.04647).

    PHM layer k → l      y = x H + c,    H = Σ_{i=1..n} R_i ⊗ (s_i t_i) ∈ ℝ^{k×l},    s_i ∈ ℝ^{k/n×1}, t_i ∈ ℝ^{1×l/n}
    adapter              h + a(h),    a(h) = PHM_up(φ(PHM_down(h))),    d → b → d,  b = d/32

The rule R ∈ ℝ^{n×n×n} is one for the whole adapter and trained; s and t are each layer's own. n = 4, φ = gelu. An
adapter sits on the output of self-attention and of the feed-forward, before dropout and residual (Compacter), or of the
feed-forward alone (`attention: false`, Compacter++); none after cross-attention. Every layer norm trains, too: each
adapter has copies of its own, so that a second one on the same base starts from the base's norms again.

s and t start Glorot-uniform with gain √2 and R from N(0, 10⁻⁸), so that a fresh adapter changes outputs by far less
than float32 shows. Since R is that small at first, the paper's learning rate is 3e-3, ten times a LoRA's. Everything is
float32: H is built from float32 factors even where the model computes in bfloat16.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from infra.errors import InvalidInput
from training.methods.bottleneck import Activation, Bottleneck, BottleneckSlot, Weights
from training.methods.contract import AttachContext, MethodCard, MethodConfig
from training.methods.injected import InjectedMethod, Slot
from training.methods.norms import NormSlot
from training.methods.sublayers import ATTENTION_OUTPUT, FEEDFORWARD_OUTPUT, known_layers
from training.methods.targets import is_norm, linear_modules, norm_modules, shape


class CompacterConfig(MethodConfig):
    """Hyper-parameters of Compacter."""

    reduction: int = Field(32, ge=1, description="d/b, by how much the bottleneck is narrower than the model.")
    division: int = Field(4, ge=1, description="n, the number of Kronecker products in a sum, and their size.")
    activation: Activation = Field("gelu_new", description="φ, between the two layers.")
    attention: bool = Field(True, description="Also after self-attention; false for Compacter++.")
    layer_norms: bool = Field(True, description="Also train a copy of every layer norm.")
    rule_spread: float = Field(1e-4, ge=0, description="Standard deviation of the rule at the start.")


class Rule(nn.Module):
    """R, which all layers of an adapter share.

    Args:
        division: n.
        spread: of the normal distribution that R is drawn from.
    """

    def __init__(self, division: int, spread: float) -> None:
        super().__init__()
        self.rule = nn.Parameter(torch.empty(division, division, division).normal_(std=spread))


class PhmBottleneck(Bottleneck):
    """The factors of one adapter's two PHM layers.

    Args:
        width: d.
        size: b.
        division: n.
        activation: φ.
    """

    def __init__(self, width: int, size: int, division: int, activation: Activation) -> None:
        super().__init__(activation)
        self.down_s, self.down_t = factors(width, size, division)
        self.up_s, self.up_t = factors(size, width, division)
        self.down_bias, self.up_bias = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(width))

    def weights(self, common: Any) -> Weights:
        """Both Hᵀ, from the rule in `common`, and the biases."""
        with torch.autocast(self.down_s.device.type, enabled=False):
            down = transposed(common.rule, self.down_s, self.down_t)
            up = transposed(common.rule, self.up_s, self.up_t)
        return down, self.down_bias, up, self.up_bias


def factors(inputs: int, outputs: int, division: int) -> tuple[nn.Parameter, nn.Parameter]:
    """s [n, k/n, 1] and t [n, 1, l/n] of a PHM layer of k inputs and l outputs, drawn."""
    s = nn.Parameter(torch.empty(division, inputs // division, 1))
    t = nn.Parameter(torch.empty(division, 1, outputs // division))
    for factor in (*s.data, *t.data):
        nn.init.xavier_uniform_(factor, gain=sqrt(2))
    return s, t


def transposed(rule: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Hᵀ [l, k] = (Σ R_i ⊗ s_i t_i)ᵀ for R [n, n, n], s [n, k/n, q] and t [n, q, l/n]."""
    n, rows, _ = s.shape
    return torch.einsum("iac,ipq,iqr->crap", rule, s, t).reshape(n * t.shape[2], n * rows)


class Compacter(InjectedMethod[CompacterConfig]):
    """Compacter and Compacter++."""

    name = "compacter"
    peft_type = "REGRAFT_COMPACTER"
    config_type = CompacterConfig
    card = MethodCard(
        title="Bottlenecks of Kronecker products with one shared rule, and layer norms",
        family="additive / bottleneck adapter",
        paper="Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, arXiv 2106.04647",
        parameters="Σ 3(d + b) over the adapters, b = d/32, n³ of the rule, and every layer norm's own",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        merge="no",
        identity_at_init="nearly",
        sharding=False,
    )

    def places(self, model: nn.Module, config: CompacterConfig) -> list[str]:
        """The last layers of self-attention and feed-forward, and the norms.

        Raises:
            InvalidInput: the model names these layers in no known way, or n divides neither d nor b.
        """
        remedy = "Compacter sits on transformer blocks of known families."
        names = known_layers(model, FEEDFORWARD_OUTPUT, self.name, "feed-forward layers", remedy)
        if config.attention:
            names = known_layers(model, ATTENTION_OUTPUT, self.name, "attention layers", remedy) + names
        layers = linear_modules(model)
        for name in names:
            width = shape(layers[name])[0]
            size = width // config.reduction
            if not size or width % config.division or size % config.division:
                both = "Lower method.reduction, or change method.division."
                raise InvalidInput(
                    f"{name}: neither its width {width} nor its bottleneck {width} / {config.reduction} = {size} may "
                    f"leave a rest when divided by {config.division}.",
                    f"Choose a method.division that divides {width}." if width % config.division else both,
                )
        return names + (list(norm_modules(model)) if config.layer_norms else [])

    def common(self, model: nn.Module, config: CompacterConfig) -> nn.Module:
        """The rule."""
        del model
        return Rule(config.division, config.rule_spread)

    def fresh(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: CompacterConfig, context: AttachContext
    ) -> dict[str, Slot]:
        """Drawn factors, copied norms."""
        del model, context
        return {name: slot(layer, config) for name, layer in layers.items()}

    def blank(self, layer: nn.Module, config: CompacterConfig, tensors: Mapping[str, Tensor]) -> Slot:
        """A slot by the options; nothing of its shapes is free."""
        del tensors
        return slot(layer, config)

    def count(self, model: nn.Module, config: CompacterConfig) -> int:
        """Σ 3(d + b) + n³ + norms."""
        layers = linear_modules(model)
        widths = [shape(layers[name])[0] for name in self.places(model, config) if name in layers]
        norms = norm_modules(model).values() if config.layer_norms else ()
        return (
            sum(3 * (d + d // config.reduction) for d in widths)
            + config.division**3
            + sum(parameter.numel() for norm in norms for parameter in norm.parameters())
        )


def slot(layer: nn.Module, config: CompacterConfig) -> Slot:
    """The norm's copy, or an adapter on the outputs of a linear layer."""
    if is_norm(layer):
        return NormSlot(layer)
    width = shape(layer)[0]
    return BottleneckSlot("after", PhmBottleneck(width, width // config.reduction, config.division, config.activation))


METHOD = Compacter()
