"""A stored adapter, compressed: which of its tensors, measured from what, and the config that belongs to them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from infra.errors import InvalidInput
from training.compression.steps import CODECS, Steps, compress
from training.merging.adapter import Adapter
from training.merging.lora import cut
from training.merging.origin import FINE_TUNED, PROMPTS, is_whole, origin_of

BFLOAT16_BYTES = 2
MAGNITUDES = "lora_magnitude_vector"  # of DoRA: a few large numbers, beside which factors would vanish


@dataclass(frozen=True)
class Compressed:
    """What is stored of a compressed adapter.

    Args:
        config: adapter_config.json without the compression, for the tensors that decoding gives.
        data: the file.
    """

    config: dict[str, Any]
    data: bytes


def is_plain_lora(adapter: Adapter) -> bool:
    """Whether there is a rank that can be cut."""
    return adapter.kind == "LORA" and not adapter.config.get("use_dora")


def check(adapter: Adapter, steps: Steps) -> None:
    """Raise `InvalidInput` where the rank of what is no plain LoRA is to be cut."""
    if steps.cut is not None and not is_plain_lora(adapter):
        raise InvalidInput(
            f"{adapter.name} is no plain LoRA, and low_rank cuts the rank of one.",
            f"Leave it out: --codec {steps.line.rpartition('+')[2].strip()}",
        )


def compressed(adapter: Adapter, steps: Steps, base: Mapping[str, Tensor]) -> Compressed:
    """The adapter after all steps.

    What is stored whole beside the adapter (heads, norms) stays as it is; a fine-tuned model is compressed as its
    change of the base's weights, vectors that multiply as their change of 1.

    Args:
        adapter: as it is stored.
        steps: how.
        base: the base model's own tensors, by name.

    Raises:
        InvalidInput: a step does not go with the adapter.
    """
    check(adapter, steps)
    config = dict(adapter.config)
    if steps.cut is not None:
        lower = cut(adapter, steps.cut.rank, steps.cut.energy)
        adapter, config = replace(adapter, tensors=lower.tensors), dict(lower.config)
    dense, origins = [], {}
    for name, tensor in adapter.tensors.items():
        if (is_whole(adapter, name) and adapter.kind not in (*FINE_TUNED, *PROMPTS)) or MAGNITUDES in name:
            dense.append(name)
        elif tensor.is_floating_point() and CODECS[steps.codec].takes_origins:
            origin = origin_of([adapter], name, base)
            if isinstance(origin, Tensor) or origin:
                origins[name] = origin
    return Compressed(config, compress(adapter.tensors, steps, dense, origins))


def dense_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What the numbers take in bfloat16, which sizes are compared with."""
    return BFLOAT16_BYTES * sum(tensor.numel() for tensor in tensors.values())
