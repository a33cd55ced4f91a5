"""Small stored adapters, and what they do to a weight, computed here without the code under test."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny_models import tiny_llama
from training.merging.adapter import Adapter
from training.methods.contract import AttachContext
from training.methods.lora import METHOD, LoraConfig

PREFIX = "base_model.model."
SHAPES = {"model.layers.0.q_proj": (6, 5), "model.layers.1.q_proj": (6, 5), "model.layers.1.down_proj": (4, 9)}


def lora(
    name: str,
    seed: int,
    rank: int = 2,
    alpha: float = 4,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    ranks: Mapping[str, int] | None = None,
    **config: Any,
) -> Adapter:
    """Random factors; `ranks` where a layer's is its own."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for place, (m, n) in shapes.items():
        r = (ranks or {}).get(place, rank)
        tensors[f"{PREFIX}{place}.lora_A.weight"] = torch.randn(r, n, generator=generator).to(dtype)
        tensors[f"{PREFIX}{place}.lora_B.weight"] = torch.randn(m, r, generator=generator).to(dtype)
    targets = sorted({place.rpartition(".")[2] for place in shapes})
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, **config}
    return Adapter(name, content | ({"rank_pattern": dict(ranks)} if ranks else {}), tensors)


def trained(seed: int, **options: Any) -> Adapter:
    """A LoRA on the tiny Llama, as Regraft stores it, with random factors."""
    adapted = METHOD.attach(tiny_llama(), LoraConfig(**options), AttachContext(seed=seed))
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(t.shape, generator=generator) / 4 for key, t in adapted.tensors().items()}
    return Adapter(f"seed {seed}", adapted.adapter_config(), tensors)


def vectors(
    name: str, seed: int, shapes: Mapping[str, Sequence[int]], kind: str = "REGRAFT_LLM_ADAPTERS", **config: Any
) -> Adapter:
    """Random tensors of any shapes, of a kind that merges entry by entry."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(tuple(shape), generator=generator) for key, shape in shapes.items()}
    return Adapter(name, {"peft_type": kind, **config}, tensors)


def updates(adapter: Adapter) -> dict[str, Tensor]:
    """ΔW [m, n] of each layer of a LoRA, float64."""
    config, found = adapter.config, {}
    for key, A in adapter.tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        place = key.removesuffix(".lora_A.weight").removeprefix(PREFIX)
        B = adapter.tensors[key.replace("lora_A", "lora_B")]
        alpha = _looked_up(config.get("alpha_pattern") or {}, place, config["lora_alpha"])
        assert len(A) == _looked_up(config.get("rank_pattern") or {}, place, config["r"])
        scale = alpha / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
        found[place] = scale * B.double() @ A.double()
    return found


def write(adapter: Adapter, directory: Path) -> Path:
    """As an adapter directory that peft loads; returns it."""
    directory.mkdir(parents=True)
    save_file(dict(adapter.tensors), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    content = {key: getattr(value, "value", value) for key, value in adapter.config.items()}
    (directory / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def _looked_up(pattern: Mapping[str, Any], place: str, otherwise: Any) -> Any:
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?{key}", place)), otherwise)
