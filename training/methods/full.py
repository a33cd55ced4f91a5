"""Full fine-tuning: every parameter of the base trains, θ = θ₀ + Δθ. The yardstick of every other method.

The base's own tensors are kept aside, so that the model can be switched between θ₀ and several θ: a *shelf* holds
what is not in force, at the price of one more copy of the model for θ₀ and one for each further adapter. Stored are all
of θ (and running statistics), under the model's own names; peft does not know the type.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn

from infra.errors import Conflict, CorruptArtifact, InvalidInput
from training.methods.contract import (
    Adapted,
    AttachContext,
    Method,
    MethodCard,
    MethodConfig,
    check_fit,
    stored_config,
    stored_tensors,
)


class FullConfig(MethodConfig):
    """Full fine-tuning has no hyper-parameters of its own."""


@dataclass
class Shelf:
    """The tensors of a model that are not in force: θ₀, and each adapter that is not active."""

    original: dict[str, Tensor]
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    active: str | None = None


_SHELVES: WeakKeyDictionary[nn.Module, Shelf] = WeakKeyDictionary()


class FullAdapted(Adapted):
    """One θ of a model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and persistent buffers; tied ones once."""
        shelf = _SHELVES[self.model]
        return _values(self.model) if shelf.active == self.name else dict(shelf.adapters[self.name])

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` into this θ."""
        own = self.tensors()
        check_fit(self.name, own, tensors)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def adapter_config(self) -> dict[str, Any]:
        """Only the type: the tensors say the rest."""
        return {
            "peft_type": METHOD.peft_type,
            "base_model_name_or_path": getattr(self.model, "name_or_path", None) or None,
            "auto_mapping": {
                "base_model_class": type(self.model).__name__,
                "parent_library": type(self.model).__module__,
            },
        }

    def activate(self) -> None:
        """Put this θ into the model and the one that is there onto the shelf."""
        shelf = _SHELVES[self.model]
        if shelf.active == self.name:
            return
        if shelf.active is not None:
            shelf.adapters[shelf.active] = _values(self.model)
        _put(self.model, shelf.adapters[self.name])
        self.model.zero_grad(set_to_none=True)
        shelf.active = self.name

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it, θ₀ is in the model."""
        current = _values(self.model)
        _put(self.model, _SHELVES[self.model].original)
        try:
            yield
        finally:
            _put(self.model, current)

    def merge(self) -> nn.Module:
        """A copy of the model with this θ."""
        merged = copy.deepcopy(self.model)
        _put(merged, {name: tensor.clone() for name, tensor in self.tensors().items()})
        return merged


class Full(Method[FullConfig]):
    """All parameters."""

    name = "full"
    peft_type = "REGRAFT_FULL"
    config_type = FullConfig
    card = MethodCard(
        title="Every parameter of the base",
        family="full fine-tuning",
        paper="none: the yardstick",
        parameters="|θ|",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        changes_base=True,
        sharding=False,
    )

    def attach(
        self, model: nn.Module, config: FullConfig, context: AttachContext, name: str = "default"
    ) -> FullAdapted:
        """Put a copy of θ₀ into the model, and let gradient reach all of it."""
        del config, context
        if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
            raise InvalidInput("The model carries peft adapters; 'full' trains the base itself.", "Load the base anew.")
        shelf = _SHELVES.get(model) or _SHELVES.setdefault(model, Shelf(_values(model)))
        if name in shelf.adapters:
            raise Conflict(f"The model carries an adapter called '{name}' already.", "Choose another name.")
        shelf.adapters[name] = {key: tensor.clone() for key, tensor in shelf.original.items()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        adapted = FullAdapted(model, name)
        adapted.activate()
        return adapted

    def load(self, model: nn.Module, directory: Path, name: str = "default") -> FullAdapted:
        """Put the θ stored in `directory` into `model`."""
        content, tensors = stored_config(directory), stored_tensors(directory)
        if not self.recognises(content):
            raise CorruptArtifact(f"{directory} holds {content.get('peft_type')}, not 'full'.")
        check_fit(name, _values(model), tensors)
        adapted = self.attach(model, FullConfig(), AttachContext(), name)
        adapted.restore(tensors)
        return adapted

    def count(self, model: nn.Module, config: FullConfig) -> int:
        """|θ|."""
        return sum(parameter.numel() for parameter in model.parameters() if parameter.is_floating_point())


def _values(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that the model holds now, by name: their storage, not copies."""
    return {name: tensor.data for name, tensor in _holders(model).items()}


def _put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Let the model hold `values`, on its present device and in its present dtype; optimisers keep their parameters."""
    for name, holder in _holders(model).items():
        holder.data = values[name].to(holder.device, holder.dtype)


def _holders(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return dict(model.named_parameters()) | buffers


METHOD = Full()
