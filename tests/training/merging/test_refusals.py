"""What cannot be merged is refused by name, with what to do instead."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from infra.errors import BaseModelMismatch, InvalidInput
from tests.training.merging.adapters import PREFIX, lora, vectors
from training.merging.adapter import Adapter, check_bases
from training.merging.linear import Linear
from training.merging.merge import METHODS, merge, merge_method

A, B = lora("a", 0), lora("b", 1)
Q = f"{PREFIX}model.layers.0.q_proj"


def changed(tensors: Mapping[str, Any] | None = None, **config: Any) -> Adapter:
    return Adapter("b", {**B.config, **config}, {**B.tensors, **(tensors or {})})


def with_value(name: str, value: float) -> Adapter:
    tensor = B.tensors[name].clone()
    tensor[0, 0] = value
    return changed({name: tensor})


CASES: dict[str, tuple[Callable[[], Adapter], str]] = {
    "twice": (lambda: A, "Adapter 'a' is given twice"),
    "other method": (lambda: vectors("b", 1, {"x": (3,)}, kind="IA3"), r"'a' \(LORA\) and 'b' \(IA3\)"),
    "no tensors": (lambda: Adapter("b", B.config, {}), "'b' holds no tensors"),
    "nan": (lambda: with_value(f"{Q}.lora_A.weight", float("nan")), rf"'b' holds NaN .*{Q}\.lora_A\.weight"),
    "infinite": (lambda: with_value(f"{Q}.lora_B.weight", float("-inf")), rf"'b' holds NaN .*{Q}\.lora_B\.weight"),
    "dora": (lambda: changed(use_dora=True), "'b' is a DoRA"),
    "magnitudes": (lambda: changed({f"{Q}.lora_magnitude_vector": torch.ones(6)}), "'b' is a DoRA"),
    "changed base": (lambda: changed(init_lora_weights="pissa"), r"'b' stands on a base .*pissa"),
    "bias of B": (lambda: changed(lora_bias=True), r"'b' is more than pairs of factors \(lora_bias\)"),
    "odd tensor": (lambda: changed({f"{Q}.lora_C.weight": torch.ones(6)}), r"lora_C\.weight, which is no factor"),
    "trained biases": (lambda: changed(bias="all"), "'a' trains biases 'none', adapter 'b' 'all'"),
    "half a pair": (
        lambda: Adapter("b", B.config, {f"{Q}.lora_A.weight": B.tensors[f"{Q}.lora_A.weight"]}),
        rf"'b' lacks {Q}\.lora_B\.weight",
    ),
    "no pair": (lambda: changed({f"{Q}.lora_A.weight": torch.ones(3, 5)}), "are no pair"),
    "other rank": (lambda: changed(r=4), "'b' is of rank 2 at .* says 4"),
    "other base": (lambda: lora("b", 1, shapes={"model.layers.0.q_proj": (8, 5)}), "another layer in 'b' than in 'a'"),
    "adapted and whole": (
        lambda: Adapter("b", {**B.config, "modules_to_save": ["q_proj"]}, {f"{Q}.weight": torch.ones(6, 5)}),
        "adapted by 'a' and stored whole",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "factors"])
def test_it_is_refused_whatever_the_method(case: str, method: str) -> None:
    make, message = CASES[case]
    with pytest.raises(InvalidInput, match=message) as caught:
        merge([A, make()], merge_method(method))
    assert caught.value.remedy


def test_another_base_is_told_to_migrate() -> None:
    with pytest.raises(InvalidInput, match="regraft migrate NAME@VERSION --to BASE"):
        merge([A, CASES["other base"][0]()], Linear())


@pytest.mark.parametrize("adapters", [[], [A]])
def test_one_adapter_is_no_merge(adapters: list[Adapter]) -> None:
    with pytest.raises(InvalidInput, match=f"two adapters or more, not {len(adapters)}"):
        merge(adapters, Linear())


@pytest.mark.parametrize("name", ["linear", "ties", "dare", "factors"])
def test_weights_are_one_for_each(name: str) -> None:
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(InvalidInput, match=f"{len(weights)} weights are given for 2 adapters"):
            merge([A, B], merge_method(name, {"weights": weights}))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match="weights"):
            merge_method(name, {"weights": [1.0, bad]})


def test_slerp_is_of_two() -> None:
    for adapters in ([A, B, lora("c", 2)], [vectors(name, 0, {"x": (3,)}) for name in "abc"]):
        with pytest.raises(InvalidInput, match="'slerp' merges two adapters, not 3"):
            merge(adapters, merge_method("slerp"))


def test_factors_are_of_loras_of_one_rank() -> None:
    with pytest.raises(InvalidInput, match="different ranks"):
        merge([A, lora("c", 2, rank=3)], merge_method("factors"))
    with pytest.raises(InvalidInput, match="x has none"):
        merge([vectors(name, 0, {"x": (3,)}) for name in "ab"], merge_method("factors"))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("tias", {}, "Did you mean 'ties'"),
        ("ties", {"densty": 0.5}, "density"),
        ("ties", {"density": 0}, "density"),
        ("ties", {"vote": "loud"}, "vote"),
        ("dare", {"seed": -1}, "seed"),
        ("slerp", {"t": 1.5}, "t"),
        ("linear", {"rank": 0}, "rank"),
        ("ema", {"momentum": True}, "momentum"),
    ],
)
def test_options_are_told_what_is_wrong_with_them(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        merge_method(name, options)


def test_what_float16_cannot_hold_is_not_stored() -> None:
    adapters = [lora(name, seed, dtype=torch.float16) for seed, name in enumerate("ab")]
    with pytest.raises(InvalidInput, match="too large for float16"):
        merge(adapters, Linear(weights=(1e5, 1e5)))


def test_bases_are_told_apart_by_identity() -> None:
    check_bases({"a": "x", "b": "x", "c": None})
    with pytest.raises(BaseModelMismatch, match="'a' and 'c'"):
        check_bases({"a": "x", "b": None, "c": "y"})


def test_every_method_and_option_is_described() -> None:
    for name, method in METHODS.items():
        assert method.title and method.paper, name
        assert all(field.description for field in method.model_fields.values()), name
