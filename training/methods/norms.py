"""Layer norms that an adapter trains: each has a copy of its own, so that the base's stay as they are."""

import copy

from torch import Tensor, nn

from training.methods.injected import Slot


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
