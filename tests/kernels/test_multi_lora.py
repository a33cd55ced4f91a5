"""Mixed batches of LoRAs: kernels, the fast path and the reference against float64 arithmetic, and peft's own."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels import multi_lora
from kernels.batch_plan import FEW, MANY, Tiling, cut_batch, plan_batch, replan
from kernels.dispatch import interpreted, triton_is_there
from kernels.multi_lora import add_multi_lora, multi_lora_reference
from kernels.page_pool import Lora, PagePool
from tests.kernels.adapters import DTYPES, expected, lora, scattered_pool
from tests.kernels.interpreted_multi_lora import CASES, RANKS, SHAPES, WHOLE, again, case, mixed, replanned, together
from tests.kernels.own_process import printed
from tests.kernels.packed import assert_close, error, inputs

# Of the largest number, which is rounded once, by the interpreter towards 0 in bfloat16.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10, "float64": 1e-14}


def assert_report(report: dict[str, Any]) -> None:
    assert len(report["cases"]) == len(CASES) == 9
    for name, found in report["cases"].items():
        assert_close(name, found, TOLERANCE)
    assert report["others"]["again"]
    assert max(report["others"]["replanned"], report["others"]["captured"]) < TOLERANCE["float32"]
    assert report["others"]["together"]["same bits"] and report["others"]["together"]["error"] < TOLERANCE["float32"]
    for said, message in zip(
        report["others"]["refusals"],
        (
            "room for 1 blocks, 1 rows with an adapter and rank 16; the batch needs 3, 1 and 48",
            "the batch needs 2, 2 and 16",
            "room for 2 blocks, 1 rows with an adapter and rank 32; the batch needs 3, 1 and 48",
        ),
        strict=True,
    ):
        assert message in said


@pytest.mark.skipif(not triton_is_there(), reason="Triton is not installed")
def test_the_interpreted_kernels_agree_with_float64_over_odd_shapes_and_dtypes() -> None:
    assert_report(printed("interpreted_multi_lora", "cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_native_kernels_agree_with_float64_over_odd_shapes_and_dtypes() -> None:
    assert_report(printed("interpreted_multi_lora", "cuda"))


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("shape", [WHOLE, *SHAPES])
def test_on_cpu_without_the_interpreter_the_fast_path_agrees_with_float64(
    shape: tuple[int, int, int], dtype: str
) -> None:
    found = case(shape, dtype, FEW, "cpu")
    assert not found.pop("kernel")
    assert_close(f"{shape} {dtype}", found, TOLERANCE)


def test_the_fast_path_gives_the_same_again_and_in_a_plan_that_is_used_again() -> None:
    assert again("cpu")
    assert replanned("cpu") < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_together_give_bit_for_bit_what_they_give_alone(dtype: str) -> None:
    found = together("cpu", getattr(torch, dtype))
    assert found["same bits"] and found["error"] < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_adds_each_row_its_own_adapter(dtype: torch.dtype) -> None:
    pool, loras = scattered_pool(130, 70, 64, RANKS, dtype)
    batch = mixed(FEW)
    x = inputs(len(batch), 130, dtype, False)
    total = expected(torch.zeros(len(batch), 70, dtype=dtype), x, batch, loras)
    assert error(multi_lora_reference(x, batch, pool, "layer"), total) < TOLERANCE[str(dtype).split(".")[1]]


def test_a_mixed_batch_gives_what_peft_gives_for_it() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 24, bias=False))
    ranks = {"a": 2, "b": 20, "c": 7}
    for name, rank in ranks.items():
        config = peft.LoraConfig(r=rank, lora_alpha=11, target_modules=["0"], init_lora_weights=False)
        if name == "a":
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    layer = model.base_model.model[0]
    pool = PagePool({"0": (40, 24)}, pages=100, width=64, slots=3, dtype=torch.float32, device="cpu")
    slots = {
        name: pool.add({"0": Lora(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])})
        for name in ranks
    }
    names = ["b", "__base__", "a", "b", "c", "a"]
    x = torch.randn(6, 40)
    model.eval()
    with torch.no_grad():
        theirs = layer(x, adapter_names=names)
        ours = layer.base_layer(x)
        add_multi_lora(ours, x, plan_batch(pool, [slots.get(name, -1) for name in names]), "0")
    torch.testing.assert_close(ours, theirs)


def test_a_row_gets_the_same_whoever_else_is_in_the_batch() -> None:
    pool, _ = scattered_pool(2100, 300, 64, RANKS, torch.float32)
    x = inputs(40, 2100, torch.float32, False)
    batch = np.random.default_rng(0).integers(-1, len(RANKS), 40)
    together = torch.zeros(40, 300)
    add_multi_lora(together, x, plan_batch(pool, batch), "layer")
    for row in range(40):
        alone = torch.zeros(1, 300)
        add_multi_lora(alone, x[row : row + 1], plan_batch(pool, batch[row : row + 1]), "layer")
        torch.testing.assert_close(together[row], alone[0], rtol=1e-6, atol=1e-4)


def test_batches_of_nobody_and_of_nothing_leave_y_as_it_is() -> None:
    pool, _ = scattered_pool(130, 70, 64, RANKS, torch.float32)
    for batch in ([], [-1, -1], [2]):
        y = torch.ones(len(batch), 70)
        add_multi_lora(y, torch.randn(len(batch), 130), plan_batch(pool, batch), "layer")
        assert torch.equal(y, torch.ones(len(batch), 70))


def test_an_adapter_may_leave_and_another_come_between_two_batches() -> None:
    pool, loras = scattered_pool(130, 70, 64, RANKS, torch.float32)
    x = inputs(3, 130, torch.float32, False)
    pool.remove(3)
    loras[3] = lora(9, 130, 70, torch.float32, 77)
    assert pool.add({"layer": loras[3]}) == 3
    batch = [4, 3, 1]
    y = torch.zeros(3, 70)
    add_multi_lora(y, x, plan_batch(pool, batch), "layer")
    assert error(y, expected(torch.zeros(3, 70), x, batch, loras)) < TOLERANCE["float32"]


@pytest.mark.parametrize("tiling", [FEW, MANY])
def test_a_batch_is_cut_into_blocks_that_name_each_row_and_rank_once(tiling: Tiling) -> None:
    pool, _ = scattered_pool(64, 64, 64, RANKS, torch.float32)
    batch = np.random.default_rng(1).integers(-1, len(RANKS), 300)
    cut = cut_batch(pool, batch, tiling)
    assert (np.diff(pool.host_largest[cut.blocks[:, 0]]) <= 0).all()  # the largest first
    assert cut.width == 80
    found = []
    for slot, begin, rows, first_rank in cut.blocks.tolist():
        own = cut.order[begin : begin + rows]
        assert 0 < len(own) <= tiling.rows and set(batch[own]) == {slot}
        last_rank = min(first_rank + tiling.shrink.ranks, pool.host_largest[slot])
        found += [(row, rank) for row in own.tolist() for rank in range(first_rank, last_rank)]
    expected = [(row, rank) for row in np.flatnonzero(batch >= 0) for rank in range(pool.host_largest[batch[row]])]
    assert sorted(found) == expected


@pytest.mark.parametrize("largest", [0, -5])
def test_room_for_no_rank_at_all_is_refused(largest: int) -> None:
    pool, _ = scattered_pool(64, 64, 64, RANKS, torch.float32)
    with pytest.raises(ValueError, match=f"1 or more, not {largest}"):
        plan_batch(pool, [0], largest_rank=largest)


def test_few_rows_and_prompts_are_cut_differently() -> None:
    pool, _ = scattered_pool(64, 64, 64, [4] * 10, torch.float32)
    for each, tiling in ((1, FEW), (31, FEW), (32, MANY)):
        assert cut_batch(pool, np.repeat(np.arange(10), each)).tiling is tiling


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([0, 5], "Slots are −1 … 4, not 0 … 5"),
        ([-2, 0], "Slots are −1 … 4, not -2 … 0"),
        (np.array([0, 2**64 - 1], np.uint64), "Slots are −1 … 4, not 0 … 18446744073709551615"),
        ([0, 1], "no adapter in slot 1"),
        ([0.0, 2.0], "vector of integers"),
        ([[0, 2]], "vector of integers"),
    ],
)
def test_adapters_that_are_not_there_are_refused(adapters: Any, message: str) -> None:
    pool, _ = scattered_pool(64, 64, 64, RANKS, torch.float32)
    plan = plan_batch(pool, [0, 0])
    pool.remove(1)
    for use in (lambda: plan_batch(pool, adapters), lambda: replan(plan, adapters)):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_plan_is_for_as_many_rows_as_it_was_made_for() -> None:
    pool, _ = scattered_pool(64, 64, 64, RANKS, torch.float32)
    with pytest.raises(ValueError, match="for 2 rows, not 3"):
        replan(plan_batch(pool, [0, -1]), [0, 0, 0])


def test_what_does_not_fit_is_refused_before_anything_is_computed() -> None:
    pool, _ = scattered_pool(130, 70, 64, RANKS, torch.float32)
    plan = plan_batch(pool, [0, 1])
    x, y = torch.randn(2, 130), torch.zeros(2, 70)
    for wrong_y, wrong_x, message in (
        (y, x[:1], r"x is \(1, 130\)"),
        (y, torch.randn(2, 70), r"x is \(2, 70\)"),
        (y, x.half(), "x is torch.float16"),
        (y, x.to("meta"), "x is torch.float32 on meta"),
        (y, torch.randn(130, 2).T, "rows of x must be contiguous"),
        (y.T, x, r"y is \(70, 2\)"),
        (y.double(), x, "y is torch.float64"),
        (torch.zeros(70, 2).T, x, "rows of y must be contiguous"),
        (torch.zeros(1, 70).expand(2, 70), x, "rows of y must not overlap"),
        (y, x.clone().requires_grad_(), "no gradient"),
        (y.clone().requires_grad_(), x, "no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            add_multi_lora(wrong_y, wrong_x, plan, "layer")
        assert not wrong_y.any()
    with pytest.raises(ValueError, match="no module deep"):
        add_multi_lora(y, x, plan, "deep")
    pool.table = torch.zeros(2 * len(pool.table), dtype=torch.int32)[::2]
    with pytest.raises(ValueError, match="page table and the plan must be contiguous"):
        add_multi_lora(y, x, plan, "layer")
    assert not y.any()


def test_layers_together_are_as_many_as_their_tensors_which_share_nothing() -> None:
    modules = {"q": (130, 70), "k": (130, 30), "o": (70, 130)}
    pool = PagePool(modules, pages=100, width=64, slots=1, dtype=torch.float32, device="cpu")
    pool.add({"q": lora(4, 130, 70, torch.float32, 0), "k": lora(4, 130, 30, torch.float32, 1)})
    plan, x, wide = plan_batch(pool, [0, 0]), torch.randn(2, 130), torch.zeros(2, 110)
    for ys, names, message in (
        ([wide[:, :70]], ["q", "k"], "2 modules and 1 tensors"),
        ([], [], "0 modules and 0 tensors"),
        ([torch.zeros(2, 70) for _ in range(4)], ["q"] * 4, "up to 3"),
        ([torch.zeros(2, 70), torch.zeros(2, 130)], ["q", "o"], r"x is \(2, 130\)"),
        ([wide[:, :70], torch.zeros(2, 31)], ["q", "k"], r"y is \(2, 31\)"),
        ([wide[:, :70], wide[:, 69:99]], ["q", "k"], "the same numbers"),
        ([wide[:, 30:100], wide[:, :31].narrow(1, 1, 30)], ["q", "k"], "the same numbers"),
        ([wide[:, :70], wide.view(-1)[80:140].view(2, 30)], ["q", "k"], "the same numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            add_multi_lora(ys, x, plan, names)
    assert not wide.any()
    add_multi_lora([wide[:, 30:100], wide[:, :30]], x, plan, ["q", "k"])
    assert wide[:, :100].all() and not wide[:, 100:].any()


def test_a_plan_ends_when_another_batch_is_planned_in_its_memory() -> None:
    pool, _ = scattered_pool(130, 70, 64, RANKS, torch.float32)
    x, y = torch.randn(2, 130), torch.zeros(2, 70)
    old = plan_batch(pool, [0, 1])
    replan(old, [1, 0])
    with pytest.raises(ValueError, match="Another batch"):
        add_multi_lora(y, x, old, "layer")
    with pytest.raises(ValueError, match="Another batch"):
        replan(old, [0, 1])
    assert not y.any()


def test_a_plan_dies_with_its_adapters_and_only_with_them() -> None:
    pool, _ = scattered_pool(130, 70, 64, RANKS, torch.float32)
    x, y = torch.randn(2, 130), torch.zeros(2, 70)
    plan = plan_batch(pool, [0, 1])
    pool.remove(4)
    add_multi_lora(y, x, plan, "layer")
    pool.remove(1)
    assert pool.add({"layer": lora(2, 130, 70, torch.float32, 5)}) == 1  # another tenant, in the same slot
    before = y.clone()
    with pytest.raises(ValueError, match="removed from the pool"):
        add_multi_lora(y, x, plan, "layer")
    assert torch.equal(y, before)


TENSORS = {"h": "*fp32"} | dict.fromkeys(("table", "directory", "order", "blocks"), "*i32")


def compiled(kernel: Any, number: str, architecture: int, folder: Path, warps: int, **constants: int) -> str:
    """PTX of a kernel for weights of one dtype, whose pointers and counts are divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    tensors = TENSORS | dict.fromkeys(("x", "y_0", "y_1", "y_2", "storage"), f"*{number}")
    signature = {name: "constexpr" if name in constants else tensors.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name] != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        options = {"num_warps": warps}
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["ptx"]


def both(
    tiling: Tiling, number: str, architecture: int, folder: Path, early: bool, modules: int = 1, **ones: int
) -> tuple[str, str]:
    """PTX of shrinking and expanding."""
    shrink, expand = tiling.shrink, tiling.expand
    sizes = {"MODULES": modules, "WIDTH": 1024, "ROWS": tiling.rows, "RANKS": shrink.ranks, "EARLY": early}
    wider = 2 if number == "fp32" else 1
    wide, middle, narrow = (each // wider for each in expand.columns)
    own = {"COLUMNS": shrink.columns // wider, "STAGES": shrink.stages}
    other = {"WIDE": wide, "MIDDLE": middle, "NARROW": narrow, "PARTS": 4, "ROUND": 4, "STAGES": expand.stages}
    known = {name: 1 for name in ones if name in multi_lora._shrink.arg_names}
    first = compiled(multi_lora._shrink, number, architecture, folder, shrink.warps, **sizes, **own, **known)
    known = {name: 1 for name in ones if name in multi_lora._expand.arg_names}
    second = compiled(multi_lora._expand, number, architecture, folder, expand.warps, **sizes, **other, **known)
    return first, second


compiles = pytest.mark.skipif(
    not triton_is_there() or interpreted(), reason="Triton is not installed, or interprets its kernels"
)


@compiles
@pytest.mark.parametrize("tiling", [FEW, MANY])
def test_numbers_are_read_sixteen_bytes_at_a_time_and_nothing_is_added_atomically(
    tiling: Tiling, tmp_path: Path
) -> None:
    for ptx in both(tiling, "bf16", 90, tmp_path, early=tiling is FEW, modules=3):
        assert re.search(r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global .*, 0x10,", ptx)
        assert "mma" in ptx
        assert ("griddepcontrol" in ptx) == (tiling is FEW)
        assert not re.search(r"\b(atom|red)\.", ptx)
    assert "st.global.v4.b32" in ptx  # y


@compiles
@pytest.mark.parametrize(("number", "tiling"), [("fp16", MANY), ("fp32", FEW), ("fp32", MANY)])
def test_kernels_compile_for_other_dtypes_and_older_gpus(number: str, tiling: Tiling, tmp_path: Path) -> None:
    assert all("st.global" in ptx for ptx in both(tiling, number, 80, tmp_path, early=False))


@compiles
@pytest.mark.parametrize(("modules", "ones"), [(1, ("n",)), (1, ("m_0", "y_stride_0")), (2, ("m_0", "n", "x_stride"))])
def test_kernels_compile_where_a_count_is_one_and_becomes_a_constant(
    modules: int, ones: tuple[str, ...], tmp_path: Path
) -> None:
    ptx = both(FEW, "bf16", 80, tmp_path, False, modules, **dict.fromkeys(ones, 1))
    assert all("st.global" in each for each in ptx)
