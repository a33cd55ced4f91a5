"""What an update is measured from: the value that a tensor has where the adapter changes nothing.

A merge adds up updates, Δᵢ = θᵢ − θ₀, and gives θ₀ + Δ. For most tensors θ₀ is 0; for factors that multiply, 1; for
values of the base's own (full fine-tuning, norms, modules that are stored whole), the base's; prompts have none. Where
θ₀ is not at hand a mixture needs none if the coefficients of the adapters that hold the tensor sum to one: Σ cᵢθᵢ.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from infra.errors import InvalidInput
from training.merging.adapter import AS_LORA, MIGRATE, Adapter, common_type, stored
from training.merging.method import MergeMethod
from training.methods.injected import PREFIX, split_key

WRAPPERS = ("base_layer", "original_module", "modules_to_save", "ln_tuning_layers")  # which peft puts into names
BASE = None  # the base's own value
PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CPT")
FINE_TUNED = ("REGRAFT_FULL", "REGRAFT_LISA", "REGRAFT_GALORE", "REGRAFT_NATURAL_GALORE")
TRAINED_BASE = (*FINE_TUNED, "LN_TUNING")
ORIGINS: dict[tuple[str, str], float | None] = {  # of a kind's tensors by their last name, where it is not 0
    ("IA3", "ia3_l"): 1.0,
    ("REGRAFT_SSF", "scale"): 1.0,
    ("BOFT", "boft_s"): 1.0,
    ("ROAD", "road_alpha"): 1.0,
    ("REGRAFT_COMPACTER", "weight"): BASE,  # normalisations, trained beside the adapters
    ("REGRAFT_COMPACTER", "bias"): BASE,
    ("REGRAFT_COMPOSABLE_SFT", "weight"): BASE,  # a task's head
    ("REGRAFT_COMPOSABLE_SFT", "bias"): BASE,
}


def is_whole(adapter: Adapter, name: str) -> bool:
    """Whether a tensor is no change but a value, trained and stored whole, so that θ₀ is the base's, if any."""
    place, last = split_key(name)
    saved = any(f".{module}." in f".{place}." for module in adapter.config.get("modules_to_save") or ())
    return saved or adapter.kind in (*TRAINED_BASE, *PROMPTS) or ORIGINS.get((adapter.kind, last), 0.0) is BASE


def origin_of(adapters: Sequence[Adapter], name: str, base: Mapping[str, Tensor] | None) -> Tensor | float | None:
    """θ₀ of a tensor; None where it is the base's and `base`, its tensors by name, does not have it."""
    if any(is_whole(adapter, name) for adapter in adapters):
        return base_value(name, base)
    return ORIGINS.get((adapters[0].kind, split_key(name)[1]), 0.0)


def base_value(name: str, base: Mapping[str, Tensor] | None) -> Tensor | None:
    """The base's own value of what an adapter stores under `name`; None where `base` is not given or lacks it."""
    own = ".".join(part for part in name.removeprefix(PREFIX).split(".") if part not in WRAPPERS)
    return None if base is None else base.get(own)


def merged_values(
    method: MergeMethod, names: Sequence[str], key: str, values: Sequence[Tensor | None], origin: Tensor | float | None
) -> Tensor:
    """One tensor of the result, in the dtype that the adapters' have in common.

    Args:
        method: of merging.
        names: of the adapters.
        key: the tensor's name.
        values: each adapter's; None where it leaves the tensor at its origin.
        origin: θ₀; None where it is not known.

    Raises:
        InvalidInput: shapes differ, θ₀ is needed and not known, or whole numbers differ.
    """
    held = [(name, value) for name, value in zip(names, values, strict=True) if value is not None]
    first_name, first = held[0]
    for name, value in held:
        if value.shape != first.shape:
            raise InvalidInput(
                f"{key} is {tuple(value.shape)} in adapter '{name}', but {tuple(first.shape)} in '{first_name}'.",
                f"{MIGRATE}\n{AS_LORA}",
            )
    alike = len(held) == len(values) and all(torch.equal(value, first) for _, value in held)
    if not all(value.is_floating_point() for _, value in held):
        if alike:
            return first
        raise InvalidInput(
            f"{key}, which holds whole numbers, differs between the adapters: their other tensors do not speak of the "
            "same weights.",
            AS_LORA,
        )
    dtype = common_type(value for _, value in held)
    if origin is None:
        if alike:
            return first
        coefficients = method.coefficients(len(values))
        own = [c for c, value in zip(coefficients or (), values, strict=False) if value is not None]
        if coefficients is None or abs(sum(own) - 1) > 1e-9:
            raise InvalidInput(
                f"{key} is stored whole, and it differs between the adapters: its change is measured from the value "
                "before training, which is not given.",
                "Merge with the base model at hand, or take a mean: weights that sum to one.",
            )
        total = sum(c * value.double() for c, (_, value) in zip(own, held, strict=True))
        return stored(torch.as_tensor(total), dtype, key)
    start = torch.as_tensor(origin).to(first.device).double()
    if start.ndim and start.shape != first.shape:
        raise InvalidInput(f"{key} is {tuple(first.shape)}, but {tuple(start.shape)} in the base.", MIGRATE)
    updates = [torch.zeros_like(first, dtype=torch.float64) if v is None else v.double() - start for v in values]
    return stored(start + method.entries(key, names, torch.stack(updates)), dtype, key)
