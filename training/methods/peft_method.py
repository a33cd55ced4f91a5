"""Methods that peft implements, behind the contract: peft's layers, peft's files, peft's switching."""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from infra.errors import Conflict, CorruptArtifact, InvalidInput, NotMergeable, RegraftError
from training.methods.contract import (
    OTHER_BASE,
    Adapted,
    AttachContext,
    Config,
    Method,
    check_fit,
    owners,
    stored_config,
    stored_tensors,
)
from training.methods.foreign_config import RESTORE, ForeignConfig

# What peft raises over a strange adapter_config.json, of which it checks little.
TRIPS = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ImportError)


class PeftAdapted(Adapted):
    """One named adapter on a `peft.PeftModel`; those on the same base share the wrapper `model`."""

    model: PeftModel

    def __init__(self, model: PeftModel, name: str) -> None:
        self.model = model
        self.name = name

    @property
    def peft_config(self) -> PeftConfig:
        """peft's own configuration of this adapter."""
        return self.model.peft_config[self.name]

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors as `PeftModel.save_pretrained` names them."""
        # A base that is split over processes stays out of it: peft would have it gathered.
        own = {name: tensor for name, tensor in self.model.state_dict().items() if not isinstance(tensor, DTensor)}
        # Without save_embedding_layers=False peft asks the hub whether the vocabulary has grown.
        state = get_peft_model_state_dict(self.model, own, adapter_name=self.name, save_embedding_layers=False)
        return {name: tensor.detach() for name, tensor in state.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` in place of the adapter's own."""
        check_fit(self.name, self.tensors(), tensors)
        set_peft_model_state_dict(self.model, dict(tensors), adapter_name=self.name)

    def adapter_config(self) -> dict[str, Any]:
        """adapter_config.json as `PeftModel.save_pretrained` writes it, with sets in order."""
        content = self.peft_config.to_dict() | {"inference_mode": True}
        if self.peft_config.task_type is None:
            base = type(self.model.get_base_model())
            content["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}

    def activate(self) -> None:
        """Put this adapter in force; gradient reaches it and none of the others."""
        self.model.set_adapter(self.name)

    def disabled(self) -> AbstractContextManager[None]:
        """Within it, every adapter of the model is switched off."""
        context: AbstractContextManager[None] = self.model.disable_adapter()
        return context

    def merge(self) -> nn.Module:
        """A copy of the base with this adapter folded in by peft; needs memory for one more base model.

        Raises:
            NotMergeable: the merged weights would not be finite.
        """
        merged: PeftModel = copy.deepcopy(self.model)
        for layer in merged.modules():
            if isinstance(layer, BaseTunerLayer):
                own_weight(merged, layer.get_base_layer())
        try:
            base: nn.Module = merged.merge_and_unload(safe_merge=True, adapter_names=[self.name])
        except ValueError as error:
            raise NotMergeable(f"Adapter '{self.name}' cannot be merged: {error}.", "Was it trained to NaN?") from error
        return base


class PeftMethod(Method[Config]):
    """A method of peft: what is left to say is its peft configuration and its formula."""

    adapted_type: ClassVar[type[PeftAdapted]] = PeftAdapted

    @abstractmethod
    def peft_config(self, model: nn.Module, config: Config) -> PeftConfig:
        """peft's configuration for `config` on the bare `model`.

        Raises:
            InvalidInput: the model has nothing that the method can adapt.
        """

    def configure(self, model: nn.Module, config: Config, context: AttachContext) -> PeftConfig:
        """`peft_config`, for the methods whose configuration also holds something of the context."""
        del context
        return self.peft_config(model, config)

    @abstractmethod
    def is_active(self, adapted: PeftAdapted) -> bool:
        """Whether what peft put in place is this very method, judged by the modules that now are there."""

    def initialise(self, adapted: PeftAdapted, config: Config, context: AttachContext) -> None:
        """Give the fresh adapter another start than peft does, where the paper has one."""
        del adapted, config, context

    def prepare(self, model: PeftModel) -> None:
        """Adjust the wrapper, once per base model, before its first adapter is used."""
        del model

    def readable(self, adapter_config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The stored configuration as peft must be given it to take `tensors`.

        Raises:
            InvalidInput: it asks peft for something that would change the base.
        """
        del tensors
        return adapter_config

    def completed(self, adapted: PeftAdapted, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The stored `tensors` with what peft's own files lack beside Regraft's."""
        del adapted
        return tensors

    def attach(self, model: nn.Module, config: Config, context: AttachContext, name: str = "default") -> PeftAdapted:
        """Put a fresh adapter on `model`, drawn from `context.seed`; the global random state stays as it was."""
        base = bare(model)
        with _undone_on_error(model, name), seeded(context.seed, model):
            peft_config = self.configure(base, config, context)
            try:
                adapted = self._put(model, peft_config, name)
            except (ValueError, AttributeError) as error:  # peft knows nothing of such an architecture
                raise InvalidInput(
                    f"peft cannot put '{self.name}' on {type(base).__name__}: {error}",
                    "Try another method, or targets.",
                ) from error
            self.initialise(adapted, config, context)
            self._verify(adapted, self.count(base, config))
        return adapted

    def load(self, model: nn.Module, directory: Path, name: str = "default") -> PeftAdapted:
        """Put the adapter stored in `directory`, by Regraft or by peft, on `model`."""
        content, tensors = stored_config(directory), stored_tensors(directory)
        if not self.recognises(content):
            raise CorruptArtifact(f"{directory} holds {content.get('peft_type')}, not '{self.name}'.")
        ForeignConfig.read(content)
        content = self.readable(content, tensors) | {"inference_mode": False}
        try:
            peft_config = PeftConfig.from_peft_type(**content)
        except TRIPS as error:
            raise CorruptArtifact(f"peft cannot read its adapter_config.json: {error}", RESTORE) from error
        with _undone_on_error(model, name), seeded(0, model):
            try:
                adapted = self._put(model, peft_config, name)
            except TRIPS as error:  # peft finds none of the layers, or what the config says makes no sense
                base = type(bare(model)).__name__
                raise CorruptArtifact(
                    f"peft cannot put it on {base} as its adapter_config.json says: {error}", OTHER_BASE
                ) from error
            adapted.restore(self.completed(adapted, tensors))
            if not self.is_active(adapted):
                raise CorruptArtifact(f"{directory} does not make a '{self.name}' adapter on {type(model).__name__}.")
        return adapted

    def _put(self, model: nn.Module, peft_config: PeftConfig, name: str) -> PeftAdapted:
        base = bare(model)
        if isinstance(model, PeftModel):
            if model.peft_type != peft_config.peft_type:
                raise InvalidInput(
                    f"The model carries {model.peft_type.value} adapters; '{self.name}' cannot join them.",
                    "Load the base anew.",
                )
            if name in model.peft_config:
                raise Conflict(f"The model carries an adapter called '{name}' already.", "Choose another name.")
        elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise InvalidInput("The model carries adapters already.", "Attach to the `model` of the first `Adapted`.")
        elif owners(base):
            others = ", ".join(sorted(set(owners(base).values())))
            raise InvalidInput(
                f"The model carries {others} adapters; '{self.name}' cannot join them.",
                "Merge them, or load the base anew.",
            )
        _check_name(base, name, PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_config.peft_type) or "")
        training = base.training
        if isinstance(model, PeftModel):
            model.add_adapter(name, peft_config)
        else:
            model = get_peft_model(base, peft_config, adapter_name=name)
            self.prepare(model)
        model.train(training)  # peft makes its modules in training mode, dropout and all
        adapted = self.adapted_type(model, name)
        adapted.activate()
        return adapted

    def _verify(self, adapted: PeftAdapted, expected: int) -> None:
        found = sum(parameter.numel() for parameter in adapted.trainable().values())
        if not self.is_active(adapted) or found != expected:
            base = type(adapted.model.get_base_model()).__name__
            raise RegraftError(
                f"'{self.name}' did not take on {base}: {found:,} trainable parameters, {expected:,} expected.",
                "peft and Regraft disagree about this architecture; please report it.",
            )


def bare(model: nn.Module) -> nn.Module:
    """The base model inside peft's wrapper; any other model as it is."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def adapter_layers(adapted: PeftAdapted, attribute: str) -> list[BaseTunerLayer]:
    """The peft layers on which the adapter has an entry in the dictionary `attribute` ("lora_A", "ia3_l")."""
    layers = [module for module in adapted.model.modules() if isinstance(module, BaseTunerLayer)]
    return [layer for layer in layers if adapted.name in getattr(layer, attribute, {})]


@contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Within it the global generators, which peft draws from, stand at `seed`; after it, where they were."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _undone_on_error(model: nn.Module, name: str) -> Iterator[None]:
    """Take a half-attached adapter off again, and put the one that was active back in force."""
    known = set(model.peft_config) if isinstance(model, PeftModel) else set()
    active = model.active_adapter if isinstance(model, PeftModel) else None
    is_bare = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    requires_grad = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        if isinstance(model, PeftModel):
            if name in model.peft_config and name not in known:
                model.delete_adapter(name)
            model.set_adapter(active)
        elif is_bare:
            _unwrap(model)
        for parameter in model.parameters():
            parameter.requires_grad_(requires_grad.get(id(parameter), parameter.requires_grad))
        raise


def _unwrap(model: nn.Module) -> None:
    """Put the base layers back in the place of peft's."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    vars(model).pop("peft_config", None)


def _check_name(base: nn.Module, name: str, prefix: str) -> None:
    """peft finds an adapter's tensors by its name between dots, so the name must not occur in the model's own."""
    parts = {part for key, _ in base.named_parameters() for part in key.split(".")}
    if not name or "." in name or name in parts or name in prefix or hasattr(nn.ModuleDict(), name):
        raise InvalidInput(
            f"'{name}' cannot name an adapter on {type(base).__name__}: it is empty, holds a dot, or is a word that "
            "the model uses itself.",
            "Choose another name.",
        )


def own_weight(model: nn.Module, layer: Any) -> None:
    """Untie a layer's weight from whatever shares it, so that folding into one does not change the other."""
    weight = layer.weight
    sharers = [module for module in model.modules() if getattr(module, "_parameters", {}).get("weight") is weight]
    if len(sharers) > 1:
        layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
