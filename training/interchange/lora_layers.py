"""A plain LoRA as every tool means it: two factors and a scale per layer; and peft's way of storing it.

W = W₀ + s·BA,    A ∈ ℝ^{r×n}, B ∈ ℝ^{m×r};  s = α/r, or α/√r with rsLoRA (arXiv 2312.03732)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.errors import BaseModelMismatch, CorruptArtifact, InvalidInput
from training.methods.contract import origin
from training.methods.foreign_config import RESTORE, ForeignLora
from training.methods.injected import PREFIX, split_key
from training.methods.lora import PLAIN_STARTS
from training.methods.peft_method import own_weight
from training.methods.plain_lora import lora_config, plain_number
from training.methods.targets import linear_modules, shape

_UNSAYABLE = {  # options of peft's LORA that make it something else than W₀ + s·BA
    "use_dora": "it is a DoRA",
    "lora_bias": "it trains biases",
    "modules_to_save": "it holds modules whole (modules_to_save)",
    "trainable_token_indices": "it trains single tokens' embeddings",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "it is split for Megatron",
}


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """What a LoRA adds to one layer: s·BA with A [r, n], B [m, r]."""

    A: Tensor
    B: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Its inner dimension r."""
        return len(self.A)

    def update(self) -> Tensor:
        """ΔW = s·BA [m, n], in float64."""
        return self.scale * (self.B.double() @ self.A.double())

    def padded(self, rank: int) -> "LoraLayer":
        """The same update at a higher rank: rows of zeros under A, columns of zeros beside B."""
        more = rank - self.rank
        A = torch.cat([self.A, self.A.new_zeros(more, self.A.shape[1])])
        return LoraLayer(A, torch.cat([self.B, self.B.new_zeros(len(self.B), more)], dim=1), self.scale)

    def rescaled(self, scale: float) -> "LoraLayer":
        """The same update with another scale, B taking the rest.

        B keeps its dtype where that holds every new value exactly, and becomes float32 (or float64, as it was) where
        rounding would change the update.
        """
        if isclose(scale, self.scale, rel_tol=1e-12):
            return LoraLayer(self.A, self.B, scale)
        exact = self.B.double() * (self.scale / scale)
        B = exact.to(self.B.dtype)
        if not torch.equal(B.double(), exact):
            B = exact.to(torch.promote_types(self.B.dtype, torch.float32))
        return LoraLayer(self.A, B, scale)


LoraLayers = Mapping[str, LoraLayer]  # by the name of the base's layer


def layers_from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LoraLayer]:
    """The layers of a LoRA that peft stored.

    Args:
        config: adapter_config.json; rank and alpha patterns and rsLoRA's scale are honoured, as peft does.
        tensors: of adapter_model.safetensors.

    Raises:
        InvalidInput: another kind of adapter, or one that is more than W₀ + s·BA; says what.
        CorruptArtifact: half a pair, factors that do not go together, or a rank that is not the config's.
    """
    if config.get("peft_type") != "LORA":
        raise InvalidInput(f"It is of peft's type {config.get('peft_type')!r}, not a LoRA.", _AS_LORA)
    said = ForeignLora.read(config)
    reasons = [why for option, why in _UNSAYABLE.items() if config.get(option)]
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        reasons.append(f"its start changed the base's weights (init_lora_weights: {config['init_lora_weights']})")
    if config.get("bias", "none") != "none":
        reasons.append(f"it trains biases (bias: {config['bias']})")
    if reasons:
        raise InvalidInput(f"It is no plain LoRA: {'; '.join(reasons)}.", _AS_LORA)
    sides: dict[str, dict[str, Tensor]] = {"lora_A.weight": {}, "lora_B.weight": {}}
    for key, tensor in tensors.items():
        place, part = split_key(key)
        if part not in sides:
            raise InvalidInput(f"It is no plain LoRA: it stores {key}.", _AS_LORA)
        sides[part][place] = tensor
    layers = {}
    for place, (A, B) in paired(*sides.values()).items():
        said.require_rank(place, len(A))
        layers[place] = LoraLayer(A, B, said.scale(place))
    return layers


def layers_to_peft(layers: LoraLayers, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of adapter_model.safetensors; the factors stay as they are.

    Where the layers differ in rank or scale, peft's patterns say so.

    Args:
        layers: at least one.
        model: the bare base, its weights read no further than their shapes (it may be on the meta device).

    Raises:
        BaseModelMismatch: a layer that the model does not have, or of another shape.
    """
    check_places(layers, model)
    ranks = {place: layer.rank for place, layer in layers.items()}
    scale = common_scale(layers)
    config = lora_config(model, ranks, scale)
    for place, layer in layers.items():
        if not isclose(layer.scale, scale, rel_tol=1e-12):
            config["alpha_pattern"][place] = plain_number(layer.scale * layer.rank)
    tensors = {
        f"{PREFIX}{place}.lora_{side}.weight": separate(factor)
        for place, layer in layers.items()
        for side, factor in (("A", layer.A), ("B", layer.B))
    }
    return {"peft_type": "LORA", **origin(model), **config}, tensors


def paired(A: Mapping[str, Tensor], B: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Both factors of every layer, in A's order: A [r, n], B [m, r].

    Raises:
        InvalidInput: there is none, or one is of a convolution.
        CorruptArtifact: a layer has one factor only, or two that do not go together.
    """
    if not A and not B:
        raise InvalidInput("It holds no factor of a LoRA.", "Is it an adapter?")
    if alone := sorted(A.keys() ^ B.keys()):
        raise CorruptArtifact(f"{alone[0]}{_more(alone)} has one factor of the two.", RESTORE)
    for place, first in A.items():
        second = B[place]
        if first.ndim > 2 or second.ndim > 2:
            raise InvalidInput(
                f"{place} is adapted as a convolution or as experts ({tuple(first.shape)}); linear layers are read.",
                "Use it with the tool that made it.",
            )
        if first.ndim != 2 or second.ndim != 2 or len(first) != second.shape[1] or not len(first):
            raise CorruptArtifact(
                f"{place} has factors {tuple(first.shape)} and {tuple(second.shape)}, which are no LoRA's.", RESTORE
            )
        if not (first.is_floating_point() and second.is_floating_point()):
            raise CorruptArtifact(f"{place} has factors of dtype {first.dtype} and {second.dtype}.", RESTORE)
    return {place: (first, B[place]) for place, first in A.items()}


def require_places(shapes: Mapping[str, Sequence[int]], model: nn.Module) -> None:
    """Raise `BaseModelMismatch` where tensors under peft's names are of layers that `model` has not, or of other size.

    Of a LoRA's factors A [r, n] and B [m, r] the size is looked at; other tensors say too little of their layer's.
    """
    modules, linear = dict(model.named_modules()), linear_modules(model)
    for key, extents in shapes.items():
        if not key.startswith(PREFIX):
            continue
        place, part = split_key(key)
        known = place
        while known not in modules:  # what follows a known place may be the adapter's own
            known = known.rpartition(".")[0]
        if not known or isinstance(modules[known], nn.ModuleList):
            raise _other_base(f"{type(model).__name__} has no layer {place}.")
        if place in linear and part in ("lora_A.weight", "lora_B.weight") and len(extents) == 2:
            m, n = shape(linear[place])
            side, expected, found = ("inputs", n, extents[1]) if part == "lora_A.weight" else ("outputs", m, extents[0])
            if expected != found:
                raise _other_base(f"{place} of {type(model).__name__} has {expected} {side}, the adapter's {found}.")


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise `CorruptArtifact`, naming the first, where tensors hold NaN or infinity."""
    damaged = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if damaged:
        raise CorruptArtifact(
            f"{damaged[0]}{_more(damaged)} has NaN or infinity in it.",
            "Was it trained to the end? Import an earlier checkpoint.",
        )


def check_places(layers: LoraLayers, model: nn.Module) -> None:
    """Raise `BaseModelMismatch` unless every layer is a linear one of `model`, of its shape [m, n]."""
    there = linear_modules(model)
    for place, layer in layers.items():
        if place not in there:
            raise _other_base(f"{type(model).__name__} has no linear layer {place}.")
        expected, found = shape(there[place]), (len(layer.B), layer.A.shape[1])
        if expected != found:
            raise _other_base(
                f"{place} of {type(model).__name__} is {expected[0]} × {expected[1]}; the adapter's is "
                f"{found[0]} × {found[1]}."
            )


def fold(layers: LoraLayers, model: nn.Module) -> None:
    """Add every layer's update to the weight of the plain `model`, in place; a tied head parts from its embeddings.

    Raises:
        BaseModelMismatch: a layer that the model does not have.
    """
    check_places(layers, model)
    there = linear_modules(model)
    with torch.no_grad():
        for place, layer in layers.items():
            linear: Any = there[place]
            own_weight(model, linear)
            update = layer.update().to(linear.weight.device)
            changed = linear.weight.double() + (update.T if isinstance(linear, Conv1D) else update)
            linear.weight.copy_(changed)


def common_scale(layers: LoraLayers) -> float:
    """The scale that most layers have."""
    scales = [layer.scale for layer in layers.values()]
    return max(scales, key=lambda scale: sum(isclose(scale, other, rel_tol=1e-12) for other in scales))


def highest_rank(layers: Iterable[LoraLayer]) -> int:
    """The largest rank among them."""
    return max(layer.rank for layer in layers)


def separate(factor: Tensor) -> Tensor:
    """A contiguous copy with storage of its own: a safetensors file has no second name for a tensor."""
    return factor.detach().clone(memory_format=torch.contiguous_format)


def finite(place: str, number: object) -> float:
    """`number` as a float; raises `CorruptArtifact` where it is none, or not finite."""
    if isinstance(number, bool) or not isinstance(number, int | float) or not isfinite(number):
        raise CorruptArtifact(f"{place} has the scale or alpha {number!r:.40}, which is no finite number.", RESTORE)
    return float(number)


def _other_base(what: str) -> BaseModelMismatch:
    return BaseModelMismatch(what, "Name the base model it was trained on: regraft base list")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


_AS_LORA = "Export it as it is, cut down to a LoRA with --rank R, or --to merged."
