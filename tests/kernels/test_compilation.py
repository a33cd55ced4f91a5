"""The kernels of packed bits compile for GPUs that are not here: the interpreter takes what the compiler does not."""

import re
from pathlib import Path
from typing import Any

import pytest

from kernels import codebook, ternary
from kernels.dispatch import interpreted, triton_is_there

pytestmark = pytest.mark.skipif(
    not triton_is_there() or interpreted(), reason="Triton is not installed, or interprets its kernels"
)

AMPERE, HOPPER = 80, 90
POINTERS = {"nonzero": "*u8", "negative": "*u8", "bits": "*u8", "content": "*u8"}
COUNTS = ("m", "k", "n", "x_stride", "size", "part", "length")


def compiled(kernel: Any, number: str, architecture: int, folder: Path, **constants: int) -> str:
    """PTX of a kernel for numbers of one dtype, whose pointers and counts are divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    tensors = dict.fromkeys(("x", "y", "out", "levels"), f"*{number}") | POINTERS
    signature = {
        name: "constexpr" if name in constants else tensors.get(name, "i32" if name in COUNTS else "fp32")
        for name in names
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    divisible = [name for name in names if signature[name].startswith("*") or signature[name] == "i32"]
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["ptx"]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("architecture", [AMPERE, HOPPER])
@pytest.mark.parametrize("number", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", [ternary._multiply, codebook._multiply])
def test_products_compile_to_tensor_core_instructions_and_convert_no_integer(
    kernel: Any, number: str, architecture: int, whole: bool, tmp_path: Path
) -> None:
    ptx = compiled(kernel, number, architecture, tmp_path, ADD=False, WHOLE=whole, ROWS=128, WORDS=4, TOKENS=16)
    assert ("wgmma.mma_async" if architecture == HOPPER else "mma.sync") in ptx
    assert not re.search(
        r"cvt\.rn\.(f32|bf16|f16)\.[su]", ptx
    )  # slow: an instruction a weight, at a quarter of the rate


@pytest.mark.parametrize("kernel", [ternary._multiply, codebook._multiply])
@pytest.mark.parametrize("ones", [("n",), ("m", "n"), ("m", "k", "n", "x_stride", "size")])
def test_products_compile_where_a_count_is_one_and_becomes_a_constant(
    kernel: Any, ones: tuple[str, ...], tmp_path: Path
) -> None:
    sizes = dict.fromkeys(ones, 1)
    ptx = compiled(kernel, "fp16", HOPPER, tmp_path, ADD=True, WHOLE=False, ROWS=128, WORDS=4, TOKENS=16, **sizes)
    assert "wgmma.mma_async" in ptx


@pytest.mark.parametrize("number", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("add", [True, False])
def test_decoding_masks_compiles_and_stores_sixteen_bytes_at_a_time(number: str, add: bool, tmp_path: Path) -> None:
    ptx = compiled(ternary._expand, number, HOPPER, tmp_path, ADD=add, WHOLE=True, WORDS=64)
    assert "st.global.v4.b32" in ptx


@pytest.mark.parametrize("bits", codebook.WIDTHS)
def test_decoding_codes_compiles(bits: int, tmp_path: Path) -> None:
    assert "st.global" in compiled(codebook._look_up, "bf16", AMPERE, tmp_path, BITS=bits, BYTES=256 * bits)
