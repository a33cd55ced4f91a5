"""What is merged, and what comes out of it: adapters as they are stored."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from infra.errors import BaseModelMismatch, InvalidInput

MIGRATE = "Were they trained on different base models? Move one first: regraft migrate NAME@VERSION --to BASE"
AS_LORA = (
    "Write them as LoRAs, then regraft import DIR NAME --base BASE: where the update is of low rank by regraft export "
    "NAME@VERSION DIR --as-lora, else by --rank R, which tells what is lost. Of a fine-tuned model: --to merged, and "
    "import that with --rank R."
)


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is stored.

    Args:
        name: in messages, and in what is drawn at random; others have other names ("counting@3").
        config: the content of adapter_config.json.
        tensors: those of adapter_model.safetensors, by the names they have there.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def kind(self) -> str:
        """peft's word for its method, or Regraft's own: "LORA"."""
        word = self.config.get("peft_type")
        return str(getattr(word, "value", word))


@dataclass(frozen=True)
class Deviation:
    """How far the update is from the one that the method asks for, ‖made − meant‖ / ‖meant‖ (Frobenius).

    In float64: rounding to the stored dtype comes on top.

    Args:
        by_place: of each layer of a merged LoRA; none where nothing is factorised.
        overall: of all layers together.
    """

    by_place: Mapping[str, float] = field(default_factory=dict)
    overall: float = 0.0


@dataclass(frozen=True)
class Merged(Adapter):
    """An adapter made of others."""

    deviation: Deviation = Deviation()


def check_bases(identities: Mapping[str, str | None]) -> None:
    """Raise `BaseModelMismatch` unless all adapters, by name, were trained on one base; None where that is not known.

    Merging asks for one base, and the tensors do not tell: whoever has the adapters' records asks this first.
    """
    known = {name: identity for name, identity in identities.items() if identity is not None}
    first = next(iter(known), None)
    for name, identity in known.items():
        if first is not None and identity != known[first]:
            raise BaseModelMismatch(
                f"Adapters '{first}' and '{name}' were trained on different base models; only those of one can be "
                "merged.",
                "Move one first: regraft migrate NAME@VERSION --to BASE",
            )


def check(adapters: Sequence[Adapter]) -> None:
    """Raise `InvalidInput` unless these are two or more whole adapters of one kind, each under a name of its own."""
    if len(adapters) < 2:
        raise InvalidInput(f"A merge takes two adapters or more, not {len(adapters)}.", "Name another one.")
    first, names = adapters[0], [adapter.name for adapter in adapters]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidInput(f"Adapter '{twice}' is given twice.", "Give it once, with a larger weight.")
    for adapter in adapters:
        if adapter.kind != first.kind:
            raise InvalidInput(
                f"Adapters '{first.name}' ({first.kind}) and '{adapter.name}' ({adapter.kind}) are of different "
                "methods and cannot be merged.",
                AS_LORA,
            )
        if not adapter.tensors:
            raise InvalidInput(f"Adapter '{adapter.name}' holds no tensors.", "Was it saved whole?")
        for name, tensor in adapter.tensors.items():
            if not torch.isfinite(tensor).all():
                raise InvalidInput(
                    f"Adapter '{adapter.name}' holds NaN or infinite values in {name}.",
                    "Merge another version of it: training has gone wrong in this one.",
                )


def common_type(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of all of them; float32 where they are of several."""
    types = {tensor.dtype for tensor in tensors}
    return types.pop() if len(types) == 1 else torch.float32


def stored(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """What was computed in float64, rounded once.

    Raises:
        InvalidInput: it is beyond what `dtype` holds.
    """
    rounded = tensor.to(dtype).contiguous()
    if not torch.isfinite(rounded).all():
        raise InvalidInput(
            f"The merged {name} is too large for {str(dtype).removeprefix('torch.')}.",
            "Give smaller weights, or adapters stored in float32.",
        )
    return rounded
