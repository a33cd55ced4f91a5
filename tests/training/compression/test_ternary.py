"""Arithmetic on bit masks is exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.compression.adapters import numbers
from training.compression import compress, decompress
from training.compression.compeft import masks
from training.compression.ternary import PIECE, Ternary


def vector(length: int, density: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.choice([-1, 0, 1], length, p=[density / 2, 1 - density, density / 2])


def ternary(values: np.ndarray) -> Ternary:
    nonzero, negative = (np.packbits(mask, bitorder="little") for mask in (values != 0, values < 0))
    return Ternary(len(values), nonzero, negative)


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, 400), density=st.sampled_from((0, 0.05, 0.5, 1)), seed=st.integers(0, 2**32))
def test_the_dot_product_is_that_of_the_dense_vectors(length: int, density: float, seed: int) -> None:
    one, other = vector(length, density, seed), vector(length, 0.4, seed + 1)
    assert ternary(one).dot(ternary(other)) == int(one @ other)
    assert ternary(one).count == int(np.count_nonzero(one))
    assert ternary(one).is_sound()


def test_vectors_of_several_pieces() -> None:
    length = 8 * PIECE * 2 + 4321
    one, other = vector(length, 0.3, 0), vector(length, 0.3, 1)
    assert ternary(one).dot(ternary(other)) == int(one @ other)
    tensor = torch.ones(length)
    ternary(one).add_to(tensor, 0.5)
    assert torch.equal(tensor, 1 + 0.5 * torch.from_numpy(one).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_added_to_a_dense_tensor_in_place(dtype: torch.dtype) -> None:
    values = vector(35, 0.5, 0)
    tensor = numbers("normal", (5, 7), dtype, 0)
    expected = tensor + (torch.from_numpy(values).to(dtype) * 0.25).reshape(5, 7)
    ternary(values).add_to(tensor, 0.25)
    assert torch.equal(tensor, expected)


def test_masks_of_a_file_are_its_tensors_without_decoding() -> None:
    tensors = {name: numbers("normal", (31, 17), torch.float32, seed) for seed, name in enumerate("abc")}
    data = compress(tensors, "compeft:layout=bitmask,density=0.2")
    scale, found = masks(data)
    decoded = decompress(data)
    for name, mask in found.items():
        tensor = torch.zeros(31, 17)
        mask.add_to(tensor, scale)
        assert torch.equal(tensor, decoded[name])
        assert len(mask.nonzero) == len(mask.negative) == -(-31 * 17 // 8)
    one, other = (decoded[name].double().flatten() / scale for name in "ab")
    assert found["a"].dot(found["b"]) == int(one @ other)


def test_vectors_that_do_not_fit_are_refused() -> None:
    one, other = ternary(vector(5, 0.5, 0)), ternary(vector(6, 0.5, 0))
    with pytest.raises(ValueError, match="5 and 6"):
        one.dot(other)
    with pytest.raises(ValueError, match="5 entries, the tensor 6"):
        one.add_to(torch.zeros(6), 1.0)


def test_masks_that_contradict_each_other_are_not_sound() -> None:
    assert not Ternary(8, np.array([1], np.uint8), np.array([2], np.uint8)).is_sound()
    assert not Ternary(7, np.array([128], np.uint8), np.array([0], np.uint8)).is_sound()
    assert not Ternary(9, np.array([1], np.uint8), np.array([1], np.uint8)).is_sound()
