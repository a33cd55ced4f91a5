"""Frozen factors with a small trained map between them: what LoRA-XS, LoRA-SB and LoLDU share.

    h = W₀x + B·M·Ax,    A ∈ ℝ^{r×n}, B ∈ ℝ^{m×r} frozen, M ∈ ℝ^{r×r} made of what trains

The factors come from the base's weight or from calibration data. They are stored beside what trains, since another
library, device or precision gives a decomposition other signs and pivots, and what trains means nothing without its
own factors. Where they can be had again from the base's weight, `store_factors: false` leaves them out of the file,
which then holds what trains and a mark of the factors; those made anew are held against the mark.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from infra.errors import CorruptArtifact
from training.methods.contract import AttachContext
from training.methods.injected import InjectedMethod, Slot
from training.methods.peft_method import seeded
from training.methods.targets import shape

AGREEMENT = 1e-3  # how far factors made anew may be from those of the training, as a share of their size


class Factors(NamedTuple):
    """A [r, n], B [m, r], and where what trains starts ([r, r] or [r]); float32."""

    A: Tensor
    B: Tensor
    start: Tensor

    def mark(self) -> Tensor:
        """[2, r]: the sums of A's rows and of B's columns, which tell signs, order and scale."""
        return torch.stack([self.A.sum(dim=1), self.B.sum(dim=0)])

    def agree(self, mark: Tensor) -> bool:
        """Whether `mark` is of these factors, up to rounding."""
        size = torch.stack([self.A.abs().sum(dim=1), self.B.abs().sum(dim=0)])
        return mark.shape == size.shape and bool(((mark.to(size) - self.mark()).abs() <= AGREEMENT * size).all())


class FactorSlot(Slot):
    """The factors of one layer; what trains is added by the method.

    Args:
        factors: A and B.
        dropout: of the input of A.
        stores_factors: whether A and B are stored, or only their mark.
    """

    A: Tensor
    B: Tensor

    def __init__(self, factors: Factors, dropout: float, stores_factors: bool) -> None:
        super().__init__()
        for name, factor in (("A", factors.A), ("B", factors.B)):
            own = factor.clone(memory_format=torch.contiguous_format)  # products of another layout round otherwise
            self.register_buffer(name, own, persistent=stores_factors)
        self.register_buffer("mark", None if stores_factors else factors.mark())
        self.dropout = nn.Dropout(dropout)

    @abstractmethod
    def between(self, hidden: Tensor) -> Tensor:
        """M·hidden for vectors `hidden` [..., r]."""

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """h."""
        output: Tensor = base(x)
        update = functional.linear(self.between(functional.linear(self.dropout(x.to(self.A.dtype)), self.A)), self.B)
        return output + update.to(output.dtype)

    def low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The update as a plain LoRA of scale 1: A [r, n] and BM [m, r], float32; `weight` is not needed."""
        del weight
        M = self.between(torch.eye(len(self.A), device=self.A.device)).T
        return self.A, self.B @ M

    def update(self, weight: Tensor) -> Tensor:
        """BMA."""
        A, BM = self.low_rank(weight)
        return (BM @ A).to(weight.dtype)


class FactorMethod(InjectedMethod[Any]):
    """A method of frozen factors.

    Attributes:
        trained: the slot's name of what trains; its length is r.
    """

    trained: ClassVar[str]

    @abstractmethod
    def derive(self, layer: nn.Module, config: Any) -> Factors:
        """The factors of a layer, from its weight alone; drawn from the global generators, which stand at 0."""

    @abstractmethod
    def slot(self, factors: Factors, config: Any) -> FactorSlot:
        """A slot that starts at `factors`."""

    def factors(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: Any, context: AttachContext
    ) -> dict[str, Factors]:
        """The factors of every layer: those that its weight gives."""
        del model
        found = {}
        for number, (name, layer) in enumerate(layers.items(), start=1):
            found[name] = self._derived(layer, config)
            context.tell("factors of the weights", number, len(layers))
        return found

    def decided_by(self, layers: Mapping[str, nn.Module], config: Any, context: AttachContext) -> dict[str, Any]:
        """All that decides the factors, beside the base, the calibration data and the seed."""
        del context
        return {"method": self.name, "layers": list(layers), **config.model_dump(mode="json")}

    def fresh(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: Any, context: AttachContext
    ) -> dict[str, Slot]:
        """The factors, kept for the next training of the same kind."""

        def make() -> dict[str, Tensor]:
            found = self.factors(model, layers, config, context)
            return {f"{name}.{part}": t for name, factors in found.items() for part, t in factors._asdict().items()}

        kept = context.start(self.decided_by(layers, config, context), make)
        return {name: self.slot(Factors(*(kept[f"{name}.{p}"] for p in Factors._fields)), config) for name in layers}

    def blank(self, layer: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> Slot:
        """Of the stored rank; with factors made anew where they are not stored."""
        if not getattr(config, "store_factors", True):
            factors = self._derived(layer, config)
            if not factors.agree(tensors["mark"]):
                raise CorruptArtifact("the factors of this weight are not those that the adapter was trained between")
        else:
            (m, n), start = shape(layer), tensors[self.trained]
            factors = Factors(torch.zeros(len(start), n), torch.zeros(m, len(start)), torch.zeros(start.shape))
        return self.slot(factors, config)

    def _derived(self, layer: nn.Module, config: Any) -> Factors:
        with seeded(0, layer):  # the same whenever and in whatever order it is asked for
            return self.derive(layer, config)
