"""Trained columns against float64 arithmetic, and what is refused."""

from typing import Any

import pytest
import torch

from kernels.partial_columns import (
    Columns,
    add_from_columns,
    add_from_columns_reference,
    add_to_columns,
    add_to_columns_reference,
    column_gradient,
    column_gradient_reference,
    gradient_of_picked,
)
from tests.kernels.native_partial_columns import CASES, case, columns, mixed, repeated
from tests.kernels.own_process import printed
from tests.kernels.packed import DTYPES, assert_close

# Of the largest number; what is multiplied in 16 bits is rounded more than once.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-6, "float16": 2**-9, "float64": 1e-14}


def assert_report(report: dict[str, Any]) -> None:
    assert len(report["cases"]) == len(CASES) * len(DTYPES)
    for name, found in report["cases"].items():
        assert_close(name, found, TOLERANCE)
    assert report["others"]["mixed"] < TOLERANCE["bfloat16"]
    assert report["others"]["repeated"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_they_agree_with_float64_over_odd_shapes_and_dtypes() -> None:
    assert_report(printed("native_partial_columns", "cuda"))


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize(("shape", "k"), CASES)
def test_on_the_cpu_they_agree_with_float64(shape: tuple[int, int], k: int, dtype: str) -> None:
    assert_close(f"{shape} {dtype}", case(shape, k, dtype, "cpu"), TOLERANCE)


def test_dtypes_may_differ_and_results_repeat() -> None:
    assert mixed("cpu") < TOLERANCE["bfloat16"]
    assert repeated("cpu") == 0


def test_the_fast_path_is_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    x, g, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 20), (9, 7), (7, 3)))
    chosen = columns(20, 3, "cpu")
    ys, intos = ([torch.ones(9, size, dtype=torch.float64) for _ in range(2)] for size in (7, 20))
    picked = add_from_columns(ys[0], x, B, chosen, 2.0)
    assert torch.equal(picked, add_from_columns_reference(ys[1], x, B, chosen, 2.0))
    torch.testing.assert_close(*ys)
    add_to_columns(intos[0], g, B.T, chosen, 2.0)
    add_to_columns_reference(intos[1], g, B.T, chosen, 2.0)
    torch.testing.assert_close(*intos)
    torch.testing.assert_close(column_gradient(g, x, chosen), column_gradient_reference(g, x, chosen))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([4, 1]), "ascending whole numbers below 5"),
        (torch.tensor([1, 1]), "none of them twice"),
        (torch.tensor([-1, 2]), "ascending"),
        (torch.tensor([3, 5]), "below 5"),
        (torch.tensor([1, 2], dtype=torch.int32), "vector of int64"),
        (torch.tensor([[1, 2]]), "vector of int64"),
    ],
)
def test_what_are_no_columns_is_refused(indices: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Columns(indices, 5)


def test_what_does_not_fit_is_refused_and_stays_as_it_is() -> None:
    chosen = Columns(torch.tensor([1, 3]), 5)
    x, B = torch.randn(4, 5), torch.randn(3, 2)
    for y, left, right, message in (
        (torch.zeros(4, 3), torch.randn(4, 6), B, r"x is \(4, 6\)"),
        (torch.zeros(5, 3), x, B, r"y is \(5, 3\)"),
        (torch.zeros(4, 3), x, B.T, r"B is \(2, 3\), not \(3, 2\)"),
        (torch.zeros(3, 4).T, x, B, "contiguous"),
        (torch.zeros(4, 3, dtype=torch.int32), x, B, "y must be of a floating dtype"),
        (torch.zeros(4, 3), x.to("meta"), B, "x is on meta"),
        (torch.zeros(4, 3), x[0], B, "x is"),
    ):
        with pytest.raises(ValueError, match=message):
            add_from_columns(y, left, right, chosen)
        assert not y.any()
    with pytest.raises(ValueError, match=r"y is \(4, 6\)"):
        add_to_columns(torch.zeros(4, 6), torch.randn(4, 3), B.T, chosen)
    with pytest.raises(ValueError, match=r"B is \(3, 2\), not \(2, 3\)"):
        add_to_columns(torch.zeros(4, 5), torch.randn(4, 3), B, chosen)
    with pytest.raises(ValueError, match="5 columns were planned"):
        column_gradient(torch.randn(4, 3), torch.randn(4, 6), chosen)
    with pytest.raises(ValueError, match="picked features"):
        column_gradient(torch.randn(3, 3), x, chosen)
    with pytest.raises(ValueError, match="float64"):
        gradient_of_picked(torch.randn(4, 3).double(), x, 5)
    for picked, k in ((x, 6), (x[:, :2], 2), (x[:3], 2)):
        with pytest.raises(ValueError, match="picked features"):
            gradient_of_picked(torch.randn(4, 3), picked, k)
