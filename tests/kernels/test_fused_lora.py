"""The LoRA linear layer: kernels and the fast path against float64 autograd, and against peft."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import low_rank_passes as module
from kernels.dispatch import interpreted, triton_is_there
from kernels.fused_lora import fused_lora, fused_lora_reference
from tests.kernels.interpreted_fused_lora import SCALE, SHAPES, case, exact, factors, found, others
from tests.kernels.own_process import printed
from tests.kernels.packed import DTYPES, assert_close, error, inputs

# Of the largest number; 16-bit results are rounded twice or thrice, by the interpreter towards 0 in bfloat16.
TOLERANCE = {"float32": 4e-6, "bfloat16": 2**-6, "float16": 2**-9, "float64": 1e-14}


def assert_report(report: dict[str, Any]) -> None:
    assert len(report["cases"]) == len(SHAPES) * len(DTYPES)
    for name, result in (report["cases"] | report["others"]).items():
        assert_close(name, result, TOLERANCE)


@pytest.mark.skipif(not triton_is_there(), reason="Triton is not installed")
def test_the_interpreted_kernels_agree_with_float64_over_odd_shapes_and_dtypes() -> None:
    assert_report(printed("interpreted_fused_lora", "cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_native_kernels_agree_with_float64_over_odd_shapes_and_dtypes() -> None:
    assert_report(printed("interpreted_fused_lora", "cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rank", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_on_a_gpu_every_width_of_tile_fits_and_keeps_its_bits(rank: int, dropout: float) -> None:
    W, bias, A, B = factors(1024, 1536, rank, torch.bfloat16, "cuda")
    x, g = inputs(777, 1024, torch.bfloat16, False, "cuda"), inputs(777, 1536, torch.bfloat16, False, "cuda")
    torch.manual_seed(0)
    first = found(x, W, bias, A, B, g, dropout=dropout)
    torch.manual_seed(0)
    again = found(x, W, bias, A, B, g, dropout=dropout)
    assert all(torch.equal(first[name], again[name]) for name in first)
    if not dropout:
        for name, truth in exact(x, W, bias, A, B, g).items():
            assert error(first[name], truth) < TOLERANCE["bfloat16"], name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_graph_draws_another_mask_each_time_it_is_replayed() -> None:
    W, bias, A, B = factors(64, 64, 8, torch.bfloat16, "cuda")
    x = inputs(70, 64, torch.bfloat16, False, "cuda")
    fused_lora(x, W, bias, A, B, SCALE, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused_lora(x, W, bias, A, B, SCALE, 0.5)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_cpu_without_the_interpreter_the_fast_path_agrees_with_float64(shape: tuple[int, ...], dtype: str) -> None:
    result = case(shape, dtype, "cpu")
    assert not result.pop("kernel")
    if dtype == "float64":  # factors in float32 there say what is rounded
        result = {name: value for name, value in result.items() if not name.endswith("strided")}
    assert_close(f"{shape} {dtype}", result, TOLERANCE)


def test_the_fast_path_drops_leaves_out_and_takes_any_shape_as_the_kernels_do() -> None:
    for name, result in others("cpu").items():
        assert not result.pop("kernel", False)
        assert_close(name, result, TOLERANCE)


def test_the_fast_path_drops_what_pytorch_drops_and_leaves_the_generator_where_pytorch_does() -> None:
    W, bias, A, B = factors(30, 20, 4, torch.float32, "cpu")
    x = inputs(50, 30, torch.float32, False)
    torch.manual_seed(0)
    expected = fused_lora_reference(x, W, bias, A, B, SCALE, 0.4)
    after = torch.rand(3)
    torch.manual_seed(0)
    torch.testing.assert_close(fused_lora(x, W, bias, A, B, SCALE, 0.4), expected)
    assert torch.equal(torch.rand(3), after)


def saved(tensor: Tensor) -> list[tuple[int, ...]]:
    """The shapes of what the step before the last of a graph keeps; the last is a view."""
    return [tuple(each.shape) for each in tensor.grad_fn.next_functions[0][0].saved_tensors]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nothing_is_kept_for_the_backward_pass_but_x_its_low_rank_product_and_weights(dropout: float) -> None:
    W, bias, A, B = factors(30, 20, 4, torch.float32, "cpu")
    y = fused_lora(inputs(50, 30, torch.float32, False), W, bias, A.requires_grad_(), B, SCALE, dropout)
    assert sorted(saved(y)) == sorted([(50, 30), (20, 30), (4, 30), (20, 4), (50, 4)])


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16",) * 2]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_of_peft_computes_the_same(dtype: str, adapter_dtype: str, transposed: bool) -> None:
    peft = pytest.importorskip("peft")
    lora, conv = pytest.importorskip("peft.tuners.lora.layer"), pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    base = conv.Conv1D(24, 40) if transposed else nn.Linear(40, 24)
    base = base.to(getattr(torch, dtype)).requires_grad_(False)
    config = peft.LoraConfig(r=5, lora_alpha=8, init_lora_weights=False, fan_in_fan_out=transposed)
    layer = lora.Linear(base, "default", config, r=5, lora_alpha=8).to(getattr(torch, dtype))
    A, B = (getattr(layer, name)["default"].to(getattr(torch, adapter_dtype)).weight for name in ("lora_A", "lora_B"))
    x = inputs(30, 40, getattr(torch, dtype), False)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    g = inputs(30, 24, getattr(torch, dtype), False)
    theirs = layer(first)
    theirs.backward(g)
    of_A, of_B = A.grad, B.grad
    A.grad = B.grad = None
    ours = fused_lora(second, base.weight.T if transposed else base.weight, base.bias, A, B, layer.scaling["default"])
    ours.backward(g)
    for mine, other in ((ours, theirs), (second.grad, first.grad), (A.grad, of_A), (B.grad, of_B)):
        assert error(mine, other.double()) < TOLERANCE[dtype]


def test_what_does_not_fit_is_refused_before_anything_is_computed() -> None:
    W, bias, A, B = factors(6, 5, 3, torch.float32, "cpu")
    x = inputs(4, 6, torch.float32, False)
    for arguments, message in (
        ((x[:, :5], W, bias, A, B, 1.0), "which no W of shape"),
        ((x.sum(), W, bias, A, B, 1.0), "which no W of shape"),
        ((x, W[0], bias, A, B, 1.0), "which no W of shape"),
        ((x, W, bias, A[:, :5], B, 1.0), "needs A of shape"),
        ((x, W, bias, A, B[:, :2], 1.0), "needs A of shape"),
        ((x, W, bias, A, B.T, 1.0), "needs A of shape"),
        ((x, W, bias[:4], A, B, 1.0), "bias of 5 outputs"),
        ((x.int(), W, bias, A, B, 1.0), "only floats"),
        ((x, W, bias, A.to(torch.float8_e4m3fn), B, 1.0), "only floats"),
        ((x, W.bfloat16(), bias, A, B, 1.0), "of x's dtype"),
        ((x, W, bias.double(), A, B, 1.0), "of x's dtype"),
        ((x, W, bias, A.to("meta"), B, 1.0), "x is on cpu"),
        ((x, W.clone().requires_grad_(), bias, A, B, 1.0), "frozen"),
        ((x, W, bias.clone().requires_grad_(), A, B, 1.0), "frozen"),
        ((x, W, bias, A, B, 1.0, 1.0), "probability below 1"),
        ((x, W, bias, A, B, 1.0, float("nan")), "probability below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_lora(*arguments)


def test_autocast_does_not_reach_into_it() -> None:
    W, bias, A, B = factors(6, 5, 3, torch.float32, "cpu")
    x = inputs(4, 6, torch.float32, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_lora(x, W, bias, A, B, 1.0), fused_lora(x, W, bias, A, B, 1.0).float())
        y = fused_lora(x, W, bias, A, B, 1.0)
    assert torch.equal(y, fused_lora(x, W, bias, A, B, 1.0))


# -- compiled for GPUs that are not here -------------------------------------------------------------------------------

AMPERE, DESKTOP, HOPPER = 80, 89, 90
compiles = pytest.mark.skipif(
    not triton_is_there() or interpreted(), reason="Triton is not installed, or interprets its kernels"
)


def compiled(kernel: Any, tile: module.Tile, padded: int, architecture: int, folder: Path, **constants: Any) -> Any:
    """A kernel for bfloat16 whose pointers and counts are divisible by 16, except those that are constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants |= {"RANK": padded, "TOKENS": 64, "COLUMNS": tile.columns}
    names = list(kernel.arg_names)
    types = {"seed": "*i64", "shrunk": "*fp32", "gradient": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("z", "factor", "h", "bias", "expanded", "out"), "*bf16")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = [name for name in names if signature[name][0] in "*i" and name not in ("tokens", "threshold")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


PASSES = {
    "shrink": ("_shrink", "SHRINK", {}),
    "expand": ("_stripe", "EXPAND", {"EXPAND": True, "SHRINK": False, "GRADIENT": False, "BIAS": True}),
    "both": ("_stripe", "BOTH", {"EXPAND": True, "SHRINK": False, "GRADIENT": True, "BIAS": False}),
    "joint": ("_stripe", "JOINT", {"EXPAND": False, "SHRINK": True, "GRADIENT": True, "BIAS": False}),
}
SHARED = {AMPERE: 166_912, DESKTOP: 101_376, HOPPER: 232_448}  # bytes that a block of threads may have


@compiles
@pytest.mark.parametrize(("name", "rank", "dropout", "architecture"), [
    ("shrink", 16, False, HOPPER), ("shrink", 64, True, DESKTOP), ("expand", 16, False, HOPPER),
    ("both", 16, True, HOPPER), ("both", 64, False, AMPERE), ("both", 256, True, HOPPER), ("both", 256, True, DESKTOP),
    ("joint", 16, False, HOPPER), ("joint", 32, False, AMPERE), ("joint", 32, False, DESKTOP),
])  # fmt: skip
def test_passes_compile_to_tensor_core_instructions_and_wide_accesses_in_the_memory_that_there_is(
    name: str, rank: int, dropout: bool, architecture: int, tmp_path: Path
) -> None:
    kernel, tile, flags = PASSES[name]
    tile = getattr(module, tile).fitted(
        rank, torch.bfloat16, dropout, None if name == "shrink" else 64, SHARED[architecture]
    )
    by_rank = name in ("shrink", "both")
    built = compiled(
        getattr(module, kernel), tile, rank, architecture, tmp_path, **flags, DROPOUT=dropout, BY_RANK=by_rank
    )
    assert ("wgmma.mma_async" if architecture == HOPPER else "mma.sync") in built.asm["ptx"]
    assert name == "expand" or not re.search(r"ld\.global(\.\w+)*\.b16\b", built.asm["ptx"])  # but for a bias
    assert built.metadata.shared <= SHARED[architecture]


@compiles
@pytest.mark.parametrize("ones", [("columns",), ("columns", "rank", "z_stride")])
@pytest.mark.parametrize("name", PASSES)
def test_passes_compile_where_a_count_is_one_and_becomes_a_constant(
    name: str, ones: tuple[str, ...], tmp_path: Path
) -> None:
    kernel, tile, flags = PASSES[name]
    tile = getattr(module, tile)
    constants = {**flags, "DROPOUT": name != "joint", "BY_RANK": True, **dict.fromkeys(ones, 1)}
    built = compiled(getattr(module, kernel), tile, 16, HOPPER, tmp_path, **constants)
    assert "wgmma.mma_async" in built.asm["ptx"]
