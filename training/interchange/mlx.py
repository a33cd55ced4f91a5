"""MLX adapters, as mlx-lm trains and loads them: `adapters.safetensors` and an adapter_config.json of its own.

    y = Wx + s·(xa)b,    a = Aᵀ ∈ ℝ^{n×r}, b = Bᵀ ∈ ℝ^{r×m}      (keys LAYER.lora_a, LAYER.lora_b)

mlx-lm (0.32) gives every layer one rank r and one scale s (`lora_parameters`), and adapts `keys`, named from the block
on, in the last `num_layers` blocks; a `keys` entry may also be a whole name (lm_head). So a LoRA of several ranks is
padded with zeros to the largest, and where the scales differ b takes the difference; both leave every ΔW what it was
(`LoraLayer.rescaled` says in which dtype). Layers in `keys` that the file does not hold start with b = 0: no change.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from infra.errors import CorruptArtifact, InvalidInput
from training.interchange.lora_layers import (
    LoraLayer,
    LoraLayers,
    check_places,
    common_scale,
    finite,
    highest_rank,
    paired,
    separate,
)

TENSORS_FILE = "adapters.safetensors"
_BLOCK = re.compile(r"model\.layers\.(?P<number>\d+)\.(?P<inside>.+)")


def layers_to_mlx(layers: LoraLayers, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of adapters.safetensors.

    Args:
        layers: at least one.
        model: the bare base; mlx-lm must know its layers by the same names, `model.layers.N.…`.

    Raises:
        InvalidInput: a layer that mlx-lm does not have under this name: another architecture, or a tied head.
        BaseModelMismatch: a layer that the model does not have.
    """
    check_places(layers, model)
    inside: dict[str, int] = {}  # key within a block → the first block that has it
    whole = []
    for place in layers:
        if block := _BLOCK.fullmatch(place):
            inside[block["inside"]] = min(int(block["number"]), inside.get(block["inside"], int(block["number"])))
        elif place == "lm_head" and not getattr(getattr(model, "config", None), "tie_word_embeddings", True):
            whole.append(place)
        else:
            raise InvalidInput(
                f"mlx-lm has no layer {place} to adapt: it is tied there, or has another name.",
                "Train without it (method.exclude), or export --to merged and convert the model with mlx_lm.convert.",
            )
    numbers = [int(found["number"]) for name, _ in model.named_modules() if (found := _BLOCK.match(name))]
    blocks = 1 + max(numbers, default=0)
    rank, scale = highest_rank(layers.values()), common_scale(layers)
    even = {place: layer.rescaled(scale).padded(rank) for place, layer in layers.items()}
    config = {
        "fine_tune_type": "lora",
        "num_layers": blocks - min(inside.values(), default=blocks - 1),
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted([*inside, *whole])},
    }
    tensors = {
        f"{place}.lora_{side}": separate(factor.T)
        for place, layer in even.items()
        for side, factor in (("a", layer.A), ("b", layer.B))
    }
    return config, tensors


def layers_from_mlx(config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, LoraLayer]:
    """The layers of an adapter that mlx-lm trained, or that `layers_to_mlx` wrote.

    Directions that are zero in both factors, at the end, are padding and left out.

    Raises:
        InvalidInput: full fine-tuning or DoRA; embeddings or experts among the layers.
        CorruptArtifact: no scale, half a pair, or another rank than the config's.
        BaseModelMismatch: a layer that the model does not have.
    """
    if (kind := config.get("fine_tune_type", "lora")) != "lora":
        raise InvalidInput(
            f"It is mlx-lm's fine_tune_type {kind!r:.40}; only 'lora' is read.",
            "Fuse it with mlx_lm.fuse, and import the model that comes out.",
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, Mapping):
        raise CorruptArtifact(
            "Its adapter_config.json has no lora_parameters.", "Copy it again from where it was made."
        )
    scale = finite("lora_parameters", parameters.get("scale"))
    sides: dict[str, dict[str, Tensor]] = {"lora_a": {}, "lora_b": {}}
    for key, tensor in tensors.items():
        place, _, side = key.rpartition(".")
        if side not in sides:
            raise InvalidInput(f"It is no plain LoRA: it stores {key}.", "Fuse it with mlx_lm.fuse, and import that.")
        if side == "lora_a" and place.endswith("embed_tokens"):
            raise InvalidInput(f"It adapts the embeddings ({place}).", "Fuse it with mlx_lm.fuse, and import that.")
        sides[side][place] = tensor.T if tensor.ndim == 2 else tensor
    layers = {}
    for place, (A, B) in paired(*sides.values()).items():
        if len(A) != parameters.get("rank"):
            raise CorruptArtifact(
                f"{place} is stored at rank {len(A)}; the config says {parameters.get('rank')!r:.40}.",
                "Copy it again from where it was made.",
            )
        layers[place] = _without_padding(LoraLayer(A, B, scale))
    check_places(layers, model)
    return layers


def _without_padding(layer: LoraLayer) -> LoraLayer:
    used = (layer.A.abs().amax(1) + layer.B.abs().amax(0)).nonzero()
    rank = int(used[-1]) + 1 if len(used) else 1
    return LoraLayer(layer.A[:rank].contiguous(), layer.B[:, :rank].contiguous(), layer.scale)
