"""Methods that peft lacks: a layer of the model is wrapped, and every adapter has a slot in the wrapper.

What a method writes is its `Slot`: the parameters that one adapter has at one layer, what they make of the layer's
input, and, where the mathematics allows it, how they fold into its weight. Attaching, storing, switching and merging
are here, once for all of them.

The base's tensors are never written: a method whose paper moves the base (W_res = W − s·B₀A₀) subtracts instead.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.errors import Conflict, CorruptArtifact, InvalidInput, NotMergeable, RegraftError
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
from training.methods.peft_method import own_weight, seeded

PREFIX = "base_model.model."  # what peft puts in front of a module's name
COMMON = "common."  # in front of what is of the adapter and of no layer, instead of PREFIX


class Slot(nn.Module, ABC):
    """What one adapter has at one layer. Its parameters train; its persistent buffers are stored beside them.

    Attributes:
        common: what all slots of the adapter share, the same object in each, if the method has such a thing.
    """

    common: Any

    def __init__(self) -> None:
        super().__init__()
        self.register_module("common", None)

    @abstractmethod
    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """The adapted layer's output for the input `x` [..., n] of the frozen layer `base`: [..., m].

        A slot of a module that is no linear layer takes what that module takes, and gives what it gives.
        """

    def stored(self) -> dict[str, Tensor]:
        """What is written to disk, by its name under the layer's; `common` is not the slot's."""
        state = self.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if not name.startswith(COMMON)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Exact inverse of `stored`, in place; names and shapes are those of `stored`."""
        with torch.no_grad():
            for name, tensor in self.stored().items():
                tensor.copy_(tensors[name])

    def update(self, weight: Tensor) -> Tensor:
        """ΔW for the layer's weight W, both float32 and [m, n]; [m] for a norm, [m, n, …] for a convolution.

        Raises:
            NotMergeable: the slot changes more than a weight.
        """
        raise NotMergeable("This adapter's update is not a change of the base's weights.", "Use it as it is.")

    def shift(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Δb [m] for the layer's weight and bias, both float32; None where the bias stays."""
        del weight, bias
        return None


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A layer of the model with the slots of its adapters; one of them is in force, or none."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slots = nn.ModuleDict()
        self.in_force: str | None = None
        self.train(base_layer.training)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The base layer's output, as the adapter in force makes it."""
        if self.in_force is None or self.in_force not in self.slots:
            return self.base_layer(*arguments, **options)
        return self.slots[self.in_force](self.base_layer, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        """The base layer's attribute: models ask blocks and embeddings for more than their output."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet
                raise
            return getattr(self.base_layer, name)


class InjectedAdapted(Adapted):
    """One named adapter in the wrapped layers of a model; others of the same method may sit beside it."""

    def __init__(self, model: nn.Module, name: str, method: "InjectedMethod[Any]", config: Any) -> None:
        self.model = model
        self.name = name
        self.method = method
        self.config = config

    def layers(self) -> dict[str, AdapterLayer]:
        """The layers on which this adapter has a slot, by name."""
        return {name: layer for name, layer in adapter_layers(self.model).items() if self.name in layer.slots}

    def slots(self) -> dict[str, Any]:
        """This adapter's slots by the name of their layer."""
        return {name: layer.slots[self.name] for name, layer in self.layers().items()}

    def common(self) -> nn.Module | None:
        """What this adapter's slots share."""
        return next((slot.common for slot in self.slots().values()), None)

    def tensors(self) -> dict[str, Tensor]:
        """Every slot's stored tensors under `base_model.model.LAYER.`, as peft would name them.

        What the slots share is there once, under `common.`.
        """
        common = self.common()
        shared = {} if common is None else {f"{COMMON}{key}": t for key, t in common.state_dict().items()}
        own = {
            f"{PREFIX}{layer}.{name}": tensor.detach()
            for layer, slot in self.slots().items()
            for name, tensor in slot.stored().items()
        }
        return shared | own

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` in place of the adapter's own."""
        check_fit(self.name, self.tensors(), tensors)
        if (common := self.common()) is not None:
            common.load_state_dict({name: tensors[f"{COMMON}{name}"] for name in common.state_dict()})
        parts = by_layer(tensors)
        for layer, slot in self.slots().items():
            slot.restore(parts.get(layer, {}))

    def adapter_config(self) -> dict[str, Any]:
        """The method's type and options, and which class of base it is for."""
        return {
            "peft_type": self.method.peft_type,
            **origin(self.model),
            **self.method.stored_options(self),
        }

    def activate(self) -> None:
        """Put this adapter in force; gradient reaches it and none of the others."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for layer in adapter_layers(self.model).values():
            layer.in_force = self.name
        for slot in self.slots().values():
            slot.requires_grad_(True)

    def disabled(self) -> AbstractContextManager[None]:
        """Within it, every wrapped layer computes what the base layer computes."""
        return switched_off(self.model)

    def merge(self) -> nn.Module:
        """A copy of the base with this adapter folded in; needs memory for one more base model.

        Raises:
            NotMergeable: the method's update is no change of weights, or the merged weights would not be finite.
        """
        if self.method.card.merge == "no":
            return super().merge()
        merged = copy.deepcopy(self.model)
        for name, layer in adapter_layers(merged).items():
            if self.name in layer.slots:
                fold(merged, name, self.name)
        unwrap(merged)
        for parameter in merged.parameters():
            parameter.requires_grad_(True)
        return merged


class InjectedMethod(Method[Config]):
    """A method of slots."""

    adapted_type: ClassVar[type[InjectedAdapted]] = InjectedAdapted

    @abstractmethod
    def places(self, model: nn.Module, config: Config) -> list[str]:
        """The names of the layers that are wrapped.

        Raises:
            InvalidInput: the model has nothing that the method can adapt.
        """

    @abstractmethod
    def fresh(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: Config, context: AttachContext
    ) -> dict[str, Slot]:
        """A new adapter's slot for each of the bare `layers` of the bare `model`; drawn from the global generators."""

    def common(self, model: nn.Module, config: Config) -> nn.Module | None:
        """What all slots of an adapter share, as new; drawn from the global generators. Each slot is given it."""
        del model, config
        return None

    def bare_places(self, model: nn.Module, config: Config) -> list[str]:
        """Those of `places` whose slots store nothing of their own."""
        del model, config
        return []

    @abstractmethod
    def blank(self, layer: nn.Module, config: Config, tensors: Mapping[str, Tensor]) -> Slot:
        """A slot of the shapes that the stored `tensors` of one layer have, its content to be restored.

        Raises:
            CorruptArtifact: they do not fit the layer.
        """

    def stored_options(self, adapted: InjectedAdapted) -> dict[str, Any]:
        """What adapter_config.json says beside the type."""
        options: dict[str, Any] = adapted.config.model_dump(mode="json")
        return {"options": options}

    def options_of(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Config:
        """The options that a stored adapter was made with: inverse of `stored_options`."""
        del tensors
        return self.config_type.model_validate(content.get("options", {}))

    def attach(self, model: nn.Module, config: Config, context: AttachContext, name: str = "default") -> Any:
        """Put a fresh adapter on `model`, drawn from `context.seed`; the global random state stays as it was."""
        check_room(model, self, name)
        layers = {place: base_of(model.get_submodule(place)) for place in self.places(model, config)}
        with undone_on_error(model, name), seeded(context.seed, model):
            common = self.common(model, config)
            slots = self.fresh(model, layers, config, context)
            adapted = self._put(model, slots, common, config, name)
            found, expected = sum(p.numel() for p in adapted.trainable().values()), self.count(model, config)
            if found > expected or (found < expected and not self.card.count_is_bound):
                base = type(model).__name__
                raise RegraftError(
                    f"'{self.name}' has {found:,} trainable parameters on {base}, {expected:,} expected.",
                    "Its formula does not know this architecture; please report it.",
                )
        return adapted

    def load(self, model: nn.Module, directory: Path, name: str = "default") -> Any:
        """Put the adapter stored in `directory` on `model`."""
        content, tensors = stored_config(directory), stored_tensors(directory)
        if not self.recognises(content):
            raise CorruptArtifact(f"{directory} holds {content.get('peft_type')}, not '{self.name}'.")
        check_room(model, self, name)
        try:
            config = self.options_of(content, tensors)
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(f"{directory}: the options of '{self.name}' cannot be read ({error}).") from error
        with undone_on_error(model, name), seeded(0, model):
            try:
                slots = self._blanks(model, config, tensors, name)
                common = self.common(model, config)
            except RegraftError as error:
                raise misfit(directory, model, error.what) from error
            adapted = self._put(model, slots, common, config, name)
            adapted.restore(tensors)
        return adapted

    def _blanks(self, model: nn.Module, config: Config, tensors: Mapping[str, Tensor], name: str) -> dict[str, Slot]:
        parts: dict[str, dict[str, Tensor]] = {place: {} for place in self.bare_places(model, config)}
        slots = {}
        for place, part in (parts | by_layer(tensors)).items():
            try:
                layer = base_of(model.get_submodule(place))
            except AttributeError:
                raise CorruptArtifact(f"there is no layer {place}") from None
            try:
                slots[place] = self.blank(layer, config, part)
                check_fit(name, slots[place].stored(), part)
            except (RegraftError, AttributeError, KeyError, RuntimeError, ValueError) as error:
                raise CorruptArtifact(f"{place}: {error}") from error
        if differing := set(slots) ^ set(self.expected_places(model, config, slots)):
            absent = ", ".join(sorted(differing)[:3])
            raise CorruptArtifact(f"{absent} is missing or not adapted by these options")
        return slots

    def expected_places(self, model: nn.Module, config: Config, slots: Mapping[str, Slot]) -> list[str]:
        """Where a stored adapter must have slots; some methods leave layers out that they gave nothing to."""
        del slots
        return self.places(model, config)

    def _put(
        self, model: nn.Module, slots: Mapping[str, Slot], common: nn.Module | None, config: Config, name: str
    ) -> Any:
        for place, slot in slots.items():
            slot.common = common
            wrapper = model.get_submodule(place)
            if not isinstance(wrapper, AdapterLayer):
                wrapper = AdapterLayer(wrapper)
                parent, _, last = place.rpartition(".")
                setattr(model.get_submodule(parent), last, wrapper)
            device = next((p.device for p in wrapper.base_layer.parameters()), torch.device("cpu"))
            wrapper.slots[name] = slot.to(device).train(wrapper.training)
        owners(model)[name] = self.name
        adapted = self.adapted_type(model, name, self, config)
        adapted.activate()
        return adapted


# -- the model's wrapped layers ----------------------------------------------------------------------------------------


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Every wrapped layer by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Within it, no adapter of `model` is in force."""
    held = {layer: layer.in_force for layer in adapter_layers(model).values()}
    for layer in held:
        layer.in_force = None
    try:
        yield
    finally:
        for layer, name in held.items():
            layer.in_force = name


def base_of(module: nn.Module) -> nn.Module:
    """The layer itself, without the wrapper."""
    return module.base_layer if isinstance(module, AdapterLayer) else module


def base_size(model: nn.Module) -> int:
    """The number of the base's own parameters, tied ones once, whatever adapters sit on it."""
    mine = {id(parameter) for layer in adapter_layers(model).values() for parameter in layer.slots.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in mine)


def check_room(model: nn.Module, method: Method[Any], name: str) -> None:
    """Raise unless an adapter called `name` of `method` can join what `model` carries."""
    there = owners(model)
    others = {owner for owner in there.values() if owner != method.name}
    foreign = isinstance(model, PeftModel) or any(
        isinstance(module, BaseTunerLayer) and not isinstance(module, AdapterLayer) for module in model.modules()
    )
    if others or foreign:
        raise InvalidInput(
            f"The model carries {', '.join(sorted(others)) or 'peft'} adapters; '{method.name}' cannot join them.",
            "Load the base anew.",
        )
    if name in there:
        raise Conflict(f"The model carries an adapter called '{name}' already.", "Choose another name.")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise InvalidInput(f"'{name}' cannot name an adapter.", "Choose another name.")


def unwrap(model: nn.Module, only_empty: bool = False) -> None:
    """Put the base layers back in the place of the wrappers, or of those on which no adapter is left."""
    for name, layer in adapter_layers(model).items():
        if not (only_empty and len(layer.slots)):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.base_layer)
    if not adapter_layers(model):
        vars(model).pop("_regraft_adapters", None)


@contextmanager
def undone_on_error(model: nn.Module, name: str) -> Iterator[None]:
    """Take a half-attached adapter off again, and put the one that was in force back."""
    requires_grad = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    in_force = {layer: layer.in_force for layer in adapter_layers(model).values()}
    try:
        yield
    except BaseException:
        owners(model).pop(name, None)
        for layer in adapter_layers(model).values():
            layer.in_force = in_force.get(layer)
            if name in layer.slots:
                del layer.slots[name]
        unwrap(model, only_empty=True)
        for parameter in model.parameters():
            parameter.requires_grad_(requires_grad.get(id(parameter), parameter.requires_grad))
        raise


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Stored tensors by layer, then by their name under it; the slot's own part never holds a dot before `lora_A`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(COMMON):
            place, name = split_key(key)
            parts.setdefault(place, {})[name] = tensor
    return parts


def split_key(key: str) -> tuple[str, str]:
    """`base_model.model.LAYER.NAME` → (LAYER, NAME); NAME is `lora_A.weight` for peft's own pairs."""
    rest = key.removeprefix(PREFIX)
    place, _, name = rest.rpartition(".")
    if name == "weight" and place.rpartition(".")[2] in ("lora_A", "lora_B"):
        place, _, pair = place.rpartition(".")
        name = f"{pair}.{name}"
    return place, name


def misfit(directory: Path, model: nn.Module, reason: str) -> CorruptArtifact:
    """The error for a stored adapter that was made for another model."""
    return CorruptArtifact(
        f"The tensors of {directory} do not fit {type(model).__name__}: {reason}.", "Was it trained on this base?"
    )


# -- folding in --------------------------------------------------------------------------------------------------------


def matrix(layer: Any) -> Tensor:
    """A layer's weight, outputs first (W [m, n] of a linear one), detached; of `Conv1D`, a transposed view.

    In float32, or float64 where it is stored so.
    """
    weight: Tensor = layer.weight.detach()
    weight = weight.T if isinstance(layer, Conv1D) else weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def fold(model: nn.Module, place: str, adapter: str) -> None:
    """Add an adapter's update to the weight and bias of one wrapped layer, in float32, rounded once."""
    wrapper: Any = model.get_submodule(place)
    layer, slot = wrapper.base_layer, wrapper.slots[adapter]
    bias = getattr(layer, "bias", None)  # embeddings have none
    weight, bias = matrix(layer), None if bias is None else bias.detach().float()
    with torch.no_grad():
        merged, shift = weight + slot.update(weight), slot.shift(weight, bias)
        if not torch.isfinite(merged).all():
            raise NotMergeable(f"The merged weight of {place} would not be finite.", "Was it trained to NaN?")
        own_weight(model, layer)
        layer.weight.copy_(merged.T if isinstance(layer, Conv1D) else merged)
        if shift is not None and bias is not None:
            layer.bias.copy_(bias + shift)
        elif shift is not None:
            layer.bias = nn.Parameter(shift.to(layer.weight.dtype))
