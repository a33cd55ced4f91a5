"""The cross-entropy kernel against float64 arithmetic, under Triton's interpreter and natively on CUDA."""

import math
from pathlib import Path

import pytest
import torch

from kernels import cross_entropy as module
from kernels.cross_entropy import cross_entropy, cross_entropy_reference
from kernels.dispatch import interpreted, runs_on_triton, triton_is_there
from tests.kernels.compiled import AMPERE, HOPPER, assembly
from tests.kernels.own_process import printed

GRADIENT_TOLERANCE = {"float32": 2e-6, "bfloat16": 5e-3, "float16": 6e-4}


def assert_close(report: dict[str, object]) -> None:
    assert len(report["cases"]) == 60
    for name, case in report["cases"].items():
        dtype = name.split()[1]
        assert case["kernel"], name
        assert case["reference"] < 2e-4, name
        assert case["loss"] < 2e-4, name  # float32 sums of logits up to ±130
        assert case["gradient"] < GRADIENT_TOLERANCE[dtype], name
    assert report["reuse_is_refused"]  # the gradient has overwritten the logits: a second backward must not be silent
    assert report["expanded"] < 2e-6, "rows that share their memory"
    losses, gradients = report["unknown"]
    assert [math.isnan(value) for value in losses] == [math.isnan(value) for value in gradients]
    assert [math.isnan(value) for value in losses] == [False, True, True, False] and losses[3] == 0


@pytest.mark.skipif(not triton_is_there(), reason="Triton is not installed")
def test_the_interpreted_kernel_agrees_with_float64_over_odd_shapes_and_dtypes() -> None:
    report = printed("interpreted_cross_entropy", "cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert_close(report)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_native_kernel_agrees_with_float64_over_odd_shapes_and_dtypes() -> None:
    report = printed("interpreted_cross_entropy", "cuda")
    assert_close(report)


def test_on_cpu_without_the_interpreter_the_reference_computes() -> None:
    logits = torch.randn(4, 9)
    targets = torch.tensor([0, 8, -100, 3])
    assert not runs_on_triton(logits)
    torch.testing.assert_close(cross_entropy(logits, targets), cross_entropy_reference(logits, targets))
    assert cross_entropy(logits, targets)[2] == 0


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(1, 4, 5), torch.zeros(4).long(), r"not \(1, 4, 5\) of torch.float32"),
        (torch.zeros(4, 0), torch.zeros(4).long(), r"not \(4, 0\)"),
        (torch.zeros(4, 5).long(), torch.zeros(4).long(), "of torch.int64"),
        (torch.zeros(4, 5), torch.zeros(3).long(), r"4 rows need as many int64 targets, not torch.int64 \(3,\)"),
        (torch.zeros(4, 5), torch.zeros(4).int(), "not torch.int32"),
        (torch.zeros(2, 5), torch.tensor([0, 5]), "not among the 5"),
        (torch.zeros(2, 5), torch.tensor([-1, 0]), "not among the 5"),
        (torch.zeros(2, 5), torch.zeros(2, device="meta").long(), "targets are on meta, the logits on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(logits: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, targets)


@pytest.mark.skipif(not triton_is_there() or interpreted(), reason="Triton is not there, or interprets its kernels")
@pytest.mark.parametrize("architecture", [AMPERE, HOPPER])
def test_the_kernels_compile_and_read_sixteen_bytes_at_a_time(architecture: int, tmp_path: Path) -> None:
    types = {"x": "*bf16", "t": "*i64", "loss": "*fp32", "lse": "*fp32", "upstream": "*fp32"}
    for kernel in (module._forward, module._backward):
        assert "ld.global.v4.b32" in assembly(kernel, types, architecture, tmp_path, BLOCK=8192)
        assert assembly(kernel, types, architecture, tmp_path, BLOCK=1, V=1, stride=1)
