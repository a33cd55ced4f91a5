"""What methods share that train the base's own parameters, θ = θ₀ + Δθ, instead of adding some.

The base's own tensors are kept aside, so that the model can be switched between θ₀ and several θ: a *shelf* holds
what is not in force, at the price of one more copy of the model for θ₀ and one for each further adapter. Stored are all
of θ (and running statistics), under the model's own names; peft does not know the types. A method that leaves tensors
untouched stores them, too: so a checkpoint has the same tensors at every step, and a plain model loads the file.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from infra.errors import CorruptArtifact, InvalidInput
from training.methods.contract import (
    Adapted,
    AttachContext,
    Config,
    Method,
    check_fit,
    origin,
    owners,
    stored_config,
    stored_tensors,
)
from training.methods.injected import check_room


@dataclass
class Shelf:
    """The tensors of a model that are not in force: θ₀, and each adapter that is not active."""

    original: dict[str, Tensor]
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    active: str | None = None


_SHELVES: WeakKeyDictionary[nn.Module, Shelf] = WeakKeyDictionary()


class TrainedBase(Adapted):
    """One θ of a model."""

    def __init__(self, model: nn.Module, name: str, method: "BaseTraining[Any]", config: Any, seed: int) -> None:
        self.model = model
        self.name = name
        self.method = method
        self.config = config
        self.seed = seed

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
        """The type and, where the method has any, its options: the tensors say the rest."""
        options = self.config.model_dump(mode="json")
        return {
            "peft_type": self.method.peft_type,
            **origin(self.model),
            **({"options": options, "seed": self.seed} if options else {}),
        }

    def activate(self) -> None:
        """Put this θ into the model and the one that is there onto the shelf; gradient reaches what trains."""
        shelf = _SHELVES[self.model]
        if shelf.active != self.name:
            if shelf.active is not None:
                shelf.adapters[shelf.active] = _values(self.model)
            _put(self.model, shelf.adapters[self.name])
            self.model.zero_grad(set_to_none=True)
            shelf.active = self.name
        self.let_gradient_in()

    def let_gradient_in(self) -> None:
        """Set `requires_grad` on exactly what trains now: here, on all that can."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

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
        owners(merged).clear()
        _put(merged, {name: tensor.clone() for name, tensor in self.tensors().items()})
        for parameter in merged.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return merged


class BaseTraining(Method[Config]):
    """A method that trains the base's own parameters."""

    adapted_type: ClassVar[type[TrainedBase]] = TrainedBase

    def check(self, model: nn.Module, config: Config) -> None:
        """Raise `InvalidInput` where the method cannot train `model` by `config`; nothing was changed."""
        del model, config

    def attach(self, model: nn.Module, config: Config, context: AttachContext, name: str = "default") -> Any:
        """Put a copy of θ₀ into the model, and let gradient reach what trains."""
        check_room(model, self, name)
        if hasattr(model, "peft_config"):
            raise InvalidInput(
                f"The model carries peft adapters; '{self.name}' trains the base itself.", "Load the base anew."
            )
        self.check(model, config)
        shelf = _SHELVES.get(model) or _SHELVES.setdefault(model, Shelf(_values(model)))
        shelf.adapters[name] = {key: tensor.clone() for key, tensor in shelf.original.items()}
        owners(model)[name] = self.name
        adapted = self.adapted_type(model, name, self, config, context.seed)
        adapted.activate()
        return adapted

    def load(self, model: nn.Module, directory: Path, name: str = "default") -> Any:
        """Put the θ stored in `directory` into `model`."""
        shelf = _SHELVES.get(model)
        content = stored_config(directory)
        tensors = stored_tensors(directory, shelf.original if shelf else _values(model))
        if not self.recognises(content):
            raise CorruptArtifact(f"{directory} holds {content.get('peft_type')}, not '{self.name}'.")
        try:
            config = self.config_type.model_validate(content.get("options", {}))
            context = AttachContext(seed=int(content.get("seed", 0)))
        except (TypeError, ValueError) as error:
            raise CorruptArtifact(f"{directory}: the options of '{self.name}' cannot be read ({error}).") from error
        check_fit(name, _values(model), tensors)
        adapted = self.attach(model, config, context, name)
        adapted.restore(tensors)
        return adapted

    def count(self, model: nn.Module, config: Config) -> int:
        """|θ|."""
        del config
        return size(model.parameters())


def size(parameters: Iterable[nn.Parameter]) -> int:
    """The number of elements that can train."""
    return sum(parameter.numel() for parameter in parameters if parameter.is_floating_point())


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
