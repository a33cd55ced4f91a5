"""LoRA with a start of its own: what PiSSA, CorDA, LoRA-GA and EVA share.

    h = W₀x + s·BAx − s·B₀A₀x,    s = α/r, A₀ and B₀ the frozen start

The papers whose start is not zero put W₀ − s·B₀A₀ in the place of the base's weight; here the start is subtracted in
the layer instead, which is the same function, leaves the base as it is for other adapters, and stores as a plain LoRA
of rank 2r on the original weights: A ← [A; A₀], B ← [B, −B₀], α ← 2α. Any tool that reads PEFT's LoRA reads that.
"""

from abc import abstractmethod
from collections.abc import Mapping
from math import isclose
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from infra.errors import CorruptArtifact
from training.methods.contract import AttachContext, MethodConfig
from training.methods.injected import InjectedAdapted, InjectedMethod, Slot
from training.methods.plain_lora import Pair, lora_config
from training.methods.targets import (
    ALL_LINEAR,
    EXCLUDE_HELP,
    TARGETS_HELP,
    Targets,
    linear_modules,
    select,
    select_for_rank,
    shape,
)


class StartedLoraConfig(MethodConfig):
    """Hyper-parameters that these methods share."""

    rank: int = Field(8, ge=1, description="r, the inner dimension of BA.")
    alpha: float | None = Field(None, gt=0, description="α of the scale α/r; none given: the rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an input of A in training.")
    targets: Targets = Field(ALL_LINEAR, description=TARGETS_HELP)
    exclude: tuple[str, ...] = Field((), description=EXCLUDE_HELP)

    @property
    def scale(self) -> float:
        """s."""
        return (self.alpha or self.rank) / self.rank


class LoraSlot(Slot):
    """A and B of one layer, and the start that is subtracted, if it is.

    Args:
        A: [r, n].
        B: [m, r].
        scale: s.
        dropout: of the input of A.
        offset: whether the start is subtracted.
    """

    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float, offset: bool) -> None:
        super().__init__()
        A, B = (factor.detach().clone(memory_format=torch.contiguous_format) for factor in (A, B))
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("A0", A.clone() if offset else None)
        self.register_buffer("B0", B.clone() if offset else None)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """h."""
        output: Tensor = base(x)
        A, B = self.factors()
        if self.A0 is None or not (self.training and self.dropout.p):
            update = functional.linear(functional.linear(self.dropout(x.to(A.dtype)), A), B)
        else:  # what is subtracted is the base's own and never dropped
            trained = functional.linear(functional.linear(self.dropout(x.to(A.dtype)), self.A), self.B)
            update = trained - functional.linear(functional.linear(x.to(A.dtype), self.A0), self.B0)  # type: ignore[arg-type]
        return output + (self.scale * update).to(output.dtype)

    def factors(self) -> Pair:
        """[A; A₀] and [B, −B₀], or A and B where nothing is subtracted."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1)

    def stored(self) -> dict[str, Tensor]:
        """As a plain LoRA."""
        A, B = self.factors()
        return {"lora_A.weight": A, "lora_B.weight": B}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """From a plain LoRA, whose second half is the start."""
        A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
        rank = len(self.A)
        with torch.no_grad():
            self.A.copy_(A[:rank])
            self.B.copy_(B[:, :rank])
            if self.A0 is not None and self.B0 is not None:
                self.A0.copy_(A[rank:])
                self.B0.copy_(-B[:, rank:])

    def update(self, weight: Tensor) -> Tensor:
        """s(BA − B₀A₀)."""
        A, B = self.factors()
        return self.scale * (B @ A).to(weight.dtype)


class StartedLora(InjectedMethod[Any]):
    """A LoRA that a method starts in its own way; what is left to write is `pairs`."""

    peft_type = "LORA"
    offset = True  # whether the start is subtracted; not where B starts at zero
    directions = 1  # of a layer's singular directions, how many each unit of rank takes

    @abstractmethod
    def pairs(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: Any, context: AttachContext
    ) -> dict[str, Pair]:
        """The start of every layer, float32."""

    def places(self, model: nn.Module, config: Any) -> list[str]:
        """The selected linear layers.

        Raises:
            InvalidInput: one of them is too small for the rank.
        """
        return select_for_rank(model, config.targets, config.exclude, config.rank, self.directions)

    def fresh(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: Any, context: AttachContext
    ) -> dict[str, Slot]:
        """The pairs, kept for the next training of the same kind."""

        def make() -> dict[str, Tensor]:
            pairs = self.pairs(model, layers, config, context)
            return {f"{name}.{side}": t for name, pair in pairs.items() for side, t in zip("AB", pair, strict=True)}

        start = context.start({"method": self.name, "layers": list(layers), **config.model_dump(mode="json")}, make)
        names = dict.fromkeys(key.rpartition(".")[0] for key in start)
        return {name: self._slot(start[f"{name}.A"], start[f"{name}.B"], config) for name in layers if name in names}

    def blank(self, layer: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> Slot:
        """Of the stored rank, halved where the start is in it."""
        A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
        m, n = shape(layer)
        rank, rest = divmod(len(A), 2 if self.offset else 1)
        if rest or A.shape[1:] != (n,) or B.shape != (m, len(A)):
            raise CorruptArtifact(f"{tuple(A.shape)} and {tuple(B.shape)} are no pair for {m} × {n}")
        return self._slot(torch.zeros(rank, n), torch.zeros(m, rank), config)

    def _slot(self, A: Tensor, B: Tensor, config: Any) -> LoraSlot:
        return LoraSlot(A, B, config.scale, config.dropout, self.offset)

    def stored_options(self, adapted: InjectedAdapted) -> dict[str, Any]:
        """peft's configuration of the plain LoRA."""
        ranks = {name: len(slot.factors()[0]) for name, slot in adapted.slots().items()}
        config = adapted.config
        rank = config.rank * (2 if self.offset else 1)
        return lora_config(adapted.model, ranks, config.scale, config.dropout, rank)

    def options_of(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        """Rank, α, dropout and places from peft's configuration; how it was started is over.

        Raises:
            ValueError: the layers' scales differ, which a slot's own configuration does not tell.
        """
        del tensors
        targets = content.get("target_modules") or ()
        ranks, alphas = content.get("rank_pattern") or {}, content.get("alpha_pattern") or {}
        stored, alpha = int(content["r"]), float(content["lora_alpha"])
        for name in {*ranks, *alphas}:
            if not isclose(alphas.get(name, alpha) / ranks.get(name, stored), alpha / stored):
                raise ValueError(f"the scale of {name} is not that of the others")
        rank = stored // (2 if self.offset else 1)
        return self.config_type.model_validate(
            {
                "rank": rank,
                "alpha": alpha / stored * rank,
                "dropout": content.get("lora_dropout", 0.0),
                "targets": targets if isinstance(targets, str) else tuple(targets),
            }
        )

    def recognises(self, adapter_config: Mapping[str, Any]) -> bool:
        """Any plain LoRA may hold one: only regraft.json, or the caller, knows."""
        return adapter_config.get("peft_type") == self.peft_type and not (
            adapter_config.get("use_dora") or adapter_config.get("use_rslora")
        )

    def count(self, model: nn.Module, config: Any) -> int:
        """Σ r(m + n)."""
        layers = linear_modules(model)
        return sum(config.rank * sum(shape(layers[name])) for name in select(model, config.targets, config.exclude))
