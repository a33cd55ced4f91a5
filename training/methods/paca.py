"""PaCA: some columns of every linear layer train, chosen at random (Woo et al., arXiv 2503.01905).

    y = Wx + s·Δ·x[I],    s = α/r, I a random set of r of the n input features, Δ ∈ ℝ^{m×r} zero at the start

As fast as a frozen layer but for a few columns: no second product over the whole input as in LoRA, and of a layer's
input only the r features of I are kept for the backward pass. A layer has r·m parameters, LoRA's r(m + n) about twice
as many: compare PaCA at 2r with LoRA at r.

The paper trains P = W[:, I]/s and writes s·P into W after each step. Here Δ = P − W[:, I]/s trains instead, beside a
weight that stays as it is for other adapters (see slices.py): the gradient is the same, so is every step of an
optimiser without weight decay, and weight decay pulls towards the base's columns instead of towards zero. s multiplies
the gradient: Adam moves the columns by s times the learning rate. Rank and α are those of the paper's configuration;
its instruction-tuning runs take rank 64 and learning rates ten times LoRA's.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from infra.errors import CorruptArtifact, InvalidInput
from training.methods.contract import AttachContext, MethodCard, MethodConfig
from training.methods.injected import InjectedMethod, Slot
from training.methods.slices import ColumnSlot, stored_slot
from training.methods.targets import ALL_LINEAR, EXCLUDE_HELP, TARGETS_HELP, Targets, linear_modules, select, shape


class PacaConfig(MethodConfig):
    """Hyper-parameters of PaCA."""

    rank: int = Field(8, ge=1, description="r, the number of columns of every layer that train.")
    alpha: int | None = Field(None, ge=1, description="α of the scale α/r; none given: the rank.")
    targets: Targets = Field(ALL_LINEAR, description=TARGETS_HELP)
    exclude: tuple[str, ...] = Field((), description=EXCLUDE_HELP)

    @property
    def scale(self) -> float:
        """s."""
        return (self.alpha or self.rank) / self.rank


class Paca(InjectedMethod[PacaConfig]):
    """PaCA."""

    name = "paca"
    peft_type = "REGRAFT_PACA"
    config_type = PacaConfig
    card = MethodCard(
        title="A few random columns of every linear layer",
        family="selective / structured",
        paper="PaCA: Partial Connection Adaptation for Efficient Fine-Tuning, arXiv 2503.01905",
        parameters="Σ r·m over the adapted m × n layers",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        sharding=False,  # the backward pass reads whole weights
    )

    def places(self, model: nn.Module, config: PacaConfig) -> list[str]:
        """The selected linear layers.

        Raises:
            InvalidInput: one of them has fewer than r inputs.
        """
        names, layers = select(model, config.targets, config.exclude), linear_modules(model)
        for name in names:
            inputs = shape(layers[name])[1]
            if config.rank > inputs:
                raise InvalidInput(
                    f"rank {config.rank} is above the {inputs} columns of {name}.",
                    f"Lower method.rank to {inputs}, or leave the layer out: method.exclude.",
                )
        return names

    def fresh(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: PacaConfig, context: AttachContext
    ) -> dict[str, Slot]:
        """Columns drawn for each layer on its own."""
        del model, context
        slots: dict[str, Slot] = {}
        for name, layer in layers.items():
            m, n = shape(layer)
            slots[name] = ColumnSlot(torch.randperm(n)[: config.rank].sort().values, m, config.scale)
        return slots

    def blank(self, layer: nn.Module, config: PacaConfig, tensors: Mapping[str, Tensor]) -> Slot:
        """As stored."""
        if len(tensors["indices"]) != config.rank:
            raise CorruptArtifact(f"{len(tensors['indices'])} columns, but the options say {config.rank}")
        return stored_slot(layer, tensors, config.scale)

    def count(self, model: nn.Module, config: PacaConfig) -> int:
        """Σ r·m."""
        layers = linear_modules(model)
        return sum(config.rank * shape(layers[name])[0] for name in select(model, config.targets, config.exclude))


METHOD = Paca()
