"""Sparse changes of a weight: kernels and the fast path against float64 arithmetic, what is kept, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import sparse_delta
from kernels.dispatch import interpreted, triton_is_there
from kernels.sparse_delta import (
    add_sparse_product,
    blocked_gradient,
    sampled_gradient,
    sparse_gradient,
    sparse_gradient_reference,
    sparse_linear,
    sparse_linear_reference,
    summed,
)
from kernels.sparse_plan import BLOCK, planned
from tests.kernels.compiled import AMPERE, HOPPER, assembly
from tests.kernels.interpreted_sparse_delta import CASES, case, layer, parts_of_tokens, repeated, sparse
from tests.kernels.own_process import printed
from tests.kernels.packed import DTYPES, assert_close

# Of the largest number; results in 16 bits are rounded once or twice, by the interpreter towards 0.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-6, "float16": 2**-9, "float64": 1e-6}


def assert_report(report: dict[str, Any]) -> None:
    assert len(report["cases"]) == len(CASES) * len(DTYPES)
    for name, found in report["cases"].items():
        assert_close(name, found, TOLERANCE)
    assert len(report["others"]) == 4
    for name, value in report["others"].items():
        assert value < TOLERANCE["float32"], name


@pytest.mark.skipif(not triton_is_there(), reason="Triton is not installed")
def test_the_interpreted_kernels_agree_with_float64_over_odd_shapes_and_dtypes() -> None:
    assert_report(printed("interpreted_sparse_delta", "cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_native_kernels_agree_with_float64_over_odd_shapes_and_dtypes() -> None:
    assert_report(printed("interpreted_sparse_delta", "cuda"))


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize(("shape", "k"), CASES)
def test_on_cpu_without_the_interpreter_the_fast_path_agrees_with_float64(
    shape: tuple[int, int], k: int, dtype: str
) -> None:
    found = case(shape, k, dtype, "cpu")
    assert not found.pop("kernel")
    assert_close(f"{shape} {dtype}", found, TOLERANCE)


def test_the_fast_path_goes_both_ways_and_repeats() -> None:
    for found in (parts_of_tokens("cpu"), repeated("cpu"), layer(1, "cpu"), layer(100, "cpu")):
        assert found < TOLERANCE["float32"]


@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_derivatives_are_those_by_differences(tokens: int, transposed: bool) -> None:
    m, n, k = 6, 7, 9
    indices, values, _ = sparse((m, n), k, "cpu")
    plan = planned(indices, (m, n))
    W, b, x = (torch.randn(shape, dtype=torch.float64) for shape in ((m, n), (m,), (tokens, n)))
    if transposed:
        b, x = torch.randn(n, dtype=torch.float64), torch.randn(tokens, m, dtype=torch.float64)
    given = tuple(tensor.requires_grad_() for tensor in (x, values.double(), b))
    assert torch.autograd.gradcheck(lambda x, v, b: sparse_linear(x, v, W, plan, b, transposed), given)
    S = torch.zeros(m * n, dtype=torch.float64).index_put((indices.long(),), given[1]).view(m, n)
    expected = x @ (W + S) + b if transposed else x @ (W + S).T + b
    torch.testing.assert_close(sparse_linear(x, given[1], W, plan, b, transposed), expected)


def test_the_fast_path_is_the_reference() -> None:
    indices, values, _ = sparse((20, 30), 40, "cpu")
    plan, generator = planned(indices, (20, 30)), torch.Generator().manual_seed(0)
    g, x, W = (torch.randn(shape, generator=generator).double() for shape in ((9, 20), (9, 30), (20, 30)))
    expected = sparse_gradient_reference(g, x, plan)
    for way in (sparse_gradient, sampled_gradient, blocked_gradient):
        torch.testing.assert_close(way(g, x, plan), expected)
    torch.testing.assert_close(sparse_linear(x, values, W, plan), sparse_linear_reference(x, values, W, plan))


def test_blocks_of_rows_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK, "cpu", 70)  # two rows of 30
    indices, _, _ = sparse((9, 30), 60, "cpu")
    plan = planned(indices, (9, 30))
    assert len(plan.bounds) == 6
    g, x = torch.randn(5, 9).double(), torch.randn(5, 30).double()
    torch.testing.assert_close(blocked_gradient(g, x, plan), (g.T @ x).view(-1)[indices.long()])


class Sizes(TorchDispatchMode):
    """How many elements the largest result of an operation had."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.layout == torch.strided and not result._is_view():
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_no_gradient_of_the_weight_is_ever_in_memory(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK, "cpu", 4096)
    m, n, tokens = 256, 256, 8
    plan = planned(torch.randperm(m * n)[: int(share * m * n)], (m, n))
    g, x = torch.randn(tokens, m), torch.randn(tokens, n)
    with Sizes() as seen:
        sparse_gradient(g, x, plan)
    assert seen.largest <= max(len(plan.order), 4096, tokens * n)
    with Sizes() as seen:
        (g.T @ x).view(-1)[plan.order]
    assert seen.largest == m * n


def test_of_a_layer_nothing_dense_is_kept() -> None:
    indices, values, _ = sparse((64, 64), 40, "cpu")
    W, x, kept = torch.randn(64, 64), torch.randn(200, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sparse_linear(x, values.requires_grad_(), W, planned(indices, (64, 64)))
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in (W, x, values)}


def test_a_weight_in_16_bits_is_added_to_in_float32() -> None:
    indices, values, S = sparse((20, 30), 40, "cpu")
    W = torch.randn(20, 30).bfloat16()
    assert torch.equal(summed(W, values, planned(indices, (20, 30))), (W.float() + S.float()).bfloat16())


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 15]), r"outside of a matrix 3 × 5: they are 0 to 15"),
        (torch.tensor([-1, 3]), "outside"),
        (torch.tensor([4, 2, 4]), "twice"),
        (torch.tensor([1.0]), "vector of int32 or int64"),
        (torch.tensor([[1]]), "vector of int32 or int64"),
    ],
)
def test_what_are_no_places_is_refused(indices: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(indices, (3, 5))


def test_inputs_that_do_not_fit_are_refused_before_anything_is_computed() -> None:
    plan = planned(torch.tensor([7, 2]), (3, 5))
    g, x, W, values = torch.randn(2, 3), torch.randn(2, 5), torch.randn(3, 5), torch.randn(2)
    for wrong, message in (
        ((g, torch.randn(2, 4)), "needs 5 columns"),
        ((g, torch.randn(3, 5)), "no two sides"),
        ((torch.randn(2, 4), x), "no two sides"),
        ((g[0], x[0]), "no two sides"),
        ((g.double(), x), "One side is torch.float64"),
        ((g.long(), x.long()), "floating dtype"),
        ((g, x.to("meta")), "x is on meta"),
    ):
        for way in (sampled_gradient, blocked_gradient):
            with pytest.raises(ValueError, match=message):
                way(*wrong, plan)
    y = torch.zeros(2, 3)
    for left, right, message in (
        (torch.zeros(3, 2).T, values, "contiguous"),
        (y, torch.randn(3), "Values must be 2"),
        (y, torch.ones(2, dtype=torch.int64), "Values must be 2 of a floating dtype"),
        (y, values.to("meta"), "values on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            add_sparse_product(left, x, right, plan)
    assert not y.any()
    with pytest.raises(ValueError, match=r"the weight is \(5, 3\)"):
        sparse_linear(x, values, W.T, plan)
    for weight, bias, message in (
        (W.long(), None, "weight must be of a floating dtype, not torch.int64"),
        (W.to("meta"), None, "the weight on meta"),
        (W, torch.randn(1), r"The bias is \(1,\); 3 outputs"),
        (W, torch.randn(5), r"The bias is \(5,\); 3 outputs"),
        (W, torch.ones(3, dtype=torch.int64), "bias must be of a floating dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_linear(x, values, weight, plan, bias)
    with pytest.raises(ValueError, match="needs 5 columns"):
        sparse_linear(torch.tensor(1.0), values, W, plan)
    with pytest.raises(ValueError, match="needs 3 columns"):
        sparse_linear(x, values, W, plan, transposed=True)


@pytest.mark.skipif(not triton_is_there() or interpreted(), reason="Triton is not installed, or interprets its kernels")
@pytest.mark.parametrize("architecture", [AMPERE, HOPPER])
@pytest.mark.parametrize("number", ["bf16", "fp16", "fp32"])
def test_the_kernels_compile_and_read_tokens_sixteen_bytes_at_a_time(
    number: str, architecture: int, tmp_path: Path
) -> None:
    types = dict.fromkeys(("g", "x", "y"), f"*{number}") | dict.fromkeys(("rows", "columns", "starts"), "*i32")
    types |= {"out": "*fp32", "values": "*fp32", "order": "*i64"}
    sampled = assembly(sparse_delta._sample, types, architecture, tmp_path, ENTRIES=16, TOKENS=128)
    assert "ld.global.v4.b32" in sampled
    for tokens in (1, 64):
        sizes = {"ROWS": 16, "ENTRIES": 256 // tokens, "TOKENS": tokens}
        assert "st.global" in assembly(sparse_delta._add_product, types, architecture, tmp_path, **sizes)
    assert assembly(sparse_delta._sample, types, architecture, tmp_path, ENTRIES=16, TOKENS=128, k=1)
    types["out"] = types["x"]
    assert "st.shared" in assembly(sparse_delta._transpose, types, architecture, tmp_path, TILE=64, x_step=1)
