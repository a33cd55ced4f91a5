"""Packed codes, decoded and applied: kernels, the fast path and the reference against float64 arithmetic."""

from typing import Any

import pytest
import torch

from kernels.codebook import (
    WIDTHS,
    PackedCodes,
    add_binary_product,
    apply_binary,
    apply_binary_reference,
    decode_codes,
    decode_codes_reference,
)
from kernels.dispatch import triton_is_there
from tests.kernels.interpreted_codebook import HIGH, LOW, case, gradient
from tests.kernels.own_process import printed
from tests.kernels.packed import DTYPES, SHAPES, assert_close, codes, inputs

# Of the largest number; products in 16 bits are rounded once or twice, by the interpreter towards 0 in bfloat16.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-6, "float16": 2**-9, "float64": 1e-14}


def assert_report(report: dict[str, Any]) -> None:
    assert len(report["cases"]) == len(SHAPES) * len(DTYPES)
    for name, found in report["cases"].items():
        assert_close(name, found, TOLERANCE)
    assert len(report["others"]) == 2
    for name, value in report["others"].items():
        assert value < TOLERANCE["float32"], name


@pytest.mark.skipif(not triton_is_there(), reason="Triton is not installed")
def test_the_interpreted_kernels_agree_with_float64_over_odd_shapes_and_dtypes() -> None:
    assert_report(printed("interpreted_codebook", "cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_native_kernels_agree_with_float64_over_odd_shapes_and_dtypes() -> None:
    assert_report(printed("interpreted_codebook", "cuda"))


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_cpu_without_the_interpreter_the_fast_path_agrees_with_float64(shape: tuple[int, int], dtype: str) -> None:
    found = case(shape, dtype, "cpu")
    assert not found.pop("kernel")
    assert_close(f"{shape} {dtype}", found, TOLERANCE)


def test_a_gradient_flows_through_the_fast_path() -> None:
    assert gradient("cpu") < TOLERANCE["float32"]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1,), (5, 7), (3, 4, 9), (), (0,), (3, 100_001)])
def test_the_reference_is_bit_for_bit_what_is_decoded_in_any_shape(shape: tuple[int, ...], bits: int) -> None:
    packed, exact = codes(shape, bits, bits)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        values = inputs(1, 2**bits, dtype, True)[0]
        assert torch.equal(decode_codes_reference(packed, values), values[exact])
        assert torch.equal(decode_codes(packed, values), values[exact])


def test_the_reference_applies_what_it_decodes() -> None:
    packed, exact = codes((6, 11), 1, 0)
    x = inputs(3, 11, torch.float64, False)
    expected = x @ (LOW + (HIGH - LOW) * exact.double()).T
    torch.testing.assert_close(apply_binary_reference(x, packed, LOW, HIGH), expected)


def content(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("shape", "bits", "stored", "message"),
    [
        ((3, 5), 1, content(1), "2 bytes long, not 1"),
        ((3, 5), 4, content(*range(9)), "8 bytes long, not 9"),
        ((3, 5), 3, content(*range(6)), "1, 2, 4 or 8 bits, not 3"),
        ((1, 8), 1, content(1).int(), "vector of uint8"),
        ((1, 8), 1, content(1)[None], "vector of uint8"),
        ((2, 8), 1, content(1, 2, 3, 4)[::2], "contiguous"),
        ((-1, 8), 1, content(), "No tensor is of shape"),
    ],
)
def test_codes_that_cannot_be_of_a_tensor_are_refused(
    shape: tuple[int, ...], bits: int, stored: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PackedCodes(shape, bits, stored)


def test_inputs_that_do_not_fit_are_refused_before_anything_is_computed() -> None:
    packed, _ = codes((3, 5), 1, 0)
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"need 2 levels, not \(3,\)"):
        decode_codes(packed, torch.ones(3))
    with pytest.raises(ValueError, match="needs 5 columns"):
        apply_binary(torch.randn(2, 4), packed, LOW, HIGH)
    with pytest.raises(ValueError, match="x is on meta"):
        apply_binary(torch.empty(2, 5, device="meta"), packed, LOW, HIGH)
    with pytest.raises(ValueError, match="floating dtype"):
        apply_binary(torch.ones(2, 5, dtype=torch.int32), packed, LOW, HIGH)
    with pytest.raises(ValueError, match="these have 4: decode them"):
        apply_binary(x, codes((3, 5), 4, 0)[0], LOW, HIGH)
    with pytest.raises(ValueError, match="no number"):
        apply_binary(x, packed, float("nan"), HIGH)
    for wrong, message in (
        (torch.zeros(2, 4), r"y is \(2, 4\)"),
        (torch.zeros(2, 3, dtype=torch.float16), "y is torch.float16"),
        (torch.zeros(3, 2).T, "contiguous"),
        (torch.zeros(2, 3, requires_grad=True), "no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            add_binary_product(wrong, x, packed, LOW, HIGH)
        assert not wrong.any()
