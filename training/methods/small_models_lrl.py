"""Language adapters for small models (Gurgurov et al., arXiv 2502.10140): MAD-X's bottlenecks, Pfeiffer's placement.

After the feed-forward of every block, x its residual and h its output, b = d/16:

    post-norm (BERT)    y = LN(x + h + a(LN(x + h))),  the base's own frozen LN twice
    pre-norm (Llama)    y = x + h + a(x + h)
    a(z) = U relu(D z + b_D) + b_U

With `invertible`, a NICE coupling block follows the embeddings, and its inverse stands before the output embeddings:

    e = [e₁, e₂] (⌊d/2⌋ and the rest)    y₁ = e₁ + F(e₂),  y₂ = e₂ + G(y₁)    e₂ = y₂ − G(y₁),  e₁ = y₁ − F(e₂)

F and G are bottlenecks of half their inputs' width. A model without output embeddings (a classifier) has the forward
half only, and takes an adapter that was trained with both. The block is parameters of the adapter, stored once.

All matrices start from N(0, 0.02²) and biases at zero, so that a fresh adapter changes little, but something. Where the
paper's code differs: its training ran without the inverse and its scoring with it; here both have it. It also trains
the masked-LM head's transform; here the base stays frozen. Its third architecture, LoRA on queries and values, is the
method `lora`. Language adapters are trained on masked tokens (encoders) or next tokens (decoders), with a learning rate
of 1e-4. Where a model gives its hidden states, those of a pre-norm block are as they come to the adapter.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from infra.errors import InvalidInput
from training.methods.bottleneck import Activation, BottleneckSlot, DenseBottleneck, changed, draw, stored_size
from training.methods.contract import AttachContext, MethodCard, MethodConfig
from training.methods.injected import InjectedMethod, Slot, base_of
from training.methods.stacks import blocks
from training.methods.targets import bare_modules, is_norm, linear_modules, shape

CLOSING_NORM = r"output\.LayerNorm|output_layer_norm"  # of post-norm blocks: BERT's and DistilBERT's relatives


class SmallModelsLrlConfig(MethodConfig):
    """Hyper-parameters of language adapters."""

    reduction: int = Field(16, ge=1, description="d/b, by how much the bottleneck is narrower than the model.")
    activation: Activation = Field("relu", description="φ, between the two matrices.")
    invertible: bool = Field(False, description="Also an invertible block at the embeddings.")


class Nice(nn.Module):
    """The coupling block: F from the second part of the embedding to the first, G back.

    Args:
        width: d.
        activation: of F and G.
    """

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        first, second = width // 2, width - width // 2
        self.split = [first, second]
        self.F = DenseBottleneck(second, second // 2, first, bias=True, activation=activation)
        self.G = DenseBottleneck(first, first // 2, second, bias=True, activation=activation)

    def forward(self, e: Tensor) -> Tensor:
        """The coupled y [..., d] for e [..., d]."""
        e1, e2 = torch.split(e, self.split, dim=-1)
        y1 = e1 + self.F(e2)
        return torch.cat([y1, e2 + self.G(y1)], dim=-1)

    def inverse(self, y: Tensor) -> Tensor:
        """The e [..., d] of which `forward` makes y [..., d]."""
        y1, y2 = torch.split(y, self.split, dim=-1)
        e2 = y2 - self.G(y1)
        return torch.cat([y1 - self.F(e2), e2], dim=-1)


class EmbeddingSlot(Slot):
    """The coupling block after the embeddings."""

    def forward(self, base: nn.Module, *arguments: Any, **options: Any) -> Any:
        """The embeddings [..., d], coupled."""
        return changed(base(*arguments, **options), self.common)


class HeadSlot(Slot):
    """Its inverse before the output embeddings."""

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """The logits of the decoupled x [..., d]."""
        logits: Tensor = base(self.common.inverse(x))
        return logits


class SmallModelsLrl(InjectedMethod[SmallModelsLrlConfig]):
    """Language adapters."""

    name = "small-models-lrl"
    peft_type = "REGRAFT_SMALL_MODELS_LRL"
    config_type = SmallModelsLrlConfig
    card = MethodCard(
        title="Language adapters: a bottleneck after each feed-forward, invertible embeddings",
        family="additive / bottleneck adapter",
        paper="Small Models, Big Impact: Efficient Corpus and Graph-Based Adaptation of Small Multilingual Language "
        "Models for Low-Resource Languages, arXiv 2502.10140",
        parameters="L(2db + b + d), b = d/16; invertible and even d: 2(2cm + m + c) more, c = d/2, m = ⌊c/2⌋",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        merge="no",
        identity_at_init="nearly",
        sharding=False,
    )

    def places(self, model: nn.Module, config: SmallModelsLrlConfig) -> list[str]:
        """The closing norm of every post-norm block, every other block itself; embeddings and head where invertible.

        Raises:
            InvalidInput: there is no stack of blocks, the model is too narrow, or its embeddings cannot be inverted.
        """
        places = [closing_norm(name, block) or name for name, block in blocks(model).items()]
        if not places:
            raise InvalidInput(
                f"{type(model).__name__} has no stack of like blocks, after whose feed-forward an adapter could sit.",
                "Try: llm-adapters, which adapts linear layers.",
            )
        for name in places:
            width = width_of(base_of(model.get_submodule(name)))
            if width < config.reduction:
                raise InvalidInput(
                    f"A bottleneck of {width} / {config.reduction} has no width.",
                    f"Lower method.reduction to {width} or less.",
                )
        return [*places, *self.bare_places(model, config)]

    def bare_places(self, model: nn.Module, config: SmallModelsLrlConfig) -> list[str]:
        """Embeddings and output embeddings, which share the coupling block."""
        return embedding_places(model) if config.invertible else []

    def common(self, model: nn.Module, config: SmallModelsLrlConfig) -> nn.Module | None:
        """The coupling block."""
        if not config.invertible:
            return None
        nice = Nice(embedding_width(model), config.activation)
        draw(nice)
        return nice

    def fresh(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: SmallModelsLrlConfig, context: AttachContext
    ) -> dict[str, Slot]:
        """Drawn bottlenecks."""
        del context
        at_embeddings = self.bare_places(model, config)
        slots: dict[str, Slot] = {}
        for name, layer in layers.items():
            if name in at_embeddings:
                slots[name] = embedding_slot(layer)
            else:
                width = width_of(layer)
                slots[name] = bottleneck_slot(layer, width // config.reduction, config)
                draw(slots[name])
        return slots

    def blank(self, layer: nn.Module, config: SmallModelsLrlConfig, tensors: Mapping[str, Tensor]) -> Slot:
        """A slot of the stored width, or one that only refers to the coupling block."""
        if not tensors:
            return embedding_slot(layer)
        width = width_of(layer)
        return bottleneck_slot(layer, stored_size(tensors, width, width), config)

    def count(self, model: nn.Module, config: SmallModelsLrlConfig) -> int:
        """Σ 2db + b + d over the blocks, and the coupling block's four matrices and biases."""
        at_embeddings = self.bare_places(model, config)
        names = [name for name in self.places(model, config) if name not in at_embeddings]
        widths = [width_of(base_of(model.get_submodule(name))) for name in names]
        total = sum(2 * d * (d // config.reduction) + d // config.reduction + d for d in widths)
        if config.invertible:
            d = embedding_width(model)
            for inputs, outputs in ((d - d // 2, d // 2), (d // 2, d - d // 2)):
                total += inputs // 2 * (inputs + outputs + 1) + outputs
        return total


def closing_norm(name: str, block: nn.Module) -> str | None:
    """The norm that ends a post-norm block, by its whole name; None of a pre-norm one."""
    inside = (own for own, _ in bare_modules(block) if re.fullmatch(CLOSING_NORM, own))
    return next((f"{name}.{own}" for own in inside), None)


def width_of(layer: nn.Module) -> int:
    """d, of a norm or of a block, whose last linear layer gives the block's output."""
    if is_norm(layer):
        return int(layer.weight.numel())  # type: ignore[operator]
    linear = list(linear_modules(layer).values())
    if not linear:
        raise InvalidInput(f"{type(layer).__name__} has no linear layer, so it is no transformer block.", "Try: lora")
    return shape(linear[-1])[0]


def bottleneck_slot(layer: nn.Module, size: int, config: SmallModelsLrlConfig) -> Slot:
    """A bottleneck around a closing norm, or after a block."""
    width = width_of(layer)
    bottleneck = DenseBottleneck(width, size, width, bias=True, activation=config.activation)
    return BottleneckSlot("around" if is_norm(layer) else "after", bottleneck)


def embedding_slot(layer: nn.Module) -> Slot:
    """Of the output embeddings, which are linear, or of the input's."""
    return HeadSlot() if isinstance(layer, nn.Linear) else EmbeddingSlot()


def embedding_places(model: nn.Module) -> list[str]:
    """The module that gives the embeddings (BERT's with positions and norm), and the output embeddings if there are.

    Raises:
        InvalidInput: the model reads no tokens, or in two places, or its head is not of its embeddings' width.
    """
    if getattr(model, "main_input_name", None) != "input_ids" or model.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise InvalidInput(
            f"{type(model).__name__} is neither encoder nor decoder of tokens, so its embeddings are not inverted.",
            "Set method.invertible: false.",
        )
    names = {id(module): name for name, module in model.named_modules()}
    inputs = names[id(model.get_input_embeddings())].replace(".base_layer", "")  # type: ignore[operator]
    holder = inputs.rpartition(".")[0]
    places = [holder if holder.rpartition(".")[2] == "embeddings" else inputs]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None:
        if shape(base_of(head))[1] != embedding_width(model):
            raise InvalidInput(
                f"The output embeddings of {type(model).__name__} are not as wide as its input embeddings.",
                "Set method.invertible: false.",
            )
        places.append(names[id(head)])
    return places


def embedding_width(model: nn.Module) -> int:
    """d of the embeddings."""
    return int(model.get_input_embeddings().embedding_dim)  # type: ignore[operator]


METHOD = SmallModelsLrl()
