"""What bottleneck adapters share: a narrow two-layer network, and where it sits.

a(z) = s·(U φ(D z + b_D) + b_U),    D ∈ ℝ^{b×n}, U ∈ ℝ^{m×b}

before   base(x + a(x))
after    h + a(h), h = base(x)
beside   base(x) + a(x)
around   base(x + a(base(x)))
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from infra.errors import CorruptArtifact
from training.methods.injected import Slot

Activation = Literal["relu", "tanh", "gelu", "gelu_new", "silu", "linear"]
Added = Callable[[Tensor], Tensor]
Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # D [b, n], b_D [b], U [m, b], b_U [m]


def changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with its hidden states changed: the first of a tuple, or the output itself."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def before(added: Added, base: nn.Module, x: Tensor) -> Any:
    """On the input of a linear layer."""
    return base(x + added(x))


def after(added: Added, base: nn.Module, *arguments: Any, **options: Any) -> Any:
    """On the output of any module."""
    return changed(base(*arguments, **options), lambda h: h + added(h))


def beside(added: Added, base: nn.Module, x: Tensor) -> Any:
    """From the input of a linear layer to its output."""
    return base(x) + added(x)


def around(added: Added, base: nn.Module, x: Tensor) -> Any:
    """On the input of a norm, reading its output: the norm is used twice."""
    return base(x + added(base(x)))


PLACES: dict[str, Callable[..., Any]] = {"before": before, "after": after, "beside": beside, "around": around}
Place = Literal["before", "after", "beside", "around"]


class Bottleneck(nn.Module):
    """a(z); what is left to say is where its matrices come from.

    Args:
        activation: φ, by transformers' name.
        dropout: probability of dropping an element of z in training.
        scale: s, a number or one parameter [1].
    """

    def __init__(self, activation: Activation, dropout: float = 0.0, scale: nn.Parameter | float = 1.0) -> None:
        super().__init__()
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    @abstractmethod
    def weights(self, common: Any) -> Weights:
        """D, b_D, U and b_U, of one dtype, in which a(z) is computed; `common` is the slot's."""

    def forward(self, z: Tensor, common: Any = None) -> Tensor:
        """a(z) [..., m] for z [..., n], in the dtype of z."""
        down, down_bias, up, up_bias = self.weights(common)
        inner = self.activation(functional.linear(self.dropout(z.to(down.dtype)), down, down_bias))
        return (self.scale * functional.linear(inner, up, up_bias)).to(z.dtype)


class DenseBottleneck(Bottleneck):
    """A bottleneck with matrices of its own, zero until they are drawn or restored.

    Args:
        inputs: n.
        size: b.
        outputs: m.
        bias: whether there are b_D and b_U.
        options: of `Bottleneck`.
    """

    def __init__(self, inputs: int, size: int, outputs: int, bias: bool, **options: Any) -> None:
        super().__init__(**options)
        self.down = nn.Parameter(torch.zeros(size, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, size))
        self.down_bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def weights(self, common: Any) -> Weights:
        """The parameters."""
        del common
        return self.down, self.down_bias, self.up, self.up_bias


class BottleneckSlot(Slot):
    """A bottleneck in its place.

    Args:
        place: where.
        bottleneck: a(z).
    """

    def __init__(self, place: Place, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.place = PLACES[place]
        self.bottleneck = bottleneck

    def forward(self, base: nn.Module, *arguments: Any, **options: Any) -> Any:
        """What the module `base` gives with a(z) in its place."""
        return self.place(lambda z: self.bottleneck(z, self.common), base, *arguments, **options)

    def stored(self) -> dict[str, Tensor]:
        """As the bottleneck names them."""
        return dict(self.bottleneck.state_dict(keep_vars=True))


def draw(module: nn.Module, spread: float = 0.02) -> None:
    """Draw every bottleneck's matrices in `module` from N(0, spread²), as BERT's; biases stay zero."""
    for bottleneck in module.modules():
        if isinstance(bottleneck, DenseBottleneck):
            nn.init.normal_(bottleneck.down, std=spread)
            nn.init.normal_(bottleneck.up, std=spread)


def stored_size(tensors: Mapping[str, Tensor], inputs: int, outputs: int) -> int:
    """b of a stored `DenseBottleneck`.

    Raises:
        CorruptArtifact: its matrices are not for `inputs` and `outputs`.
    """
    down, up = tensors["down"], tensors["up"]
    if down.ndim != 2 or down.shape[1] != inputs or up.shape != (outputs, len(down)):
        raise CorruptArtifact(f"{tuple(down.shape)} and {tuple(up.shape)} are no bottleneck for {inputs} → {outputs}")
    return len(down)
