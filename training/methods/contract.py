"""The method contract: what every adapter method of the catalogue is, whatever its paper, modality or backbone.

A *method* attaches something trainable to a frozen model. What comes back, `Adapted`, is called like the model itself,
knows its own tensors, and can be stored, restored, switched off and, where the mathematics allows it, merged.
Nothing here says "token" or "causal": what is optimised is an `Objective`, a separate thing.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from infra.documents import Section
from infra.errors import CorruptArtifact, NotMergeable
from training.compression.steps import decompress
from training.compression.stored import is_compressed, plain_config

Batch = Mapping[str, Tensor]
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
OTHER_BASE = "Was it trained on this base? If it was, copy it again from where it was made."
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class Starts(Protocol):
    """Keeps tensors that an initialisation has computed."""

    def get(self, what: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors kept for `what`, a JSON-like description of all that decides them; made if there are none."""


class MethodConfig(Section):
    """Hyper-parameters of a method, with the paper's defaults. Unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(allow_inf_nan=False)


Config = TypeVar("Config", bound=MethodConfig)


@dataclass(frozen=True, slots=True)
class MethodCard:
    """What the catalogue says of a method.

    Args:
        title: one line, what it does.
        family: class and sub-class of the PEFT survey (arXiv 2403.14608), e.g. "reparameterised / low rank".
        paper: title and arXiv number or venue.
        parameters: the number of trainable parameters as a formula.
        backbones: model types on which it is contract-tested ("llama", "gpt2", "bert", "t5", "vit", …).
        modality: what the backbones read.
        merge: whether the adapter folds into the base weights, and how exactly.
        adds_biases: merging gives layers without a bias one, so that the merged model has more tensors than the base.
        identity_at_init: a fresh adapter leaves the model's outputs as they are; "nearly" where its start is drawn
            close to that.
        needs_calibration: `AttachContext.calibration` must be given; "optional" where only some options read it.
        count_is_bound: `Method.count` is the most that can come out; calibration data decide how many it is.
        changes_base: trains the base's own parameters instead of adding some.
        packing: trains on several examples in a row, told apart by their position ids.
        checkpointing: trains under activation (gradient) checkpointing.
        sharding: trains on a base whose weights are split over several processes.
        processes: trains on several data-parallel processes.
        early_stopping: every validation judges what would be stored; not where a phase of training is thrown away.
    """

    title: str
    family: str
    paper: str
    parameters: str
    backbones: tuple[str, ...]
    modality: tuple[str, ...] = ("language",)
    merge: Literal["exact", "approximate", "no"] = "exact"
    adds_biases: bool = False
    identity_at_init: bool | Literal["nearly"] = True
    needs_calibration: bool | Literal["optional"] = False
    count_is_bound: bool = False
    changes_base: bool = False
    packing: bool = True
    checkpointing: bool = True
    sharding: bool = True
    processes: bool = True
    early_stopping: bool = True

    @property
    def refuses(self) -> list[str]:
        """The options under a recipe's `training` that do not go with the method."""
        options = {
            "packing": self.packing,
            "gradient_checkpointing": self.checkpointing,
            "shard_base": self.sharding,
            "processes": self.processes,
            "early_stopping": self.early_stopping,
        }
        return [option for option, allowed in options.items() if not allowed]


@dataclass(frozen=True)
class AttachContext:
    """What some methods need beside the model.

    Args:
        seed: of everything random in the attachment.
        processor: tokenizer or image processor of the base, where there is one.
        calibration: draws calibration batches, lazily; None where none can be had.
        tasks: names of the tasks trained together (routing methods).
        total_steps: optimiser steps of the training to come (schedules inside a method).
        starts: keeps what an initialisation has computed, for this base model and these calibration data.
        progress: hears (stage, done, total) of a long initialisation.
    """

    seed: int = 0
    processor: Any = None
    calibration: Callable[[], Iterable[Batch]] | None = None
    tasks: tuple[str, ...] = ()
    total_steps: int | None = None
    starts: Starts | None = None
    progress: Callable[[str, int, int], None] | None = None

    def tell(self, stage: str, done: int, total: int) -> None:
        """Tell whoever listens how far a long initialisation is."""
        if self.progress:
            self.progress(stage, done, total)

    def start(self, what: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that take long to compute: what `make` gives, or what it gave for the same `what` before."""
        return make() if self.starts is None else self.starts.get({"seed": self.seed, **what}, make)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator at this context's seed."""
        return torch.Generator(device).manual_seed(self.seed)


class Adapted(ABC):
    """A model with an adapter on it.

    Attributes:
        model: called exactly like the base model, and answers in its shapes (a prompt's own positions are cut off);
            training mode, device and dtype are set on it as on any module.
        name: which adapter of the model this is; several may sit on one model, one is in force at a time.
    """

    model: nn.Module
    name: str

    def trainable(self) -> dict[str, nn.Parameter]:
        """What gradient reaches, by name in `model`; nothing else may change in training."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Exactly what is stored, detached, under the names of the PEFT layout (no adapter name in the keys)."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Exact inverse of `tensors()`, in place.

        Raises:
            CorruptArtifact: a tensor is missing, unknown or of another shape; nothing was changed.
        """

    @abstractmethod
    def adapter_config(self) -> dict[str, Any]:
        """The content of adapter_config.json; whatever `Method.load` needs beside the tensors."""

    @abstractmethod
    def activate(self) -> None:
        """Put this adapter in force among those on the same model."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Within it, `model` computes what the bare base computes."""

    def merge(self) -> nn.Module:
        """A plain model of the base's class with the adapter folded in; this one is left as it was.

        Raises:
            NotMergeable: the method's update is no change of weights.
        """
        raise NotMergeable(
            f"Adapter '{self.name}' cannot be merged: its update is not a change of the base's weights.",
            "Use it as it is: export it without --merged.",
        )

    def save(self, directory: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors (the PEFT layout) into `directory`."""
        write_stored(directory, self.adapter_config(), self.tensors())

    # What only some papers ask for. The trainer honours each.

    def checkpoint(self) -> dict[str, Tensor]:
        """What a stopped training goes on from, beside the optimiser's state; `tensors()`, unless it takes more."""
        return self.tensors()

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Exact inverse of `checkpoint()`, on an adapter freshly attached with the same options."""
        self.restore(tensors)

    def callbacks(self) -> list[TrainerCallback]:
        """Trainer callbacks: layers that wake and sleep, indices that are dropped and regrown."""
        return []

    def extra_loss(self, outputs: Any, batch: Batch) -> Tensor | None:
        """A regulariser to add to the objective (orthogonality, load balance)."""
        del outputs, batch
        return None

    def transform_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prepare a batch (prompt methods, task ids for routing)."""
        return batch

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer | None:
        """The method's own optimiser, or None for AdamW on `trainable()`."""
        del learning_rate, weight_decay
        return None


class Method(ABC, Generic[Config]):
    """One entry of the catalogue."""

    name: str
    card: MethodCard
    config_type: type[Config]
    peft_type: str  # what adapter_config.json calls it: peft's own word where peft has one

    @abstractmethod
    def attach(self, model: nn.Module, config: Config, context: AttachContext, name: str = "default") -> Adapted:
        """Put a fresh adapter on `model` and activate it.

        Args:
            model: a bare model, or the `Adapted.model` of others of the same method under other names.
            config: the hyper-parameters.
            context: seed, tokenizer and whatever else some papers need.
            name: of the adapter on this model.

        Raises:
            InvalidInput: the model has nothing that the method can adapt, or carries another method's adapter.
            Conflict: the name is taken.
        """

    @abstractmethod
    def load(self, model: nn.Module, directory: Path, name: str = "default") -> Adapted:
        """Put the adapter stored in `directory` on `model` and activate it: exact inverse of `Adapted.save`.

        Raises:
            CorruptArtifact: the directory does not hold what the method stores, or does not fit the model, which is
                then left as it was.
        """

    def recognises(self, adapter_config: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json is of this method; asked where no regraft.json lies beside it."""
        return adapter_config.get("peft_type") == self.peft_type

    @abstractmethod
    def count(self, model: nn.Module, config: Config) -> int:
        """The paper's formula for the number of trainable parameters on a bare `model`.

        Derived from the model's shapes, not from an attached adapter, so that each can be checked against the other;
        an upper bound where the card says so.
        """


def origin(model: nn.Module) -> dict[str, Any]:
    """What adapter_config.json says of the base `model`, as peft writes it for a model without a task type."""
    return {
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
    }


def owners(model: nn.Module) -> dict[str, str]:
    """Adapter → method, of the adapters that sit on `model`; those of peft's own are told by its wrapper."""
    found: dict[str, str] = vars(model).setdefault("_regraft_adapters", {})
    return found


def write_stored(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors (the PEFT layout) into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        shared = any(own.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in held.values())
        held[name] = own.clone() if shared else own  # a safetensors file has no second name for a tensor
    save_file(held, directory / TENSORS_FILE, metadata={"format": "pt"})
    content = json.dumps(config, indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(content + "\n", encoding="utf-8")


def stored_config(directory: Path) -> dict[str, Any]:
    """The content of `directory`'s adapter_config.json; of a compressed adapter, what it was before.

    Raises:
        CorruptArtifact: it is missing or not a JSON object.
    """
    content = written_config(directory)
    return plain_config(content) if is_compressed(content) else content


def written_config(directory: Path) -> dict[str, Any]:
    """The content of `directory`'s adapter_config.json as it stands there; raises what `stored_config` does."""
    path = directory / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptArtifact(f"{directory} holds no {CONFIG_FILE}.", "Is it an adapter directory?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptArtifact(f"{path} is not JSON ({error}).", "Restore the file from where it was copied.") from None
    if not isinstance(content, dict):
        raise CorruptArtifact(f"{path} holds {type(content).__name__}, not a JSON object.")
    return content


def stored_tensors(directory: Path, origins: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors, on the CPU; those of a compressed adapter decoded. Pickle files are never opened.

    Args:
        directory: of the adapter.
        origins: the base's own tensors, by the adapter's names, where a compressed adapter is their change.

    Raises:
        CorruptArtifact: the file is missing or damaged, or a pickle is offered instead.
    """
    written = written_tensors(directory)
    if not is_compressed(written_config(directory)):
        return written
    del written
    return decompress((directory / TENSORS_FILE).read_bytes(), origins)


def written_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of `directory`'s adapter_model.safetensors as they stand there.

    Raises:
        CorruptArtifact: the file is missing, a pickle is offered instead, or header and size do not agree.
    """
    path = directory / TENSORS_FILE
    if not path.is_file():
        pickles = sorted(file.name for file in directory.glob("adapter_model.*") if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise CorruptArtifact(
                f"{directory / pickles[0]} is a pickle, which can run code when it is opened; it was not.",
                "regraft import converts an old adapter_model.bin without running it; peft writes safetensors today.",
            )
        raise CorruptArtifact(f"{directory} holds no {TENSORS_FILE}.", "Is it an adapter directory?")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptArtifact(
            f"{path} is not a whole safetensors file ({error}).", "Restore it from where it was copied."
        ) from None
    return tensors


def check_fit(name: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise `CorruptArtifact` unless `given` has the names and shapes of `expected`, and floats where those are."""
    problems = [
        *(f"{key} is missing" for key in expected.keys() - given.keys()),
        *(f"{key} is unknown" for key in given.keys() - expected.keys()),
        *(
            f"{key} is {tuple(given[key].shape)}, not {tuple(expected[key].shape)}"
            for key in expected.keys() & given.keys()
            if given[key].shape != expected[key].shape
        ),
        *(
            f"{key} is of {given[key].dtype}, not {expected[key].dtype}"
            for key in expected.keys() & given.keys()
            if given[key].is_floating_point() != expected[key].is_floating_point()
        ),
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CorruptArtifact(f"The tensors do not fit adapter '{name}': {shown}.", OTHER_BASE)
