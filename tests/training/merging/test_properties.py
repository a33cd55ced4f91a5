"""What holds for every merge, whatever the adapters: order, names of dtypes, zeros, single and no entries, NaN."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from infra.errors import InvalidInput
from tests.training.merging.adapters import PREFIX, lora, updates, vectors
from training.merging.adapter import Adapter, Merged
from training.merging.merge import merge, merge_method

WEIGHTED: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"scale": -0.5}),
    ("ties", {"density": 0.4}),
    ("ties", {"density": 0.7, "vote": "frequency"}),
    ("dare", {"density": 0.5, "seed": 3}),
    ("dare", {"density": 0.8, "vote": "mass", "scale": 2.0}),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [("sum", {"scale": 0.5}), ("ema", {"momentum": 0.3}), ("slerp", {"t": 0.3})]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PLACES = {"layers.0.q_proj": (4, 3), "layers.1.q_proj": (4, 3), "layers.1.up": (5, 1), "layers.1.down": (1, 1)}
SHAPES = {"matrix": (4, 3), "vector": (5,), "one": (1,), "none": (0,), "flat": (3, 0), "scalar": ()}
FULL = {"rank": 5}  # nothing is cut off

weights = st.lists(st.floats(-2, 2).map(lambda w: round(w, 3)), min_size=3, max_size=3)
quick = settings(max_examples=8, deadline=None)


def dense(merged: Adapter) -> dict[str, Tensor]:
    return updates(merged) if merged.kind == "LORA" else dict(merged.tensors)


def three(kind: str, seed: int, dtype: torch.dtype = torch.float32) -> list[Adapter]:
    """LoRAs of mixed ranks, one of them on fewer layers; or adapters of equal tensors."""
    if kind == "lora":
        few = {place: PLACES[place] for place in ("layers.0.q_proj", "layers.1.up")}
        return [
            lora("a", seed, rank=2, shapes=PLACES, dtype=dtype),
            lora("b", seed + 1, rank=1, alpha=3, shapes=few, dtype=dtype),
            lora("c", seed + 2, rank=3, shapes=PLACES, dtype=dtype, use_rslora=True),
        ]
    found = [vectors(name, seed + number, SHAPES) for number, name in enumerate("abc")]
    return [Adapter(a.name, a.config, {key: tensor.to(dtype) for key, tensor in a.tensors.items()}) for a in found]


def merged(name: str, options: dict[str, Any], adapters: Sequence[Adapter]) -> Merged:
    return merge(adapters, merge_method(name, options | (FULL if adapters[0].kind == "LORA" else {})))


@pytest.mark.parametrize("kind", ["lora", "vectors"])
@pytest.mark.parametrize("name, options", WEIGHTED)
@quick
@given(seed=st.integers(0, 10_000), w=weights, order=st.permutations(range(3)))
def test_the_order_of_adapters_with_their_weights_is_nothing(
    kind: str, name: str, options: dict[str, Any], seed: int, w: list[float], order: list[int]
) -> None:
    adapters = three(kind, seed)
    one = merged(name, options | {"weights": w}, adapters)
    other = merged(name, options | {"weights": [w[p] for p in order]}, [adapters[p] for p in order])
    assert_close(dense(one), dense(other), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["lora", "vectors"])
@pytest.mark.parametrize("name, options", [*WEIGHTED, *OTHERS])
@quick
@given(seed=st.integers(0, 10_000), draw=st.randoms(use_true_random=False))
def test_the_order_of_tensors_is_nothing(kind: str, name: str, options: dict[str, Any], seed: int, draw: Any) -> None:
    adapters = three(kind, seed)[: 2 if name == "slerp" else 3]
    shuffled = []
    for adapter in adapters:
        keys = list(adapter.tensors)
        draw.shuffle(keys)
        shuffled.append(Adapter(adapter.name, adapter.config, {key: adapter.tensors[key] for key in keys}))
    one, other = merged(name, options, adapters), merged(name, options, shuffled)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)


@quick
@given(seed=st.integers(0, 10_000), t=st.floats(0, 1), momentum=st.floats(0, 1))
@pytest.mark.parametrize("kind", ["lora", "vectors"])
def test_an_arc_goes_both_ways_and_older_ones_have_no_order(kind: str, seed: int, t: float, momentum: float) -> None:
    a, b, c = three(kind, seed)
    there, back = merged("slerp", {"t": t}, [a, b]), merged("slerp", {"t": 1 - t}, [b, a])
    assert_close(dense(there), dense(back), rtol=1e-5, atol=2e-5)
    one, other = (merged("ema", {"momentum": momentum}, each) for each in ([a, b, c], [b, a, c]))
    assert_close(dense(one), dense(other), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["lora", "vectors"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, options", [*WEIGHTED, *OTHERS])
def test_the_result_is_that_of_float32_rounded(kind: str, dtype: torch.dtype, name: str, options: Any) -> None:
    adapters = three(kind, 0, dtype)[: 2 if name == "slerp" else 3]
    exact = [Adapter(a.name, a.config, {key: t.float() for key, t in a.tensors.items()}) for a in adapters]
    one, other = merged(name, options, adapters), merged(name, options, exact)
    assert {tensor.dtype for tensor in one.tensors.values()} == {dtype}
    size = max(float(t.abs().max()) for t in dense(other).values() if t.numel())
    for key, tensor in dense(other).items():
        assert_close(dense(one)[key].double(), tensor.double(), rtol=0, atol=12 * torch.finfo(dtype).eps * size)


@pytest.mark.parametrize("kind", ["lora", "vectors"])
@pytest.mark.parametrize("name, options", [*WEIGHTED, *OTHERS])
def test_zeros_merge_to_zeros(kind: str, name: str, options: dict[str, Any]) -> None:
    adapters = three(kind, 0)[: 2 if name == "slerp" else 3]
    zeros = [Adapter(a.name, a.config, {k: torch.zeros_like(t) for k, t in a.tensors.items()}) for a in adapters]
    made = merged(name, options, zeros)
    assert not any(tensor.any() for tensor in dense(made).values())
    assert made.deviation.overall == 0
    halves = [
        Adapter(a.name, a.config, {k: t * 0 if "lora_B" in k else t for k, t in a.tensors.items()}) for a in adapters
    ]
    if kind == "lora":  # as LoRAs are before training
        assert max(float(tensor.abs().max()) for tensor in dense(merged(name, options, halves)).values()) == 0


@pytest.mark.parametrize("kind", ["lora", "vectors"])
@pytest.mark.parametrize("name, options", [*WEIGHTED, *OTHERS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named(kind: str, name: str, options: dict[str, Any], bad: float) -> None:
    adapters = three(kind, 0)[: 2 if name == "slerp" else 3]
    key = f"{PREFIX}layers.1.up.lora_B.weight" if kind == "lora" else "vector"
    broken = adapters[1].tensors[key].clone()
    broken.view(-1)[-1] = bad
    adapters[1] = Adapter("b", adapters[1].config, {**adapters[1].tensors, key: broken})
    with pytest.raises(InvalidInput, match=rf"'b' holds NaN or infinite values in {key}\."):
        merged(name, options, adapters)


@quick
@given(seed=st.integers(0, 10_000), w=weights, rank=st.integers(1, 4))
def test_a_lower_rank_is_told_truly(seed: int, w: list[float], rank: int) -> None:
    adapters = three("lora", seed)
    whole = updates(merge(adapters, merge_method("linear", {"weights": w})))
    cut = merge(adapters, merge_method("linear", {"weights": w, "rank": rank}))
    for place, update in updates(cut).items():
        assert torch.linalg.matrix_rank(update, rtol=1e-5) <= rank
        off = float((update - whole[place]).norm())
        assert off == pytest.approx(cut.deviation.by_place[place] * float(whole[place].norm()), abs=1e-4)


@quick
@given(seed=st.integers(0, 10_000), w=weights)
def test_the_inputs_stay_as_they_were(seed: int, w: list[float]) -> None:
    for kind in ("lora", "vectors"):
        adapters, before = three(kind, seed), three(kind, seed)
        for name, options in WEIGHTED:
            merged(name, options | {"weights": w}, adapters)
        for adapter, same in zip(adapters, before, strict=True):
            assert adapter.config == same.config
            assert all(torch.equal(adapter.tensors[key], same.tensors[key]) for key in same.tensors)
