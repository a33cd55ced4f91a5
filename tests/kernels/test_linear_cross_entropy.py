"""Cross-entropy of a head, kernels and the fast path alike, against PyTorch on all logits in float64."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import logit_entries, logit_tiles
from kernels.cross_entropy import IGNORE
from kernels.dispatch import interpreted, triton_is_there
from kernels.linear_cross_entropy import Head, SoftTargets, linear_cross_entropy, linear_cross_entropy_reference
from tests.kernels.heads import KINDS, Case, compared, error, inputs
from tests.kernels.own_process import printed

# Of the largest number; logits up to 30 are rounded to 8 or 11 bits, as a head's own are.
TOLERANCE = {"float32": 5e-6, "bfloat16": 4e-2, "float16": 4e-3, "float64": 1e-13}
LARGER = (Case(1030, 16, 2500), Case(2100, 8, 1500, bias=True, cap=4.0, soft=(3.0, 0.4)))


def assert_report(report: dict[str, Any]) -> None:
    assert report["kernel"]
    for name, errors in report["cases"].items():
        assert max(errors.values()) < TOLERANCE[name.split()[-1]], (name, errors)


@pytest.mark.skipif(not triton_is_there(), reason="Triton is not installed")
def test_the_interpreted_kernels_agree_with_float64_over_kinds_of_heads_and_dtypes() -> None:
    report = printed("interpreted_linear_cross_entropy", "cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert len(report["cases"]) == 3 * len(KINDS)
    assert_report(report)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_native_kernels_agree_with_float64_over_kinds_of_heads_and_dtypes() -> None:
    report = printed("interpreted_linear_cross_entropy", "cuda")
    assert_report(report)
    assert all(math.isnan(loss) for loss in report["unknown tokens"])
    assert report["captured"] < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", KINDS + LARGER)
def test_without_kernels_loss_and_gradients_are_those_of_all_logits(case: Case, dtype: str) -> None:
    errors = compared(case, dtype, "cpu")
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_a_confident_rows_loss_and_gradient_keep_their_digits() -> None:
    """p = 1 − 1e-12: of float32 logits, softmax − 1 would be 0."""
    hidden, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [27.631021]])
    loss = linear_cross_entropy(hidden, Head(weight), torch.tensor([1]))
    loss.backward()
    rest = math.exp(-weight[1].item())
    assert loss.item() == pytest.approx(rest, rel=1e-5)
    assert hidden.grad.item() == pytest.approx(-rest * weight[1].item(), rel=1e-5)


def test_huge_logits_overflow_nothing() -> None:
    hidden, weight = torch.tensor([[100.0], [-100.0]], requires_grad=True), torch.tensor([[-300.0], [0.0], [300.0]])
    loss = linear_cross_entropy(hidden, Head(weight), torch.tensor([0, 0]))
    assert loss.tolist() == [60_000.0, 0.0]
    loss.sum().backward()
    assert hidden.grad.tolist() == [[600.0], [0.0]]


def test_nan_is_not_lost() -> None:
    hidden = torch.zeros(2, 3)
    hidden[1, 1] = torch.nan
    loss = linear_cross_entropy(hidden, Head(torch.randn(5, 3)), torch.tensor([0, 0]))
    assert loss.isfinite().tolist() == [True, False]


def test_a_teacher_of_all_tokens_is_kl_divergence_as_pytorch_has_it() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(*s, generator=generator) for s in ((6, 8), (30, 8), (6, 30)))
    logits, tokens = teacher.topk(30, dim=-1)
    found = linear_cross_entropy(hidden, Head(weight), torch.zeros(6).long(), SoftTargets(tokens, logits, 2.5, 1.0))
    student = (hidden @ weight.T / 2.5).log_softmax(-1)
    divergence = functional.kl_div(student, (teacher / 2.5).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found, 2.5**2 * divergence, rtol=1e-5, atol=1e-5)


def test_a_graph_that_is_kept_gives_its_gradients_twice() -> None:
    tensors, targets, soft, _ = inputs(KINDS[2], torch.float32, "cpu")
    leaves = [tensor.requires_grad_() for tensor in tensors]
    loss = linear_cross_entropy(leaves[0], Head(*leaves[1:]), targets, soft).sum()
    first, second = (torch.autograd.grad(2 * loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_what_is_frozen_gets_no_gradient_and_what_is_trained_does() -> None:
    tensors, targets, _, _ = inputs(KINDS[1], torch.float32, "cpu")
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    head = Head(exact[1], exact[2], 0.5, 3.0)
    expected = torch.autograd.grad(linear_cross_entropy_reference(exact[0], head, targets).sum(), exact)
    for trained in ((0,), (1,), (2,), (0, 2)):
        leaves = [tensor.detach().requires_grad_(number in trained) for number, tensor in enumerate(tensors)]
        linear_cross_entropy(leaves[0], Head(leaves[1], leaves[2], 0.5, 3.0), targets).sum().backward()
        for number, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (number in trained)
            assert leaf.grad is None or error(leaf.grad, expected[number]) < TOLERANCE["float32"]


def test_under_autocast_its_dtype_is_computed_in() -> None:
    tensors, targets, _, _ = inputs(KINDS[0], torch.float32, "cpu")
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_cross_entropy(leaves[0], Head(leaves[1]), targets)
    rounded.sum().backward()
    expected = linear_cross_entropy(leaves[0].bfloat16(), Head(leaves[1].bfloat16()), targets)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, expected)
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


class Sizes(TorchDispatchMode):
    """Notes how many elements the largest storage has that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, list | tuple) else (outputs,):
            if isinstance(output, Tensor):
                self.largest = max(self.largest, output.untyped_storage().nbytes() // output.element_size())
        return outputs


@pytest.mark.parametrize("soft", [None, (2.0, 0.5)])
def test_logits_are_never_in_memory_together(soft: tuple[float, float] | None) -> None:
    case = Case(1500, 4, 6000, soft=soft)
    tensors, targets, teacher, _ = inputs(case, torch.float32, "cpu")
    for loss, all_logits in ((linear_cross_entropy, False), (linear_cross_entropy_reference, True)):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with Sizes() as sizes:
            loss(leaves[0], Head(leaves[1]), targets, teacher).sum().backward()
        assert (sizes.largest >= case.rows * case.vocabulary) == all_logits
        assert all_logits or sizes.largest <= 2 * 1024**2


def test_the_frozen_heads_gradient_is_never_made() -> None:
    case = Case(3, 500, 5000)
    tensors, targets, _, _ = inputs(case, torch.float32, "cpu")
    hidden = tensors[0].requires_grad_()
    head = Head(tensors[1])
    with Sizes() as sizes:
        linear_cross_entropy(hidden, head, targets).sum().backward()
    weights = tensors[1].numel()
    assert sizes.largest == weights  # the head's own storage, of which pieces are taken
    with Sizes() as sizes:
        linear_cross_entropy(hidden.detach(), Head(tensors[1][:10]), targets.clamp(max=9)).sum()
    assert sizes.largest == weights


GOOD = {"hidden": torch.ones(2, 3), "head": Head(torch.ones(5, 3)), "targets": torch.tensor([0, IGNORE])}
TEACHER = SoftTargets(torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2), 1.0, 0.5)


def teacher(**changed: Any) -> SoftTargets:
    return SoftTargets(**{**vars(TEACHER), **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda: {"hidden": torch.ones(2, 4)}, "do not fit a head"),
        (lambda: {"hidden": torch.ones(2, 3, 1)}, "do not fit a head"),
        (lambda: {"hidden": torch.ones(2, 3, dtype=torch.int64)}, "floating-point"),
        (lambda: {"hidden": torch.ones(2, 3).bfloat16()}, "weight is torch.float32"),
        (lambda: {"head": Head(torch.ones(5, 3), torch.ones(4))}, "another bias"),
        (lambda: {"head": Head(torch.ones(0, 3))}, "none at all"),
        (lambda: {"head": Head(torch.ones(5, 3), torch.ones(5).double())}, "bias is torch.float64"),
        (lambda: {"head": Head(torch.ones(3, 5).T)}, "contiguous"),
        (lambda: {"head": Head(torch.ones(5, 3), scale=0.0)}, "positive"),
        (lambda: {"head": Head(torch.ones(5, 3), cap=-1.0)}, "positive"),
        (lambda: {"head": Head(torch.ones(5, 3, device="meta"))}, "on meta"),
        (lambda: {"targets": torch.tensor([0])}, "as many int64 targets"),
        (lambda: {"targets": torch.tensor([0, 1]).int()}, "as many int64 targets"),
        (lambda: {"targets": torch.tensor([0, 5])}, "not among the 5"),
        (lambda: {"targets": torch.tensor([-1, 0])}, "not among the 5"),
        (lambda: {"soft": teacher(tokens=torch.tensor([[0, 1], [2, 5]]))}, "not among the 5"),
        (lambda: {"soft": teacher(tokens=torch.tensor([[0, 1]]))}, "as many rows"),
        (lambda: {"soft": teacher(logits=torch.ones(2, 3))}, "each has a logit"),
        (lambda: {"soft": teacher(tokens=TEACHER.tokens[:, :0], logits=TEACHER.logits[:, :0])}, "as many rows"),
        (lambda: {"soft": teacher(temperature=0.0)}, "make no loss"),
        (lambda: {"soft": teacher(weight=1.5)}, "make no loss"),
    ],
)
def test_bad_input_is_refused(changed: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**GOOD, **changed()})


def test_good_input_is_not() -> None:
    assert linear_cross_entropy(**GOOD, soft=TEACHER)[1] == 0


SIXTEEN = ("tile", "hidden", "weight", "gradient")
INTEGERS = ("targets", "tokens")
FLOATS = ("m", "s", "sums", "logits", "at_target", "lse", "upstream", "products", "of_teacher")
NUMBERS = ("scale", "cap", "rate", "second_rate", "share", "second_share", "hard")


def ptx(kernel: Any, folder: Path, **constants: int) -> str:
    """Of a kernel in bfloat16 for an H100, whose pointers and counts are divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = (
        dict.fromkeys(SIXTEEN, "*bf16")
        | dict.fromkeys(INTEGERS, "*i64")
        | dict.fromkeys(FLOATS, "*fp32")
        | dict.fromkeys(NUMBERS, "fp32")
    )
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = [name for name, kind in signature.items() if kind.startswith("*") or kind == "i32"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    return compiled.asm["ptx"]


@pytest.mark.skipif(not triton_is_there() or interpreted(), reason="Triton is not there, or interprets its kernels")
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("terms", [1, 2])
def test_kernels_compile_and_move_sixteen_bytes_at_a_time(terms: int, capped: bool, tmp_path: Path) -> None:
    shape = {"CAPPED": capped, "TERMS": terms, "BLOCK": 4096}
    seen = ptx(logit_tiles._online, tmp_path, **shape, GRADIENT=True, STEP=1024)
    made = ptx(logit_tiles._differentiate, tmp_path, **shape)
    for code in (seen, made):
        assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code
        assert "ld.local" not in code and "st.local" not in code  # nothing is spilled
    assert ptx(logit_tiles._online, tmp_path, **shape, GRADIENT=False, STEP=1024)
    assert ptx(logit_tiles._online, tmp_path, **shape, GRADIENT=True, STEP=1024, columns=1, width=1, s_plane=1)


@pytest.mark.skipif(not triton_is_there() or interpreted(), reason="Triton is not there, or interprets its kernels")
def test_kernels_of_single_tokens_compile_where_a_count_is_one(tmp_path: Path) -> None:
    for entries in ({}, {"entries": 1}, {"entries": 1, "width": 1, "vocabulary": 1}):
        assert ptx(logit_entries._dot_entries, tmp_path, BLOCK=1024, **entries)
        for taught in (False, True):
            shape = {"BLOCK": 1024, "TERMS": 1 + taught, "CAPPED": taught, "TAUGHT": taught}
            assert ptx(logit_entries._sum_up, tmp_path, **shape, **entries)
