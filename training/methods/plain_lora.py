"""Adapters whose update is of low rank, written as a plain LoRA: what peft, vLLM and every other tool reads."""

import json
from collections.abc import Mapping
from math import isclose
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.errors import Conflict, InvalidInput
from training.methods.contract import CONFIG_FILE, TENSORS_FILE, Adapted, origin
from training.methods.injected import PREFIX, InjectedAdapted, base_of, matrix
from training.methods.targets import linear_modules, shortest


def lora_config(
    model: nn.Module, ranks: Mapping[str, int], scale: float, dropout: float = 0.0, rank: int | None = None
) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA, less what only `Adapted.adapter_config` knows.

    Args:
        model: carries the layers.
        ranks: of each adapted layer, by its name.
        scale: α/r, which every layer keeps.
        dropout: of the input of A.
        rank: of the layers that no pattern names; none given: the highest.
    """
    layers = linear_modules(model)
    rank = rank or max(ranks.values())
    others = {name: own for name, own in ranks.items() if own != rank}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=_plain(scale * rank),
        lora_dropout=dropout,
        target_modules=shortest(model, list(ranks)),
        rank_pattern=others,
        alpha_pattern={name: _plain(scale * own) for name, own in others.items()},
        fan_in_fan_out=all(isinstance(layers[name], Conv1D) for name in ranks),
        inference_mode=True,
    )
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return {
        key: value
        for key, value in content.items()
        if key not in ("peft_type", "base_model_name_or_path", "auto_mapping")
    }


def write_plain_lora(adapted: Adapted, directory: Path) -> None:
    """Write an adapter, whatever its own format, as a plain LoRA of scale 1.

    Raises:
        InvalidInput: it is a plain LoRA already, its update is not of low rank, or it changes more than weights.
        Conflict: the directory holds something.
    """
    if directory.exists() and any(directory.iterdir()):
        raise Conflict(f"{directory} is not empty.", "Name a new or empty folder.")
    if adapted.adapter_config().get("peft_type") == "LORA":
        raise InvalidInput(f"Adapter '{adapted.name}' is stored as a LoRA already.", "Export it as it is.")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    slots = adapted.slots() if isinstance(adapted, InjectedAdapted) else {}
    for place, slot in slots.items():
        if not hasattr(slot, "low_rank"):
            break
        layer: Any = base_of(adapted.model.get_submodule(place))
        weight, bias = matrix(layer), None if layer.bias is None else layer.bias.detach().float()
        shift = slot.shift(weight, bias)
        if shift is not None and torch.count_nonzero(shift):
            raise InvalidInput(f"Adapter '{adapted.name}' also changes the bias of {place}.", "Merge it instead.")
        A, B = slot.low_rank(weight)
        tensors |= {f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": B}
        ranks[place] = len(A)
    if not ranks or len(ranks) < len(slots):
        raise InvalidInput(
            f"Adapter '{adapted.name}' is of a method that Regraft cannot write as a plain LoRA.",
            "Export it as it is, or --merged.",
        )
    directory.mkdir(parents=True, exist_ok=True)
    shown: dict[str, Tensor] = {f"{PREFIX}{k}": v.detach().float().cpu().contiguous() for k, v in tensors.items()}
    save_file(shown, directory / TENSORS_FILE, metadata={"format": "pt"})
    content = {"peft_type": "LORA", **origin(adapted.model), **lora_config(adapted.model, ranks, scale=1.0)}
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plain(number: float) -> float:
    """As an integer, which other tools expect of an α, where it is one."""
    return round(number) if isclose(number, round(number), rel_tol=1e-12) else number
