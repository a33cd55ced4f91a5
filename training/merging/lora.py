"""Merging LoRAs: each layer's factors with their scale, and a LoRA of scale 1 that stock peft loads.

    ΔW = sBA,    s = α/r, or α/√r with `use_rslora`; r and α by layer where rank_pattern and alpha_pattern say so

Ranks may differ from layer to layer and from adapter to adapter; a layer that an adapter leaves alone is no change.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from infra.errors import InvalidInput
from training.low_rank import LowRank
from training.merging.adapter import MIGRATE, Adapter, Deviation, Merged, common_type, stored
from training.merging.linear import Linear
from training.merging.method import MergeMethod
from training.merging.origin import base_value, merged_values
from training.methods.injected import PREFIX
from training.methods.lora import PLAIN_STARTS

SIDES = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
DEFAULT = 8  # peft's r and α
MORE_THAN_FACTORS = (  # with these of peft's options the update is not s·BA of one weight
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "target_parameters",
    "layer_replication",
)

Progress = Callable[[int, int], None]


class LoraFactors:
    """Where the factors of one LoRA are.

    Attributes:
        names: of A and B, by layer.
        whole: the tensors that are no factors, by name: modules and biases of the base's own.

    Raises:
        InvalidInput: it is more than factors.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.names: dict[str, tuple[str, str]] = {}
        for side_A, side_B in SIDES:
            for name in adapter.tensors:
                place, _, side = name.rpartition(f".{side_A}")
                if place and not side:
                    self.names[place.removeprefix(PREFIX)] = (name, f"{place}.{side_B}")
        paired = {name for pair in self.names.values() for name in pair}
        self._check(paired)
        self.whole = {name: tensor for name, tensor in adapter.tensors.items() if name not in paired}

    def _check(self, paired: set[str]) -> None:
        config, name = self.adapter.config, self.adapter.name
        if config.get("use_dora") or any("lora_magnitude_vector" in key for key in self.adapter.tensors):
            raise InvalidInput(
                f"Adapter '{name}' is a DoRA: its magnitudes scale the base's own weights and cannot be added up.",
                "Fold it into its base, or train a LoRA in its place: regraft export NAME@VERSION DIRECTORY --merged",
            )
        start = config.get("init_lora_weights", True)
        if start not in PLAIN_STARTS:
            raise InvalidInput(
                f"Adapter '{name}' stands on a base that peft has changed (init_lora_weights: {start}).",
                "Convert it to a plain LoRA: peft's save_pretrained(path_initial_model_for_weight_conversion=…).",
            )
        if special := next((option for option in MORE_THAN_FACTORS if config.get(option)), None):
            raise InvalidInput(
                f"Adapter '{name}' is more than pairs of factors ({special}).", "Merge adapters trained without it."
            )
        if absent := next((key for key in sorted(paired) if key not in self.adapter.tensors), None):
            raise InvalidInput(f"Adapter '{name}' lacks {absent}.", "Was it saved whole?")
        if odd := next((key for key in self.adapter.tensors if "lora_" in key and key not in paired), None):
            raise InvalidInput(f"Adapter '{name}' holds {odd}, which is no factor.", "Is it a plain LoRA?")
        for key_A, key_B in self.names.values():
            A, B = self.adapter.tensors[key_A], self.adapter.tensors[key_B]
            if A.ndim < 2 or B.ndim < 2 or A.shape[0] != B.shape[1]:
                raise InvalidInput(
                    f"Adapter '{name}': {key_A} {tuple(A.shape)} and {key_B} {tuple(B.shape)} are no pair.",
                    "Was it saved whole?",
                )

    def pair(self, place: str) -> tuple[Tensor, Tensor] | None:
        """A [r, n, …] and B [m, r, …] as stored; None where the adapter leaves the layer alone."""
        if place not in self.names:
            return None
        key_A, key_B = self.names[place]
        return self.adapter.tensors[key_A], self.adapter.tensors[key_B]

    def scale(self, place: str) -> float:
        """s.

        Raises:
            InvalidInput: adapter_config.json says another rank than the tensors have.
        """
        config, pair = self.adapter.config, self.pair(place)
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        rank = ranks.get(get_pattern_key(ranks.keys(), place), config.get("r", DEFAULT))
        alpha = alphas.get(get_pattern_key(alphas.keys(), place), config.get("lora_alpha", DEFAULT))
        if pair is not None and len(pair[0]) != rank:
            raise InvalidInput(
                f"Adapter '{self.adapter.name}' is of rank {len(pair[0])} at {place}, but its adapter_config.json says "
                f"{rank}.",
                "Restore the directory from where it was copied.",
            )
        return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)

    def update(self, place: str, like: tuple[Tensor, Tensor]) -> LowRank:
        """ΔW of a layer as a matrix, whose factors have the shapes of `like`, but for the rank."""
        pair = self.pair(place)
        if pair is None:
            A, B = (factor.flatten(1).double() for factor in like)
            return LowRank(A[:0], B[:, :0])
        A, B = (factor.double() for factor in pair)
        return LowRank(self.scale(place) * A.flatten(1), B.flatten(1))


def merge_loras(
    adapters: Sequence[Adapter],
    method: MergeMethod,
    base: Mapping[str, Tensor] | None,
    progress: Progress | None = None,
) -> Merged:
    """The merged LoRA; see `merge`."""
    sources = [LoraFactors(adapter) for adapter in adapters]
    names = [adapter.name for adapter in adapters]
    places = list(dict.fromkeys(place for source in sources for place in source.names))
    whole = list(dict.fromkeys(name for source in sources for name in source.whole))
    _check_together(sources, places, whole)
    tensors: dict[str, Tensor] = {}
    ranks, deviations, errors, norms = {}, {}, [], []
    for done, place in enumerate(places):
        holders = [source for source in sources if place in source.names]
        A, B = like = next(pair for source in holders if (pair := source.pair(place)))
        part = method.low_rank(place, names, [source.update(place, like) for source in sources])
        dtype = common_type(factor for source in holders for factor in source.pair(place) or ())
        key_A, key_B = holders[0].names[place]
        tensors[key_A] = stored(part.update.A.reshape(-1, *A.shape[1:]), dtype, key_A)
        tensors[key_B] = stored(part.update.B.reshape(len(B), -1, *B.shape[2:]), dtype, key_B)
        ranks[place] = part.update.rank
        deviations[place] = _relative(part.error, part.norm)
        errors.append(part.error)
        norms.append(part.norm)
        if progress:
            progress(done + 1, len(places))
    for name in whole:
        values = [source.whole.get(name) for source in sources]
        tensors[name] = merged_values(method, names, name, values, base_value(name, base))
    overall = _relative(math.hypot(*errors), math.hypot(*norms))
    content = lora_content([adapter.config for adapter in adapters], ranks)
    return Merged("merged", content, tensors, Deviation(deviations, overall))


def cut(adapter: Adapter, rank: int | None, energy: float | None) -> Merged:
    """One LoRA at a lower rank: its best approximation, of scale 1 on every layer."""
    return merge_loras([adapter], Linear(weights=(1.0,), rank=rank, energy=energy), None)


def lora_content(configs: Sequence[Mapping[str, Any]], ranks: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json of a LoRA on the layers of `ranks`, of scale 1 on each: α = r.

    Args:
        configs: of the merged adapters; what else it says is the first one's.
        ranks: by layer.
    """
    rank = max(ranks.values())
    others = {place: own for place, own in ranks.items() if own != rank}
    saved = sorted({name for config in configs for name in config.get("modules_to_save") or ()})
    return dict(configs[0]) | {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": _targets(configs, list(ranks)),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": saved or None,
    }


def _relative(error: float, norm: float) -> float:
    if norm:
        return error / norm
    return math.inf if error else 0.0


def _targets(configs: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[str]:
    """What all of them together name, where they name nothing but ends of names; else every layer's whole name."""
    targets = [config.get("target_modules") for config in configs]
    narrowed = any(config.get(key) for config in configs for key in ("exclude_modules", "layers_pattern"))
    narrowed |= any(config.get("layers_to_transform") not in (None, []) for config in configs)
    if narrowed or not all(isinstance(each, list | set | tuple) for each in targets):
        return sorted(places)
    return sorted({name for each in targets for name in each or ()})


def _check_together(sources: Sequence[LoraFactors], places: Sequence[str], whole: Sequence[str]) -> None:
    """Raise `InvalidInput` unless the LoRAs are of one architecture and leave the rest of the base alike."""
    first = sources[0].adapter
    if not places:
        raise InvalidInput(f"Adapter '{first.name}' holds no factors of a LoRA.", "Was it saved whole?")
    for source in sources:
        kinds = (first.config.get("bias") or "none", source.adapter.config.get("bias") or "none")
        if kinds[0] != kinds[1]:
            raise InvalidInput(
                f"Adapter '{first.name}' trains biases '{kinds[0]}', adapter '{source.adapter.name}' '{kinds[1]}'.",
                "Merge adapters that were trained alike in this.",
            )
    for place in places:
        seen: tuple[str, tuple[torch.Size, ...]] | None = None
        for source in sources:
            if (pair := source.pair(place)) is None:
                continue
            A, B = pair
            shapes = (A.shape[1:], B.shape[:1] + B.shape[2:])
            if seen is not None and shapes != seen[1]:
                raise InvalidInput(
                    f"{place} is another layer in '{source.adapter.name}' than in '{seen[0]}': "
                    f"inputs {tuple(shapes[0])}, outputs {tuple(shapes[1])}, not {tuple(seen[1][0])}, "
                    f"{tuple(seen[1][1])}.",
                    MIGRATE,
                )
            seen = (source.adapter.name, shapes)
            if any(name.removeprefix(PREFIX) == f"{place}.weight" for name in whole):
                raise InvalidInput(
                    f"{place} is adapted by '{source.adapter.name}' and stored whole by another adapter.",
                    "Merge adapters that were trained alike in this.",
                )
