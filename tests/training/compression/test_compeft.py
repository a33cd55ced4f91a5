"""ComPEFT: one threshold over all tensors, three values, signs of the task vector, and files as small as the theory."""

import math
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import InvalidInput
from tests.training.compression.adapters import DTYPES, adapters, numbers, same
from training.compression import compress, container, decompress, rice
from training.compression.compeft import masks
from training.compression.largest import Choice, survey


def joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def lora(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        f"layer.{n}.lora_{side}.weight": numbers(kind, shape, dtype, n, size)
        for n in range(3)
        for side, kind, shape, size in (("A", "uniform", (8, 129), 0.05), ("B", "heavy", (77, 8), 0.002))
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [1 / 9999, 1 / 4944, 0.05, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("layout", ["golomb", "bitmask"])
def test_three_values_the_right_number_and_the_right_signs(dtype: torch.dtype, density: float, layout: str) -> None:
    tensors = lora(dtype)
    tau = joined(tensors)
    found = joined(decompress(compress(tensors, f"compeft:density={density},alpha=2,layout={layout}")))
    wanted = int(Fraction(repr(density)) * len(tau))
    kept = found != 0
    assert int(kept.sum()) == min(wanted, int((tau != 0).sum()))
    assert torch.equal(found[kept].sign(), tau[kept].sign())
    assert len(found[kept].abs().unique()) <= 1
    if kept.any():
        assert float(found.abs().max()) == pytest.approx(2 * float(tau.std()), rel=2**-8), "s has 16 bits"
        assert float(tau[kept].abs().min()) >= float(tau[~kept].abs().max() if not kept.all() else 0), "one threshold"


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 300),
    share=st.floats(0, 1),
    coarse=st.booleans(),
    width=st.integers(1, 100),
)
def test_the_largest_are_those_of_a_stable_sort(seed: int, length: int, share: float, coarse: bool, width: int) -> None:
    numbers_ = np.random.default_rng(seed).standard_normal(length).astype(np.float32)
    numbers_ = (numbers_ * 4).round() if coarse else numbers_  # many ties and zeros
    wanted = int(share * length)

    def pieces() -> list[np.ndarray]:
        return [numbers_[begin : begin + width] for begin in range(0, length, width)]

    found = survey(pieces, wanted)
    choice = Choice(found)
    chosen = np.concatenate([choice.among(piece) for piece in pieces()])
    order = np.argsort(-np.abs(numbers_), kind="stable")[:wanted]
    assert set(np.flatnonzero(chosen)) == {place for place in order if numbers_[place] != 0}
    if length > 1:
        assert found.deviation == pytest.approx(float(numbers_.astype(np.float64).std(ddof=1)), abs=1e-12)


class Watched(np.ndarray):
    """Numbers that note what is done with them."""

    asked: ClassVar[list[str]] = []

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        self.asked.append(ufunc.__name__)
        inputs = tuple(each.view(np.ndarray) if isinstance(each, Watched) else each for each in inputs)
        if "out" in options:
            options["out"] = tuple(each.view(np.ndarray) for each in options["out"])
        found = getattr(ufunc, method)(*inputs, **options)
        return found.view(Watched) if isinstance(found, np.ndarray) else found


def test_the_survey_asks_nothing_of_a_blas_whose_threads_wait_for_one_another() -> None:
    numbers_ = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    found = survey(lambda: [numbers_.view(Watched)], 50)
    assert found == survey(lambda: [numbers_], 50)
    assert "subtract" in Watched.asked and "matmul" not in Watched.asked


def test_of_ties_the_first_are_kept_in_the_order_of_names() -> None:
    tensors = {"b": torch.tensor([1.0, -1, 1]), "a": torch.tensor([-1.0, 0.5, 1])}
    found = decompress(compress(tensors, "compeft:density=0.5"))
    assert found["a"].sign().tolist() == [-1, 0, 1] and found["b"].sign().tolist() == [1, 0, 0]


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_the_stream_is_as_long_as_the_formula_says(density: float) -> None:
    tensors = {name: numbers("normal", (600, 301), torch.bfloat16, seed) for seed, name in enumerate("abc")}
    elements = 3 * 600 * 301
    size = sum(
        len(packed.content) for packed in container.read(compress(tensors, f"compeft:density={density}")).tensors
    )
    assert 8 * (size + 2) == pytest.approx(rice.expected_bits(density, elements), rel=0.03)
    assert 8 * (size + 2) >= rice.entropy_bits(density, elements)
    if density == 0.05:
        assert 2 * elements / size >= 40


def test_masks_take_two_bits_an_entry() -> None:
    held = container.read(compress(lora(), "compeft:layout=bitmask"))
    assert all(len(packed.content) == 2 * math.ceil(packed.elements / 8) for packed in held.tensors)


def test_ia3_is_measured_from_one() -> None:
    tensors = {"l": 1 + numbers("normal", (50,), torch.float32, 0), "b": numbers("normal", (9, 9), torch.float32, 1)}
    found = decompress(compress(tensors, "compeft:density=0.2", origins={"l": 1.0}))
    tau = torch.cat([tensors["b"].flatten(), tensors["l"] - 1])
    change = torch.cat([found["b"].flatten(), found["l"] - 1])
    kept = change.abs() > 1e-6
    assert int(kept.sum()) == 131 // 5
    assert torch.equal(change[kept].sign(), tau[kept].sign())
    assert change[kept].abs().mean() == pytest.approx(float(tau.std()), rel=2**-8)
    assert (found["l"] == 1).sum() > 30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["golomb", "bitmask"])
def test_a_full_fine_tune_is_measured_from_the_base(dtype: torch.dtype, layout: str) -> None:
    base = {name: numbers("normal", (40, 30), dtype, seed, 1.0) for seed, name in enumerate("ab")}
    tuned = {
        name: (t.double() + numbers("normal", (40, 30), torch.float64, 7, 0.05)).to(dtype) for name, t in base.items()
    }
    line = f"compeft:density=0.1,layout={layout}"
    data = compress(tuned, line, origins=base)
    found = decompress(data, base)
    changed = sum(int((found[name] != base[name]).sum()) for name in base)
    assert 200 <= changed <= 240
    assert same(decompress(compress(found, line, origins=base), base), found), "and comes back bit for bit"
    with pytest.raises(InvalidInput, match="difference from a base"):
        decompress(data)
    with pytest.raises(InvalidInput, match="another tensor"):
        decompress(data, {name: tensor + 1 for name, tensor in base.items()})
    with pytest.raises(InvalidInput, match="its origin"):
        decompress(data, {name: tensor[:3] for name, tensor in base.items()})
    with pytest.raises(InvalidInput, match="its origin"):
        compress(tuned, line, origins={"a": base["a"].T})


@settings(max_examples=40, deadline=None)
@given(tensors=adapters(), alpha=st.sampled_from((0.5, 1.0, 3.0)), start=st.sampled_from((1.0, 0.1, -3.0)))
def test_from_any_origin_it_comes_back_bit_for_bit(tensors: dict[str, Tensor], alpha: float, start: float) -> None:
    line, origins = f"compeft:density=0.2,alpha={alpha}", dict.fromkeys(tensors, start)
    once = decompress(compress(tensors, line, origins=origins))
    assert same(decompress(compress(once, line, origins=origins)), once)


def test_the_deviation_is_that_of_all_entries_before_pruning() -> None:
    tensors = {"a": numbers("shifted", (1000,), torch.float32, 0, 1.0)}
    scale, _ = masks(compress(tensors, "compeft:density=0.3,layout=bitmask"))
    assert scale == pytest.approx(float(tensors["a"].std()), rel=2**-8)


def test_a_scale_that_overflows_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"too large a number for torch\.float16"):
        compress({"a": torch.tensor([-6e4, 6e4, 1], dtype=torch.float16)}, "compeft:density=1,alpha=10")


def test_masks_are_of_that_layout_only() -> None:
    with pytest.raises(InvalidInput, match="layout=bitmask"):
        masks(compress(lora(), "compeft"))
    assert masks(compress({}, "compeft:layout=bitmask")) == (0.0, {})
