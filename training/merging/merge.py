"""The methods by name, and the one way to use them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from infra.documents import did_you_mean, parse
from infra.errors import InvalidInput
from training.merging.adapter import Adapter, Merged, check
from training.merging.dare import Dare
from training.merging.ema import Ema
from training.merging.entries import merge_entries
from training.merging.factors import Factors
from training.merging.linear import Linear, Sum
from training.merging.lora import merge_loras
from training.merging.method import MergeMethod
from training.merging.slerp import Slerp
from training.merging.ties import Ties

METHODS: dict[str, type[MergeMethod]] = {
    "linear": Linear,
    "sum": Sum,
    "ties": Ties,
    "dare": Dare,
    "slerp": Slerp,
    "ema": Ema,
    "factors": Factors,
}


def merge_method(name: str, options: Mapping[str, Any] | None = None) -> MergeMethod:
    """The method called `name` with its `options`, as a person wrote them.

    Raises:
        InvalidInput: no such method, an unknown option, or a value that it cannot have (NaN among them).
    """
    if name not in METHODS:
        raise InvalidInput(f"There is no merging method '{name}'.", did_you_mean(name, list(METHODS)))
    return parse(METHODS[name], dict(options or {}), f"merging by {name}", remedy="See: regraft methods merging")


def merge(
    adapters: Sequence[Adapter],
    method: MergeMethod,
    base: Mapping[str, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """One adapter made of several of the same base model, in float64, stored in the dtype that they have in common.

    A merged LoRA has scale 1 on every layer and loads in stock peft. Modules that are stored whole (modules_to_save,
    biases, heads, fine-tuned models) are changes of the base's own values: with those at hand they merge as the rest;
    without, where the adapters agree on them, or where coefficients sum to one.

    Args:
        adapters: two or more, of one base (`check_bases`), in the order of the method's weights.
        method: of METHODS, with its options.
        base: the base model's own tensors by name, where whole ones need them.
        progress: hears (done, total) of a LoRA's layers.

    Raises:
        InvalidInput: the adapters or the weights do not go together: another number, NaN or infinite values, different
            methods, settings or shapes, DoRA, or whole modules that differ and whose base is not given.
    """
    check(adapters)
    method.coefficients(len(adapters))  # another number of weights is told before anything is read
    if adapters[0].kind == "LORA":
        return merge_loras(adapters, method, base, progress)
    return merge_entries(adapters, method, base)
