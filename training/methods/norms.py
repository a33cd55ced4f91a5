"""Layer norms that an adapter trains: each has a copy of its own, so that the base's stay as they are."""

import copy
import re

from torch import Tensor, nn

from training.methods.injected import Slot
from training.methods.targets import bare_modules


def is_norm(layer: nn.Module) -> bool:
    """Whether a module is a layer norm or RMS norm with a weight."""
    return bool(re.search("(LayerNorm|RMSNorm)$", type(layer).__name__)) and "weight" in dict(layer.named_parameters())


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer norm and RMS norm of `model` that has a weight, by name, in the model's order."""
    return {name: layer for name, layer in bare_modules(model) if is_norm(layer)}


class NormSlot(Slot):
    """A norm's own weight and, where it has one, bias; computed in float32.

    Args:
        base: the norm that it starts as.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.norm = copy.deepcopy(base).float()

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """The trained norm's output instead of the base's."""
        del base
        output: Tensor = self.norm(x.to(self.norm.weight.dtype)).to(x.dtype)  # type: ignore[arg-type]
        return output

    def stored(self) -> dict[str, Tensor]:
        """As the norm itself names them."""
        return dict(self.norm.state_dict(keep_vars=True))
