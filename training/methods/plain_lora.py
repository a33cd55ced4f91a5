"""Adapters whose update is of low rank, written as a plain LoRA: what peft, vLLM and every other tool reads."""

import copy
from collections.abc import Iterator, Mapping
from math import isclose
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.errors import InvalidInput
from infra.files import require_free
from training.methods.contract import Adapted, origin, write_stored
from training.methods.injected import PREFIX, InjectedAdapted, base_of, matrix
from training.methods.peft_method import PeftAdapted, bare
from training.methods.targets import linear_modules, shortest

Pair = tuple[Tensor, Tensor]  # A [r, n], B [m, r]


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
        lora_alpha=plain_number(scale * rank),
        lora_dropout=dropout,
        target_modules=shortest(model, list(ranks)),
        rank_pattern=others,
        alpha_pattern={name: plain_number(scale * own) for name, own in others.items()},
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
    """Write an adapter, whatever its own format, as a plain LoRA; one that is stored as a LoRA goes out as it is.

    Regraft's own methods of low rank give their factors. Of those that peft brings, each layer's change of weight is
    decomposed, and taken where the factors that equal it to float32's precision are smaller than the weight.

    Raises:
        InvalidInput: the update is not of low rank, or more than a change of linear layers' weights.
        Conflict: the directory holds something, or is none.
    """
    require_free(directory)
    stored = adapted.adapter_config()
    if stored.get("peft_type") == "LORA" and not stored.get("use_dora"):
        adapted.save(directory)
        return
    pairs = low_rank_pairs(adapted)
    tensors = {
        f"{PREFIX}{place}.lora_{side}.weight": factor.float()
        for place, pair in pairs.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    ranks = {place: len(A) for place, (A, _) in pairs.items()}
    model = bare(adapted.model)
    write_stored(directory, {"peft_type": "LORA", **origin(model), **lora_config(model, ranks, scale=1.0)}, tensors)


def low_rank_pairs(adapted: Adapted) -> dict[str, Pair]:
    """A [r, n] and B [m, r] of every layer that the adapter changes, by its name, with ΔW = BA.

    Raises:
        InvalidInput: the update is not of low rank, or more than a change of linear layers' weights.
    """
    if isinstance(adapted, InjectedAdapted):
        pairs = dict(_pairs_of_slots(adapted))
    elif isinstance(adapted, PeftAdapted):
        pairs = dict(_pairs_of_peft(adapted))
    else:
        raise _unwritable(
            adapted,
            "it trains the base's own weights",
            "Export it --to merged; of that, regraft import --rank R makes the LoRA that is nearest.",
        )
    if not pairs:
        raise _unwritable(adapted, "it changes no weight of a linear layer")
    return pairs


def _pairs_of_slots(adapted: InjectedAdapted) -> Iterator[tuple[str, Pair]]:
    """A [r, n] and B [m, r] of every adapted layer, as its slot gives them."""
    for place, slot in adapted.slots().items():
        if not hasattr(slot, "low_rank"):
            raise _unwritable(adapted, "its method's update is not one of low rank")
        layer: Any = base_of(adapted.model.get_submodule(place))
        weight, bias = matrix(layer), None if layer.bias is None else layer.bias.detach().float()
        shift = slot.shift(weight, bias)
        if shift is not None and torch.count_nonzero(shift):
            raise _unwritable(adapted, f"it also changes the bias of {place}")
        yield place, slot.low_rank(weight)


def _pairs_of_peft(adapted: PeftAdapted) -> Iterator[tuple[str, Pair]]:
    """A [r, n] and B [m, r] of every layer whose weight peft, merging in float64, changes."""
    for place, module in bare(adapted.model).named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise _unwritable(adapted, f"it holds {place} whole")
        if not isinstance(module, BaseTunerLayer):
            continue
        twin: Any = copy.deepcopy(module).double()
        layer = twin.get_base_layer()
        if not isinstance(layer, nn.Linear | Conv1D):
            raise _unwritable(adapted, f"it changes {place}, which is no linear layer")
        weight, bias = matrix(layer).clone(), None if layer.bias is None else layer.bias.detach().clone()
        twin.merge(adapter_names=[adapted.name])
        if bias is not None and not torch.equal(layer.bias, bias):
            raise _unwritable(adapted, f"it also changes the bias of {place}")
        pair = decomposed(matrix(layer) - weight)
        if pair is None:
            raise _unwritable(adapted, f"its update of {place} is not of low rank")
        if len(pair[0]):
            yield place, pair


def decomposed(update: Tensor) -> Pair | None:
    """A [r, n] and B [m, r] of the lowest rank with BA = ΔW [m, n] to float32's precision, in ΔW's own dtype.

    None where they would be no smaller than ΔW itself, r(m + n) ≥ mn. What is tried is the range that ΔW spans on
    random directions (Halko et al., arXiv 0909.4061), twice as many each time: a low rank is found at its own cost.
    """
    m, n = update.shape
    norm = torch.linalg.matrix_norm(update)
    tolerance = 8 * torch.finfo(torch.float32).eps * norm
    most = (m * n - 1) // (m + n)
    generator = torch.Generator(update.device).manual_seed(0)
    tried = 32
    while True:
        tried = min(tried, most)
        directions = torch.randn(n, tried, generator=generator, dtype=update.dtype, device=update.device)
        basis = torch.linalg.qr(update @ directions).Q
        inner = basis.T @ update
        if torch.linalg.matrix_norm(update - basis @ inner) <= tolerance:
            break
        if tried == most:
            return None
        tried *= 2
    U, S, Vh = torch.linalg.svd(inner, full_matrices=False)
    left_out = S.flip(0).square().cumsum(0).sqrt().flip(0)  # by the rank that would leave it out
    rank = int((left_out > tolerance).sum())
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], basis @ U[:, :rank] * root


_CUT = "Cut it down to a LoRA: --rank R tells what that loses. Or export it as it is, or --to merged."


def _unwritable(adapted: Adapted, why: str, remedy: str = _CUT) -> InvalidInput:
    return InvalidInput(f"Adapter '{adapted.name}' cannot be written as a plain LoRA: {why}.", remedy)


def plain_number(number: float) -> float:
    """As an integer, which other tools expect of an α, where it is one."""
    return round(number) if isclose(number, round(number), rel_tol=1e-12) else number
