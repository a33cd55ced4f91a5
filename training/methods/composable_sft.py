"""LT-SFT: sparse differences that can be added together (Ansell et al., ACL 2022, arXiv 2110.07560).

    θ = θ₀ + φ,    φ has K entries that are not zero;    several: θ = θ₀ + φ_language + φ_task

One training has two phases. In the *full phase*, the first `full_share` of the updates, every entry of φ trains, to θ₁.
Then μ, the K entries of largest |θ₁ − θ₀| among all tensors together, is the mask; everything goes back to θ₀; the
optimiser forgets; the learning rate begins anew. In the *sparse phase* θ = θ₀ + μ ⊙ φ trains. Each phase runs through
the whole learning-rate schedule, warm-up and all, pressed into its steps.

What trains is φ, float32, beside the frozen base: θ is made in the layer, so that other adapters on the same base see
θ₀, and what is stored is φ bit for bit. Gradients are those of θ, and masked before anything reads them. Weight decay
is on φ and pulls to θ₀ (the paper's is 0), so that what is outside μ stays zero under it. Memory is that of full
fine-tuning: φ, its gradient and moments are dense, and only a loaded adapter is sparse. Time is not: in the sparse
phase (and of a loaded adapter) a linear layer takes the gradient of its entries alone (kernels/sparse_delta.py), and
puts it among zeros: a 2048 → 2048 layer on 512 tokens takes 120 ms, 165 ms with ∂L/∂θ, 102 ms bare (one CPU thread).

Every layer's weight and bias have a φ but for normalisations, which stay frozen, as in the paper, and for the output
embeddings, which stay frozen at θ₀ and are so untied from the input's, as in the paper's masked language modelling.
A task's head (what lies outside the backbone) trains whole, is stored whole, and belongs to no sum. Parameters that a
module with modules of its own holds itself (a ViT's class token) are left frozen.

`l1` adds λ/N · Σ|θ − θ₀| over what trains, N the number of all of the base's parameters; the paper's λ is 0.1 for
languages, 0 for tasks. Its K: 7,667,712 for languages (4.3 % of mBERT) and 14,155,776 for tasks (8 %); its library's
default is a share of 0.01. Phases are 3 + 10 epochs (tagging, parsing), 5 + 5 (MNLI) or 2 + 2 (SQuAD).

Where the authors' code differs: it masks gradients alone, so that decay would move the rest; takes more than K entries
where some are equal, and all where fewer than K have moved; drops values up to 1e-7; and adds φ to the weights in
place. Its further iterations of the mask, and batches of several languages, are not here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from infra.errors import InvalidInput
from kernels.sparse_delta import sparse_linear
from kernels.sparse_plan import SparsePlan, planned
from training.methods.contract import AttachContext, Batch, MethodCard, MethodConfig, check_fit
from training.methods.injected import (
    PREFIX,
    AdapterLayer,
    InjectedAdapted,
    InjectedMethod,
    Slot,
    base_of,
    base_size,
    by_layer,
    check_room,
    undone_on_error,
)
from training.methods.remembered import Remembered
from training.methods.sparse_delta import SparseDelta, check_indices, index_type, largest, scattered, summed
from training.methods.targets import output_embeddings

Place = tuple[str, str]  # a layer, and "weight" or "bias"


class ComposableSftConfig(MethodConfig):
    """Hyper-parameters of LT-SFT."""

    density: float = Field(0.01, ge=0, le=1, description="K as a share of the entries that may change.")
    entries: int | None = Field(None, ge=0, description="K itself; goes before `density`.")
    full_share: float = Field(0.5, gt=0, lt=1, description="Share of the steps that the full phase takes.")
    l1: float = Field(0.0, ge=0, description="λ of the penalty on |θ − θ₀|.")


# -- a layer -----------------------------------------------------------------------------------------------------------


class DifferenceSlot(Slot, ABC):
    """One layer with another weight and bias.

    Args:
        layer: the base layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.names = list(_parameters(layer))
        self.transposed = isinstance(layer, Conv1D)

    def changed(self, name: str, original: Tensor) -> Tensor:
        """θ of "weight" or "bias" for θ₀, in its shape and dtype."""
        return (original.detach().float() + self.difference(name, original)).to(original.dtype)

    @abstractmethod
    def difference(self, name: str, original: Tensor) -> Tensor:
        """φ of "weight" or "bias" in the shape of θ₀, float32."""

    def entries(self, weight: Tensor) -> tuple[Tensor, SparsePlan] | None:
        """Of φ of a linear layer's weight, as the layer holds it: values and places, if it is sparse."""
        del weight
        return None

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """What the base layer computes with θ in the place of θ₀; where φ is sparse, without ∂L/∂θ."""
        layer: Any = base
        sparse = self.entries(layer.weight) if isinstance(base, nn.Linear | Conv1D) else None
        if sparse is not None:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            bias = None if layer.bias is None else self.changed("bias", layer.bias)
            values, plan = sparse
            return sparse_linear(x, values, layer.weight, plan, bias, self.transposed)
        changed = {name: self.changed(name, getattr(base, name)) for name in self.names}
        output: Tensor = functional_call(base, changed, (x,))
        return output

    def update(self, weight: Tensor) -> Tensor:
        """φ of the weight."""
        if self.transposed:
            return self.difference("weight", weight.T).detach().T
        return self.difference("weight", weight).detach()

    def shift(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """φ of the bias."""
        del weight
        return None if bias is None else self.difference("bias", bias).detach()


class HeadSlot(DifferenceSlot):
    """A layer of a task's head, trained and stored whole, float32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.reset(layer)

    def reset(self, layer: nn.Module) -> None:
        """Back to θ₀."""
        for name, original in _parameters(layer).items():
            if hasattr(self, name):
                cast(Tensor, getattr(self, name)).data.copy_(original)
            else:
                setattr(self, name, nn.Parameter(original.detach().float().clone()))

    def changed(self, name: str, original: Tensor) -> Tensor:
        """Its own."""
        return cast(Tensor, getattr(self, name)).to(original.dtype)

    def difference(self, name: str, original: Tensor) -> Tensor:
        """θ − θ₀."""
        return cast(Tensor, getattr(self, name)) - original.detach().float()


class DenseSlot(DifferenceSlot):
    """φ of one layer while it trains; of one mask for each name, once they are set."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        for name, original in _parameters(layer).items():
            setattr(self, name, nn.Parameter(torch.zeros_like(original, dtype=torch.float32)))
            self.register_buffer(f"{name}_mask", None, persistent=False)
        self.plan = Remembered(_entries_of)

    def mask(self, name: str) -> Tensor | None:
        """μ of "weight" or "bias", none in the full phase."""
        return cast(Tensor | None, getattr(self, f"{name}_mask"))

    def entries(self, weight: Tensor) -> tuple[Tensor, SparsePlan] | None:
        """In the sparse phase."""
        mask = self.mask("weight")
        if mask is None:
            return None
        plan = self.plan.of(mask)
        return cast(Tensor, self.weight).view(-1).index_select(0, plan.places), plan

    def difference(self, name: str, original: Tensor) -> Tensor:
        """φ, or μ ⊙ φ."""
        change, mask = cast(Tensor, getattr(self, name)), self.mask(name)
        return change if mask is None else change * mask

    def sparse(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Indices and values of φ under `masks`."""
        found = {}
        for name in self.names:
            indices = masks[name].view(-1).nonzero()[:, 0]
            found[f"{name}_indices"] = indices.to(index_type(masks[name].numel()))
            found[f"{name}_values"] = cast(Tensor, getattr(self, name)).detach().view(-1)[indices]
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """φ from indices and values, which are the mask from then on."""
        for name in self.names:
            change = cast(Tensor, getattr(self, name)).data
            indices, values = (tensors[f"{name}_{kind}"].to(change.device) for kind in ("indices", "values"))
            change.copy_(scattered(indices, values, change))
            setattr(self, f"{name}_mask", scattered(indices, torch.ones_like(values), change).bool())


class SparseSlot(DifferenceSlot):
    """φ of one layer as it is stored.

    Args:
        layer: the base layer.
        tensors: "weight_indices", "weight_values", and the same of the bias where there is one.

    Raises:
        CorruptArtifact: they are no sparse change of the layer.
    """

    def __init__(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(layer)
        for name, original in _parameters(layer).items():
            indices, values = tensors[f"{name}_indices"], tensors[f"{name}_values"]
            check_indices(indices, values, original.numel())
            setattr(self, name, SparseDelta(indices, values))

    def entries(self, weight: Tensor) -> tuple[Tensor, SparsePlan] | None:
        """All of them."""
        delta = cast(SparseDelta, self.weight)
        return delta.values, delta.plan((weight.shape[0], weight.shape[1]))

    def changed(self, name: str, original: Tensor) -> Tensor:
        """θ."""
        return cast(SparseDelta, getattr(self, name)).added(original)

    def difference(self, name: str, original: Tensor) -> Tensor:
        """φ."""
        return cast(SparseDelta, getattr(self, name)).dense(original)

    def stored(self) -> dict[str, Tensor]:
        """Indices and values."""
        return {
            f"{name}_{kind}": getattr(getattr(self, name), kind)
            for name in self.names
            for kind in ("indices", "values")
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Of as many entries as before."""
        with torch.no_grad():
            for key, tensor in self.stored().items():
                tensor.copy_(tensors[key])


# -- a model -----------------------------------------------------------------------------------------------------------


class ComposableSftAdapted(InjectedAdapted):
    """One φ of a model; `total_steps` is known while it trains for the first time."""

    total_steps: int | None = None

    def slots(self) -> dict[str, Any]:
        """Each slot once: layers that share their weights share it."""
        found: dict[str, Any] = {}
        seen: set[int] = set()
        for place, slot in super().slots().items():
            if id(slot) not in seen:
                seen.add(id(slot))
                found[place] = slot
        return found

    @property
    def dense(self) -> dict[str, DenseSlot]:
        """The slots whose φ is dense: all but heads, where it was attached, none where it was loaded."""
        return {place: slot for place, slot in self.slots().items() if isinstance(slot, DenseSlot)}

    @property
    def masked(self) -> bool:
        """Whether the full phase is over."""
        return all(slot.mask(name) is not None for slot in self.dense.values() for name in slot.names)

    def masks(self) -> dict[str, dict[str, Tensor]]:
        """μ by layer and name: as it was set, or, in the full phase, as it would be."""
        changes: dict[Place, Tensor] = {
            (place, name): getattr(slot, name) for place, slot in self.dense.items() for name in slot.names
        }
        if self.masked:
            chosen = {(place, name): cast(Tensor, self.dense[place].mask(name)) for place, name in changes}
        else:
            chosen = largest(changes, _entries(self.config, sum(change.numel() for change in changes.values())))
        found: dict[str, dict[str, Tensor]] = {}
        for (place, name), mask in chosen.items():
            found.setdefault(place, {})[name] = mask
        return found

    def tensors(self) -> dict[str, Tensor]:
        """K indices and values by layer, and the head; in the full phase, of the K largest as they are now."""
        masks = self.masks()
        return {
            f"{PREFIX}{place}.{name}": tensor.detach()
            for place, slot in self.slots().items()
            for name, tensor in (slot.sparse(masks[place]) if place in masks else slot.stored()).items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` in place of φ and, where it is dense, of its mask."""
        own = self.tensors()
        if self.dense:  # the numbers of entries may be others
            sparse = {key for key in own.keys() & tensors.keys() if key.endswith(("_indices", "_values"))}
            own |= {key: tensors[key] for key in sparse if tensors[key].ndim == 1}
        check_fit(self.name, own, tensors)
        parts, slots = by_layer(tensors), self.slots()
        for place, slot in self.dense.items():
            for name in slot.names:
                part = parts[place]
                check_indices(part[f"{name}_indices"], part[f"{name}_values"], getattr(slot, name).numel())
        for place, slot in slots.items():
            slot.restore(parts[place])

    def checkpoint(self) -> dict[str, Tensor]:
        """All of φ in the full phase, `tensors()` after it."""
        if self.masked:
            return self.tensors()
        return {
            f"{PREFIX}{place}.{name}": getattr(slot, name).detach()
            for place, slot in self.slots().items()
            for name in slot.names
        }

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `checkpoint`."""
        if any(key.endswith("_indices") for key in tensors):
            self.restore(tensors)
            return
        check_fit(self.name, self.checkpoint(), tensors)
        for key, own in self.checkpoint().items():
            own.copy_(tensors[key])

    def rewind(self) -> None:
        """End the full phase: μ is set, and φ and the head are again what they were at the start."""
        masks = self.masks()
        for place, slot in self.slots().items():
            if isinstance(slot, HeadSlot):
                slot.reset(base_of(self.model.get_submodule(place)))
            for name, mask in masks.get(place, {}).items():
                getattr(slot, name).data.zero_()
                setattr(slot, f"{name}_mask", mask)

    def extra_loss(self, outputs: Any, batch: Batch) -> Tensor | None:
        """λ/N · Σ|θ − θ₀|."""
        del outputs, batch
        if not self.config.l1:
            return None
        sums = [
            slot.difference(name, getattr(base_of(self.model.get_submodule(place)), name)).abs().sum()
            for place, slot in self.slots().items()
            for name in slot.names
        ]
        penalty: Tensor = torch.stack(sums).sum() * (self.config.l1 / base_size(self.model))
        return penalty

    def callbacks(self) -> list[TrainerCallback]:
        """What changes the phase, in the first training."""
        return [] if self.total_steps is None else [_TwoPhases(self, self.total_steps)]


class _TwoPhases(TrainerCallback):
    """Ends the full phase of a training, with a fresh optimiser and a fresh schedule for the sparse one."""

    def __init__(self, adapted: ComposableSftAdapted, total: int) -> None:
        self.adapted, self.total = adapted, total
        self.full = min(max(round(adapted.config.full_share * total), 1), total - 1)  # its updates

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Let either phase run through the whole schedule."""
        del args, state, control
        schedule = others["lr_scheduler"]
        if isinstance(schedule, LambdaLR):  # all of transformers' schedules that are set before a training are
            schedule.lr_lambdas = [self._in_phases(factor) for factor in schedule.lr_lambdas]

    def _in_phases(self, factor: Callable[[int], float]) -> Callable[[int], float]:
        def in_phases(step: int) -> float:
            start, end = (0, self.full) if step < self.full else (self.full, self.total)
            return factor((step - start) * self.total / (end - start))  # type: ignore[arg-type]

        return in_phases

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """After the last update of the full phase."""
        del args, control
        if state.global_step == self.full:
            self.adapted.rewind()
            others["optimizer"].state.clear()


class ComposableSft(InjectedMethod[ComposableSftConfig]):
    """LT-SFT."""

    name = "composable-sft"
    peft_type = "REGRAFT_COMPOSABLE_SFT"
    config_type = ComposableSftConfig
    adapted_type = ComposableSftAdapted
    card = MethodCard(
        title="The few weights that full fine-tuning moved most; such differences add up",
        family="selective / unstructured, two-phase mask",
        paper="Composable Sparse Fine-Tuning for Cross-Lingual Transfer, arXiv 2110.07560",
        parameters="|θ| but for normalisations and output embeddings; K of them stored",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        sharding=False,
        early_stopping=False,  # what the full phase comes to is thrown away
    )

    def attach(
        self, model: nn.Module, config: ComposableSftConfig, context: AttachContext, name: str = "default"
    ) -> Any:
        """Put φ = 0 on every layer.

        Raises:
            InvalidInput: the number of steps is unknown or leaves no room for two phases, or K is too large.
        """
        if context.total_steps is None or context.total_steps < 2:
            raise InvalidInput(
                "'composable-sft' trains in two phases and needs to know of two steps or more.",
                "Set training.steps or training.epochs higher.",
            )
        adapted: ComposableSftAdapted = super().attach(model, config, context, name)
        adapted.total_steps = context.total_steps
        return adapted

    def places(self, model: nn.Module, config: ComposableSftConfig) -> list[str]:
        """Every layer that may change, the first of those that share their weights."""
        del config
        places = [group[0] for group in _groups(model)]
        if not places:
            raise InvalidInput(f"{type(model).__name__} has no layer that '{self.name}' could change.", "Try: full")
        return places

    def fresh(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: ComposableSftConfig, context: AttachContext
    ) -> dict[str, Slot]:
        """φ = 0 in the backbone, θ₀ in the head."""
        del context
        inside = {id(module) for module in _backbone(model).modules()}
        backbone = {place: _parameters(layer) for place, layer in layers.items() if id(layer) in inside}
        _entries(config, sum(original.numel() for part in backbone.values() for original in part.values()))
        return {place: DenseSlot(layer) if place in backbone else HeadSlot(layer) for place, layer in layers.items()}

    def blank(self, layer: nn.Module, config: ComposableSftConfig, tensors: Mapping[str, Tensor]) -> Slot:
        """Sparse, or a head's."""
        del config
        return SparseSlot(layer, tensors) if "weight_indices" in tensors else HeadSlot(layer)

    def count(self, model: nn.Module, config: ComposableSftConfig) -> int:
        """Σ of the layers' entries."""
        layers = [base_of(model.get_submodule(place)) for place in self.places(model, config)]
        return sum(original.numel() for layer in layers for original in _parameters(layer).values())

    def compose(self, adapteds: Sequence[ComposableSftAdapted], name: str) -> ComposableSftAdapted:
        """Put the sum of several φ on their model, as an adapter of its own, and activate it.

        Args:
            adapteds: on one model. A task's head is that of the last one and is no sum.
            name: of the new adapter.

        Raises:
            InvalidInput: none, or not all on one model.
            Conflict: the name is taken.
        """
        if not adapteds or any(adapted.model is not adapteds[0].model for adapted in adapteds):
            raise InvalidInput("Adapters can be added where they sit on one model.", "Load them onto one base.")
        model = adapteds[0].model
        check_room(model, self, name)
        parts = [by_layer(adapted.tensors()) for adapted in adapteds]
        slots: dict[str, Slot] = {}
        for place, last in parts[-1].items():
            layer = base_of(model.get_submodule(place))
            if "weight_indices" not in last:
                slots[place] = HeadSlot(layer)
                slots[place].restore(last)
                continue
            added: dict[str, Tensor] = {}
            for kind in _parameters(layer):
                pairs = [(part[place][f"{kind}_indices"], part[place][f"{kind}_values"]) for part in parts]
                added[f"{kind}_indices"], added[f"{kind}_values"] = summed(pairs)
            slots[place] = SparseSlot(layer, added)
        entries = sum(delta.values.numel() for slot in slots.values() for delta in _deltas(slot))
        with undone_on_error(model, name):
            config = adapteds[-1].config.model_copy(update={"entries": entries})
            composed: ComposableSftAdapted = self._put(model, slots, None, config, name)
        return composed

    def _put(
        self,
        model: nn.Module,
        slots: Mapping[str, Slot],
        common: nn.Module | None,
        config: ComposableSftConfig,
        name: str,
    ) -> Any:
        groups = {group[0]: group for group in _groups(model)}
        everywhere = {place: slot for first, slot in slots.items() for place in groups[first]}
        return super()._put(model, everywhere, common, config, name)


def _parameters(layer: Any) -> dict[str, Tensor]:
    """The layer's weight, and its bias where there is one."""
    return {name: getattr(layer, name) for name in ("weight", "bias") if getattr(layer, name, None) is not None}


def _entries_of(mask: Tensor) -> SparsePlan:
    return planned(mask.view(-1).nonzero()[:, 0], (mask.shape[0], mask.shape[1]))


def _deltas(slot: Slot) -> Iterator[SparseDelta]:
    yield from (module for module in slot.modules() if isinstance(module, SparseDelta))


def _backbone(model: nn.Module) -> nn.Module:
    """The model without a task's head."""
    found = getattr(model, "base_model", model)
    return found if isinstance(found, nn.Module) else model


def _groups(model: nn.Module) -> list[list[str]]:
    """The layers that may change; those that share all their parameters in one group, in the model's order."""
    output = output_embeddings(model)
    groups: dict[tuple[int, ...], list[str]] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, AdapterLayer | nn.MultiheadAttention):
            inside += (f"{name}.",)  # attention of torch's own reads its weights without calling the layer
        layer: Any = base_of(module)
        weight = getattr(layer, "weight", None)
        changes = isinstance(weight, Tensor) and weight.is_floating_point() and not list(layer.children())
        if changes and layer is not output and "norm" not in type(layer).__name__.lower():
            groups.setdefault(tuple(id(p) for p in _parameters(layer).values()), []).append(name)
    return list(groups.values())


def _entries(config: ComposableSftConfig, available: int) -> int:
    """K."""
    entries = int(config.density * available) if config.entries is None else config.entries
    if entries > available:
        raise InvalidInput(
            f"{entries:,} entries are to be kept, but only {available:,} may change.", "Lower method.entries."
        )
    return entries


METHOD = ComposableSft()
