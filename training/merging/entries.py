"""Merging adapters whose tensors have equal names and shapes, entry by entry: all but LoRAs.

(IA)³ vectors, bottleneck adapters, prompts, sparse differences, whole fine-tuned models: where what is stored enters
the model other than linearly, this is the weights' mean of model soups, which is good inside one loss basin and nowhere
else. What decides the meaning of the numbers beside them (random seeds of fixed projections, scales) must be equal.
Methods whose update is a product of stored tensors are refused: it is the products that add up, not the factors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from infra.errors import InvalidInput
from training.merging.adapter import AS_LORA, MIGRATE, Adapter, Merged
from training.merging.method import MergeMethod
from training.merging.origin import TRAINED_BASE, is_whole, merged_values, origin_of
from training.merging.sparse import aligned, is_sparse, number_of_entries

PRODUCTS = (
    "ADALORA",
    "DELORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "HYDRA",
    "LOHA",
    "LOKR",
    "LOLDU",
    "LORA_SB",
    "LORA_XS",
    "RANDLORA",
    "VBLORA",
    "VERA",
)
WITHOUT_MEANING = (  # for the tensors: where it came from, what the tensors' names say, how it was trained
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
    "task_type",
    "inference_mode",
    "target_modules",
    "feedforward_modules",
    "modules_to_save",
    "targets",
    "exclude",
    "entries",
    "density",
)


def merge_entries(adapters: Sequence[Adapter], method: MergeMethod, base: Mapping[str, Tensor] | None) -> Merged:
    """The merged adapter; see `merge`."""
    first, names = adapters[0], [adapter.name for adapter in adapters]
    if method.rank is not None or method.energy is not None:
        raise InvalidInput(
            f"rank and energy are for LoRAs; '{first.name}' is {first.kind}.", "Leave them out of the merge's options."
        )
    if first.kind in PRODUCTS:
        raise InvalidInput(
            f"The update of {first.kind} adapters is a product of what they store: sums of the factors are not sums of "
            "updates.",
            AS_LORA,
        )
    sparse = all(map(is_sparse, adapters))
    if not sparse and first.kind not in TRAINED_BASE:  # of those the tensors say all
        _check_configs(adapters)
    if sparse:
        adapters = aligned(adapters)
    tensors: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for adapter in adapters for key in adapter.tensors):
        values = [adapter.tensors.get(key) for adapter in adapters]
        lacking = [name for name, value in zip(names, values, strict=True) if value is None]
        if lacking and (first.kind in TRAINED_BASE or not any(is_whole(adapter, key) for adapter in adapters)):
            raise InvalidInput(f"Adapter '{lacking[0]}' has no tensor {key}, which others have.", MIGRATE)
        tensors[key] = merged_values(method, names, key, values, origin_of(adapters, key, base))
    content = dict(first.config)
    if saved := sorted({module for adapter in adapters for module in adapter.config.get("modules_to_save") or ()}):
        content["modules_to_save"] = saved
    if sparse and "entries" in content.get("options", {}):
        content["options"] = {**content["options"], "entries": number_of_entries(tensors)}
    return Merged("merged", content, tensors)


def _check_configs(adapters: Sequence[Adapter]) -> None:
    """Raise `InvalidInput` where configurations differ in what their tensors' meaning depends on."""
    first = adapters[0]
    for adapter in adapters[1:]:
        ours, others = _meaning(first.config), _meaning(adapter.config)
        if differing := sorted(key for key in ours.keys() | others.keys() if ours.get(key) != others.get(key)):
            key = differing[0]
            raise InvalidInput(
                f"Adapters '{first.name}' and '{adapter.name}' were made with different settings: {key} is "
                f"{ours.get(key)!r} in one, {others.get(key)!r} in the other.",
                AS_LORA,
            )


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    options = config.get("options")
    flat = {**config, **(options if isinstance(options, Mapping) else {})}
    return {
        key: value
        for key, value in flat.items()
        if key not in (*WITHOUT_MEANING, "options") and "dropout" not in key and not key.startswith("init_")
    }
