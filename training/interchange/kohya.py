"""kohya's LoRA files, which image tools exchange: one safetensors file with three tensors a layer.

    PREFIX_LAYER.lora_down.weight = A [r, n],  PREFIX_LAYER.lora_up.weight = B [m, r],  PREFIX_LAYER.alpha = α,  s = α/r

LAYER is the layer's name with underscores for dots, so it does not say where the dots were: it is looked up among the
base's own names, and refused where none or several of them fit. PREFIX tells the parts of a diffusion pipeline apart
(lora_unet, lora_te, lora_te1, lora_te2). A language model is a text encoder to such tools: ours are written `lora_te`.
A file without α means α = r, as its readers take it.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from infra.errors import BaseModelMismatch, CorruptArtifact, InvalidInput
from training.interchange.lora_layers import LoraLayer, LoraLayers, check_places, finite, paired, separate
from training.methods.targets import linear_modules

PREFIX = "lora_te"
_PREFIXES = re.compile(r"(?P<prefix>lora_(?:unet|te[123]?|transformer|prior_(?:unet|te)))_(?P<layer>.+)")
_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
_LYCORIS = ("hada_", "lokr_", "lora_mid", "dora_scale", "oft_", "diff", "w_norm", "b_norm", "on_input")


def layers_to_kohya(layers: LoraLayers, prefix: str = PREFIX) -> dict[str, Tensor]:
    """The tensors of the file; factors stay as they are, and α is s·r in float32.

    Args:
        layers: at least one; ranks and scales may differ.
        prefix: of the part of a pipeline that they belong to.

    Raises:
        InvalidInput: two layers that would have the same name.
    """
    names: dict[str, str] = {}
    tensors = {}
    for place, layer in layers.items():
        name = f"{prefix}_{_flat(place)}"
        if name in names:
            raise InvalidInput(
                f"{names[name]} and {place} would both be called {name}.", "Export it --to peft, which keeps the dots."
            )
        names[name] = place
        tensors[f"{name}.lora_down.weight"] = separate(layer.A)
        tensors[f"{name}.lora_up.weight"] = separate(layer.B)
        tensors[f"{name}.alpha"] = torch.tensor(layer.scale * layer.rank)
    return tensors


def layers_from_kohya(tensors: Mapping[str, Tensor], model: nn.Module, part: str | None = None) -> dict[str, LoraLayer]:
    """The layers of a kohya file.

    Args:
        tensors: of the file.
        model: the bare base whose names the layers have.
        part: the prefix to read, where the file holds several parts of a pipeline.

    Raises:
        InvalidInput: several parts and none chosen; LyCORIS's other methods; convolutions.
        BaseModelMismatch: a layer that the model does not have, or has twice once its dots are underscores.
        CorruptArtifact: half a pair, or an α that is no number.
    """
    parts: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: {"A": {}, "B": {}, "alpha": {}})
    for key, tensor in tensors.items():
        name, _, kind = key.partition(".")
        found = _PREFIXES.fullmatch(name)
        if kind.startswith(_LYCORIS):
            raise InvalidInput(
                f"It is no plain LoRA: {key} belongs to another method of LyCORIS.",
                "Merge it with the tool that made it, and import the model that comes out.",
            )
        if found is None or kind not in _PARTS:
            raise InvalidInput(f"{key} is no name of a kohya file.", f"Known prefixes: {_known()}.")
        parts[found["prefix"]][_PARTS[kind]][found["layer"]] = tensor
    if part is None and len(parts) > 1:
        raise InvalidInput(
            f"It holds several parts of a pipeline: {', '.join(sorted(parts))}.",
            "Choose the base's with --part PREFIX.",
        )
    if part is not None and part not in parts:
        raise InvalidInput(f"It holds no part {part}; it holds {', '.join(sorted(parts)) or 'nothing'}.", "See --part.")
    chosen = parts[part] if part is not None else next(iter(parts.values()), {"A": {}, "B": {}, "alpha": {}})
    if orphans := sorted(chosen["alpha"].keys() - chosen["A"].keys()):
        raise CorruptArtifact(f"{orphans[0]} has an alpha and no factors.", "Copy it again from where it was made.")
    places = _by_flat_name(model)
    layers = {}
    for name, (A, B) in paired(chosen["A"], chosen["B"]).items():
        alpha = chosen["alpha"].get(name)
        scale = 1.0 if alpha is None else finite(name, _number(alpha)) / len(A)
        layers[_resolved(name, places, model)] = LoraLayer(A, B, scale)
    check_places(layers, model)
    return layers


def _resolved(name: str, places: Mapping[str, list[str]], model: nn.Module) -> str:
    candidates = places.get(name, [])
    if len(candidates) == 1:
        return candidates[0]
    base = type(model).__name__
    if candidates:
        raise BaseModelMismatch(
            f"{name} may be {' or '.join(candidates)} of {base}; a kohya file does not say which.",
            "Convert it to peft's or diffusers' format with the tool that made it; those keep the dots.",
        )
    raise BaseModelMismatch(
        f"{base} has no linear layer that {name} could mean.",
        "Name the base model it was trained on: regraft base list",
    )


def _by_flat_name(model: nn.Module) -> dict[str, list[str]]:
    places: dict[str, list[str]] = defaultdict(list)
    for place in linear_modules(model):
        places[_flat(place)].append(place)
    return places


def _flat(place: str) -> str:
    return place.replace(".", "_")


def _number(alpha: Tensor) -> object:
    return float(alpha) if alpha.numel() == 1 and alpha.dtype != torch.bool else None


def _known() -> str:
    return "lora_unet, lora_te, lora_te1, lora_te2, lora_te3, lora_transformer, lora_prior_unet, lora_prior_te"
