"""DoRA's linear layer: kernels and the fast path against float64 autograd of the reference, and against peft."""

from typing import Any

import pytest
import torch
from torch import nn

from kernels.dispatch import triton_is_there
from kernels.dora import fused_dora, row_norms, row_squares
from tests.kernels.interpreted_dora import SHAPES, case
from tests.kernels.interpreted_fused_lora import SCALE, factors
from tests.kernels.own_process import printed
from tests.kernels.packed import DTYPES, assert_close, error, inputs

# Of the largest number; u and what becomes of it are rounded one after the other in 16 bits.
TOLERANCE = {"float32": 4e-6, "bfloat16": 2**-5, "float16": 2**-8, "float64": 1e-13}


def assert_report(report: dict[str, Any]) -> None:
    assert len(report["cases"]) == len(SHAPES) * len(DTYPES)
    for name, result in report["cases"].items():
        assert_close(name, result, TOLERANCE)


@pytest.mark.skipif(not triton_is_there(), reason="Triton is not installed")
def test_the_interpreted_kernels_agree_with_float64_over_odd_shapes_and_dtypes() -> None:
    assert_report(printed("interpreted_dora", "cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_native_kernels_agree_with_float64_over_odd_shapes_and_dtypes() -> None:
    assert_report(printed("interpreted_dora", "cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_cpu_without_the_interpreter_the_fast_path_agrees_with_float64(shape: tuple[int, ...], dtype: str) -> None:
    result = case(shape, dtype, "cpu")
    assert not result.pop("kernel")
    assert_close(f"{shape} {dtype}", result, TOLERANCE)


def test_norms_are_those_of_the_updated_rows_where_it_cancels_them_too() -> None:
    W, _, A, _ = factors(20, 5, 4, torch.float64, "cpu")
    B = W @ torch.linalg.pinv(A)  # BA is what of W lies in A's rows
    cancelled = B @ A
    norms = row_norms(cancelled, row_squares(cancelled), A, B, -1.0)
    assert norms.max() < 1e-7 * cancelled.norm()
    torch.testing.assert_close(
        row_norms(W, row_squares(W), A, B, -1.0), torch.linalg.vector_norm(W - cancelled, dim=1), rtol=1e-10, atol=0
    )


def test_the_norm_is_a_constant_and_no_tokens_give_no_gradient() -> None:
    W, bias, A, B = factors(6, 5, 3, torch.float32, "cpu")
    assert not row_norms(W, row_squares(W), A.requires_grad_(), B.requires_grad_(), SCALE).requires_grad
    magnitude = torch.ones(5, requires_grad=True)
    y = fused_dora(torch.zeros(2, 0, 6), W, bias, A, B, magnitude, SCALE, row_squares(W))
    assert y.shape == (2, 0, 5)
    y.sum().backward()
    assert not any(leaf.grad.any() for leaf in (A, B, magnitude))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_dora_layer_of_peft_computes_the_same_and_drops_the_same(transposed: bool, dropout: float) -> None:
    peft = pytest.importorskip("peft")
    lora, conv = pytest.importorskip("peft.tuners.lora.layer"), pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    base = (conv.Conv1D(24, 40) if transposed else nn.Linear(40, 24)).requires_grad_(False)
    config = peft.LoraConfig(
        r=5, lora_alpha=8, lora_dropout=dropout, use_dora=True, init_lora_weights=False, fan_in_fan_out=transposed
    )
    layer = lora.Linear(base, "default", config, r=5, lora_alpha=8).train()
    magnitude = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        magnitude.mul_(1.3)
        base.bias.normal_()
    leaves = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, magnitude]
    x, g = inputs(30, 40, torch.float32, False).view(3, 10, 40).requires_grad_(), inputs(30, 24, torch.float32, False)
    torch.manual_seed(1)
    theirs = layer(x)
    expected = torch.autograd.grad(theirs, [x, *leaves], g.view(3, 10, 24))
    W = base.weight.T if transposed else base.weight
    torch.manual_seed(1)
    ours = fused_dora(x, W, base.bias, *leaves, layer.scaling["default"], row_squares(W), dropout)
    result = torch.autograd.grad(ours, [x, *leaves], g.view(3, 10, 24))
    for mine, other in zip((ours, *result), (theirs, *expected), strict=True):
        assert error(mine, other.double()) < TOLERANCE["float32"]


def test_what_does_not_fit_is_refused() -> None:
    W, bias, A, B = factors(6, 5, 3, torch.float32, "cpu")
    x, magnitude, squares = inputs(4, 6, torch.float32, False), torch.ones(5), row_squares(W)
    for arguments, message in (
        ((magnitude[:4], SCALE, squares), "as many magnitudes"),
        ((magnitude[:, None], SCALE, squares), "as many magnitudes"),
        ((magnitude, SCALE, squares[:1]), "as many magnitudes"),
        ((magnitude, SCALE, squares, 1.0), "probability below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_dora(x, W, bias, A, B, *arguments)
    with pytest.raises(ValueError, match="which no W"):
        fused_dora(x[:, :5], W, bias, A, B, magnitude, SCALE, squares)
    with pytest.raises(ValueError, match="frozen"):
        fused_dora(x, W, bias.clone().requires_grad_(), A, B, magnitude, SCALE, squares)
