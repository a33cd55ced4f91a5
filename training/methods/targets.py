"""Which linear layers of a model an adapter sits on."""

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.errors import InvalidInput

ALL_LINEAR = "all-linear"
Targets = str | tuple[str, ...]
TARGETS_HELP = (
    "Linear layers to adapt: 'all-linear' (every one but the output embeddings), a list of names or name endings, "
    "or one regular expression over whole names."
)
EXCLUDE_HELP = "Names, or name endings, left out of the targets."


def bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by name; an adapter's layer stands for the base layer that it wraps, with nothing inside."""
    skipped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if skipped and name.startswith(skipped):
            continue
        if isinstance(module, BaseTunerLayer | nn.MultiheadAttention):
            skipped += (f"{name}.",)  # attention of torch's own reads its weights without calling the layer
        yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every `nn.Linear` and `Conv1D` of `model` by name; under an adapter's layer, the base layer that it wraps."""
    return {name: layer for name, layer in bare_modules(model) if isinstance(layer, nn.Linear | Conv1D)}


def convolution_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution of `model` by name, transposed ones left out; under an adapter's layer, the base layer."""
    return {name: layer for name, layer in bare_modules(model) if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)}


def is_norm(layer: nn.Module) -> bool:
    """Whether a module is a normalisation with a weight of its own.

    Told by the class name, which ends in "Norm" or "Norm1d" in torch and transformers alike.
    """
    named = re.search(r"Norm(\dd)?$", type(layer).__name__)
    return named is not None and isinstance(getattr(layer, "weight", None), Tensor)


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every normalisation of `model` that has a weight, by name; under an adapter's layer, the base layer."""
    return {name: layer for name, layer in bare_modules(model) if is_norm(layer)}


def shape(layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer; `Conv1D` stores its weight the other way round."""
    rows, columns = map(int, layer.weight.shape)
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def select(model: nn.Module, targets: Targets, exclude: tuple[str, ...] = ()) -> list[str]:
    """The names of the linear layers that `targets` means, in the model's order.

    Raises:
        InvalidInput: nothing, or one of several names, matches; names the candidates. Or all are excluded, or what is
            not there.
    """
    layers = linear_modules(model)
    if targets == ALL_LINEAR:
        output = output_embeddings(model)
        chosen = [name for name, layer in layers.items() if layer is not output]
    elif isinstance(targets, str):
        chosen = [name for name in layers if _pattern(targets).fullmatch(name)]
    else:
        chosen = [name for name in layers if _ends_with_any(name, targets)]
        unmatched = [target for target in targets if not any(_ends_with_any(name, (target,)) for name in layers)]
        if unmatched:
            raise _no_match(model, layers, unmatched)
    if not chosen:
        raise _no_match(model, layers, targets if isinstance(targets, str) else list(targets))
    check_exclude(model, exclude)
    left = [name for name in chosen if not excluded(name, exclude)]
    if not left:
        raise InvalidInput(f"exclude: {list(exclude)} leaves none of the targets.", "Exclude less, or target more.")
    return left


def select_for_rank(
    model: nn.Module, targets: Targets, exclude: tuple[str, ...], rank: int, directions: int = 1
) -> list[str]:
    """As `select`, of layers that all have room for `rank`.

    Args:
        model: the model.
        targets: as for `select`.
        exclude: as for `select`.
        rank: wanted of every layer.
        directions: how many of a layer's directions one of the rank takes.

    Raises:
        InvalidInput: nothing matches, or a layer that does is too small for the rank.
    """
    names, layers = select(model, targets, exclude), linear_modules(model)
    smallest = min(names, key=lambda name: min(shape(layers[name])))
    size, needed = min(shape(layers[smallest])), rank * directions
    if needed > size:
        raise InvalidInput(
            f"rank {rank} needs layers of {needed} rows and columns or more; {smallest} is "
            f"{' × '.join(map(str, shape(layers[smallest])))}.",
            f"Lower method.rank to {size // directions}, or leave such layers out: method.exclude.",
        )
    return names


def select_with_room(model: nn.Module, targets: Targets, exclude: tuple[str, ...], rank: int) -> list[str]:
    """As `select`, where at least one of the layers has room for `rank`; a small head among them does no harm.

    Raises:
        InvalidInput: nothing matches, or `rank` is more than any of the layers has.
    """
    names, layers = select(model, targets, exclude), linear_modules(model)
    require_room([layers[name] for name in names], rank, "method.rank")
    return names


def require_room(layers: Iterable[nn.Module], rank: int, option: str) -> None:
    """Raise `InvalidInput`, naming the option, where `rank` is more than any of the linear `layers` has."""
    most = max((min(shape(layer)) for layer in layers), default=0)
    if rank > most:
        raise InvalidInput(
            f"rank {rank} is above that of every layer: the largest has {most} rows or columns.",
            f"Lower {option} to {most} or, far better, well below.",
        )


def shortest(model: nn.Module, names: list[str]) -> list[str]:
    """peft's `target_modules` for exactly `names`: a name's last part where that alone decides, else the whole name.

    `["q_proj", "v_proj"]` instead of sixty whole names is what other tools (vLLM) expect to read.
    """
    wanted = set(names)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    others = {
        name.rpartition(".")[2]
        for name, _ in model.named_modules()
        if name not in wanted and not (inside and name.startswith(inside))
    }
    return sorted({last if (last := name.rpartition(".")[2]) not in others else name for name in names})


def _pattern(targets: str) -> re.Pattern[str]:
    try:
        return re.compile(targets)
    except re.error as error:
        raise InvalidInput(
            f"targets: '{targets}' is not a regular expression ({error}).",
            "Names and name endings go in a list: [q_proj, v_proj].",
        ) from None


def check_exclude(model: nn.Module, exclude: tuple[str, ...]) -> None:
    """Raise `InvalidInput` where `exclude` names what the model does not have."""
    names = [name for name, _ in bare_modules(model)]
    for wanted in exclude:
        if not any(_ends_with_any(name, (wanted,)) for name in names):
            near = get_close_matches(wanted, dict.fromkeys(name.rpartition(".")[2] for name in names), n=1)
            raise InvalidInput(
                f"exclude: '{wanted}' is no module of {type(model).__name__}.",
                f"Did you mean {near[0]}?" if near else "Name modules by the ends of their names, like q_proj.",
            )


def excluded(name: str, exclude: tuple[str, ...]) -> bool:
    """Whether `exclude` leaves the module `name` out."""
    return _ends_with_any(name, exclude)


def _ends_with_any(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits of a vocabulary, where the model has one; under an adapter's, the base layer."""
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    return output.get_base_layer() if isinstance(output, BaseTunerLayer) else output


def _no_match(model: nn.Module, layers: dict[str, nn.Module], targets: str | list[str]) -> InvalidInput:
    candidates = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    hints = [f"Linear modules: {', '.join(candidates)}." if candidates else "The model has no linear module."]
    names = [targets] if isinstance(targets, str) else targets
    near = [match for name in names for match in get_close_matches(name.rpartition(".")[2], candidates, n=1)]
    if near:
        meant = ", ".join(dict.fromkeys(near))
        hints.insert(0, f"Did you mean {f'the list [{meant}]' if isinstance(targets, str) else meant}?")
    return InvalidInput(f"targets: {targets!r} matches no module of {type(model).__name__}.", " ".join(hints))
