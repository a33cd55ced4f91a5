"""Grids for groups: no number is further than half a step from its own."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.training.compression.adapters import DTYPES, numbers
from training.compression import compress, container, decompress


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(("normal", "uniform", "heavy", "shifted", "constant", "ternary")),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from((2, 4, 8)),
    symmetric=st.booleans(),
    length=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    size=st.sampled_from((0.02, 1e-5, 100.0)),
)
def test_no_number_moves_by_more_than_half_a_step(
    kind: str, dtype: torch.dtype, bits: int, symmetric: bool, length: int, seed: int, size: float
) -> None:
    assume(dtype != torch.float16 or size > 1e-4)  # whose own numbers are as far apart as such a grid's
    tensor = numbers(kind, (length,), dtype, seed, size)
    line = f"groups:bits={bits},size=32,symmetric={str(symmetric).lower()}"
    found = decompress(compress({"a": tensor}, line))["a"]
    own = torch.finfo(dtype).eps if dtype != torch.float64 else torch.finfo(torch.float32).eps
    for x, q in zip(tensor.double().split(32), found.double().split(32), strict=True):
        low, high = float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
        step = max(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 2)
        smallest = 2.0**-24 if dtype == torch.float16 else 0.0  # a step of float16 is no finer than float16
        allowed = (0.5 + 2**-9) * step + smallest / 2 + 1.5 * own * x.abs()
        assert ((x - q).abs() <= allowed).all(), float(((x - q).abs() - allowed).max())


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_a_group_uses_its_whole_grid(symmetric: str) -> None:
    tensor = torch.linspace(-1, 3, 64)
    found = decompress(compress({"a": tensor}, f"groups:bits=4,symmetric={symmetric}"))["a"]
    assert len(found.unique()) == (10 if symmetric == "true" else 16)
    assert float(found.max()) == pytest.approx(3, rel=1e-3)
    assert (found == 0).any()


@pytest.mark.parametrize(("bits", "symmetric", "size"), [(4, "true", 64), (8, "false", 8), (2, "true", 32)])
def test_a_tensor_takes_codes_scales_and_zero_points(bits: int, symmetric: str, size: int) -> None:
    tensor = numbers("normal", (31, 7), torch.float32, 0)
    line = f"groups:bits={bits},symmetric={symmetric},size={size}"
    (packed,) = container.read(compress({"a": tensor}, line)).tensors
    groups = -(-217 // size)
    assert len(packed.content) == -(-217 * bits // 8) + groups * (2 if symmetric == "true" else 3)


def test_large_and_small_groups_in_one_tensor() -> None:
    tensor = torch.cat([numbers("normal", (64,), torch.float32, n, 10.0**-n) for n in range(4)])
    found = decompress(compress({"a": tensor}, "groups:bits=8"))["a"]
    for x, q in zip(tensor.split(64), found.split(64), strict=True):
        torch.testing.assert_close(q, x, atol=float(x.abs().max()) / 250, rtol=0)
