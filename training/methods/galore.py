"""GaLore: full-parameter training with the optimiser's moments in a low-rank subspace (Zhao et al., arXiv 2403.03507).

    every T updates:  P = U_r or Q = V_rᵀ of the gradient G [m, n], by its singular value decomposition
    each update:      R = PᵀG [r, n]  or  R = GQᵀ [m, r],    M, V: Adam's moments of R
                      W ← W − η·α·√(1 − β₂ᵗ)/(1 − β₁ᵗ)·P(M/(√V + ε)),    W ← W − η·wd·W

The moments are not rotated when the subspace changes. All parameters train: the weights of the linear layers in the
blocks (attention and feed-forward) in a subspace, the others by AdamW. State of an m × n weight, m ≤ n: mr + 2nr
elements, against Adam's 2mn. Nothing is left in the model but its new weights.

Defaults are those of the paper's smallest model (60 M): r = 128, T = 200, α = 0.25, η = 0.01 (so 0.0025 on the
projected weights); on GLUE the paper takes r = 4, α = 4, T = 500, η = 3e-5. Where the released code differs: it chooses
layers by "attn" and "mlp" in their names, which misses those of other architectures; a rank above a layer's size is
cut down there, too, but where it is above every layer's it is an error here. The per-layer and 8-bit variants are left
out: they go with neither gradient accumulation nor clipping, or need another package.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from infra.errors import InvalidInput
from training.methods.base_training import BaseTraining, TrainedBase
from training.methods.contract import MethodCard, MethodConfig
from training.methods.projected_adamw import ProjectedAdamW, Projection
from training.methods.stacks import blocks
from training.methods.targets import EXCLUDE_HELP, Targets, linear_modules, select, shape


class GaloreConfig(MethodConfig):
    """Hyper-parameters of GaLore."""

    rank: int = Field(128, ge=1, description="r, the dimension of the subspace; smaller layers keep all directions.")
    interval: int = Field(200, ge=1, description="T, the updates after which the subspace is taken anew.")
    scale: float = Field(0.25, gt=0, description="α, of the projected weights' updates.")
    projection: Projection = Field(
        "std",
        description="Sides that are projected: left, right, both (full), the smaller (std), the larger (reverse_std).",
    )
    targets: Targets | None = Field(
        None,
        description="Linear layers whose gradient is projected, as in LoRA's targets; null for those of the blocks.",
    )
    exclude: tuple[str, ...] = Field((), description=EXCLUDE_HELP)


class GaloreAdapted(TrainedBase):
    """One θ of a model, trained in low-rank subspaces."""

    method: "Galore"

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW that projects the selected weights' gradients."""
        layers = linear_modules(self.model)
        matrices = {id(layers[name].weight): layers[name].weight for name in places(self.model, self.config)}
        trainable = self.trainable().values()
        return self.method.optimizer_type(
            [parameter for parameter in trainable if id(parameter) in matrices],
            [parameter for parameter in trainable if id(parameter) not in matrices],
            learning_rate,
            weight_decay,
            **self.config.model_dump(exclude={"targets", "exclude"}),
        )


class Galore(BaseTraining[Any]):
    """GaLore; the natural variant has another optimiser."""

    name = "galore"
    peft_type = "REGRAFT_GALORE"
    config_type: type[Any] = GaloreConfig
    adapted_type = GaloreAdapted
    optimizer_type: ClassVar[type[ProjectedAdamW]] = ProjectedAdamW
    card = MethodCard(
        title="Full fine-tuning with the optimiser's moments in a low-rank subspace",
        family="selective / memory-efficient optimiser",
        paper="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, arXiv 2403.03507",
        parameters="|θ|; optimiser state mr + 2nr, m ≤ n, instead of 2mn",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        changes_base=True,
        sharding=False,
    )

    def check(self, model: nn.Module, config: Any) -> None:
        """There are layers to project, and at least one of them is larger than the rank.

        Raises:
            InvalidInput: there are not.
        """
        layers = linear_modules(model)
        largest = max(min(shape(layers[name])) for name in places(model, config))
        if config.rank > largest:
            raise InvalidInput(
                f"rank {config.rank} is above the size of every projected layer: the largest is {largest} on its "
                "smaller side.",
                f"Lower method.rank well below {largest}: at {largest} nothing is saved.",
            )


def places(model: nn.Module, config: GaloreConfig) -> list[str]:
    """The names of the layers whose gradient is projected.

    Raises:
        InvalidInput: there are none.
    """
    targets = config.targets
    if targets is None:
        stacks = tuple(f"{name}." for name in blocks(model))
        targets = tuple(name for name in linear_modules(model) if name.startswith(stacks))
        if not targets:
            raise InvalidInput(
                f"{type(model).__name__} has no blocks with linear layers.", "Name layers: method.targets."
            )
    return select(model, targets, config.exclude)


METHOD = Galore()
