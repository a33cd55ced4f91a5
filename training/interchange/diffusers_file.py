"""diffusers' LoRA files: one safetensors file whose names keep their dots, behind the part of the pipeline.

    PART.LAYER.lora_A.weight = A [r, n],  PART.LAYER.lora_B.weight = B [m, r]

Older ones say `lora.down` and `lora.up`. The scale stands in the metadata (`lora_adapter_metadata`, peft's config with
PART. before each key), or beside the layer as `.alpha` (s = α/r), or nowhere, which means 1.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from infra.errors import BaseModelMismatch, CorruptArtifact, InvalidInput
from training.interchange.lora_layers import (
    LoraLayer,
    LoraLayers,
    check_places,
    finite,
    layers_from_peft,
    layers_to_peft,
    paired,
)
from training.methods.injected import PREFIX as PEFT_PREFIX
from training.methods.targets import linear_modules

METADATA = "lora_adapter_metadata"
PART = "text_encoder"
_PARTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
_SIDES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".alpha": "alpha",
}


def layers_to_diffusers(
    layers: LoraLayers, model: nn.Module, part: str = PART
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of the file.

    Raises:
        BaseModelMismatch: a layer that the model does not have.
    """
    config, tensors = layers_to_peft(layers, model)
    said = {f"{part}.{key}": value for key, value in config.items()}
    renamed = {f"{part}.{key.removeprefix(PEFT_PREFIX)}": tensor for key, tensor in tensors.items()}
    return {"format": "pt", METADATA: json.dumps(said, indent=2, sort_keys=True)}, renamed


def layers_from_diffusers(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], model: nn.Module, part: str | None = None
) -> dict[str, LoraLayer]:
    """The layers of a diffusers file, or of peft's tensors without their config.

    Args:
        metadata: of the file.
        tensors: of the file.
        model: the bare base whose names the layers have.
        part: which part of the pipeline to read, where the file holds several.

    Raises:
        InvalidInput: several parts and none chosen; another kind of adapter.
        BaseModelMismatch: a layer that the model does not have.
        CorruptArtifact: half a pair, or metadata that cannot be read.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        first, _, rest = key.removeprefix(PEFT_PREFIX).partition(".")
        known = first in _PARTS
        parts.setdefault(first if known else "", {})[rest if known else key.removeprefix(PEFT_PREFIX)] = tensor
    if part is None and len(parts) > 1:
        named = sorted(name or "layers without a part" for name in parts)
        raise InvalidInput(f"It holds several parts of a pipeline: {', '.join(named)}.", "Choose with --part NAME.")
    chosen = part if part is not None else next(iter(parts), "")
    if chosen not in parts:
        raise InvalidInput(f"It holds no part {chosen}; it holds {', '.join(sorted(parts))}.", "See --part.")
    said = {key.removeprefix(f"{chosen}."): value for key, value in _config(metadata).items() if key.startswith(chosen)}
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "alpha": {}}
    for key, tensor in parts[chosen].items():
        ending = next((ending for ending in _SIDES if key.endswith(ending)), None)
        if ending is None:
            raise InvalidInput(f"It is no plain LoRA: it stores {key}.", "Use it with the tool that made it.")
        sides[_SIDES[ending]][key.removesuffix(ending)] = tensor
    pairs = paired(sides["A"], sides["B"])
    if strange := sorted(pairs.keys() - linear_modules(model).keys()):
        raise BaseModelMismatch(
            f"{type(model).__name__} has no linear layer {strange[0]}.",
            "Name the base model it was trained on: regraft base list",
        )
    if "r" in said:
        renamed = {f"{PEFT_PREFIX}{place}.lora_A.weight": A for place, (A, _) in pairs.items()}
        renamed |= {f"{PEFT_PREFIX}{place}.lora_B.weight": B for place, (_, B) in pairs.items()}
        layers = layers_from_peft({**said, "peft_type": "LORA"}, renamed)
    else:
        layers = {place: LoraLayer(A, B, _scale(place, A, sides["alpha"])) for place, (A, B) in pairs.items()}
    check_places(layers, model)
    return layers


def _scale(place: str, A: Tensor, alphas: Mapping[str, Tensor]) -> float:
    alpha = alphas.get(place)
    return 1.0 if alpha is None else finite(place, float(alpha) if alpha.numel() == 1 else None) / len(A)


def _config(metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(METADATA)
    try:
        content = json.loads(text) if text else {}
    except (json.JSONDecodeError, RecursionError) as error:
        raise CorruptArtifact(f"Its {METADATA} is not JSON ({error}).", "Save it again.") from None
    if not isinstance(content, dict):
        raise CorruptArtifact(f"Its {METADATA} is not a JSON object.", "Save it again.")
    return content
