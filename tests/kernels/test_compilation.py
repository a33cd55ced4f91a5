"""The kernels of packed bits compile for GPUs that are not here: the interpreter takes what the compiler does not."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kernels import codebook, packed_bits, ternary
from kernels.dispatch import interpreted, triton_is_there
from kernels.packed_bits import Tile

pytestmark = pytest.mark.skipif(
    not triton_is_there() or interpreted(), reason="Triton is not installed, or interprets its kernels"
)

AMPERE, HOPPER = 80, 90
POINTERS = {"nonzero": "*u8", "negative": "*u8", "bits": "*u8", "content": "*u8"}
COUNTS = ("m", "k", "n", "x_stride", "size", "runs", "length")


def compiled(
    kernel: Any,
    number: str,
    architecture: int,
    folder: Path,
    options: Mapping[str, int] | None = None,
    **constants: int,
) -> str:
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
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["ptx"]


TILES = [replace(tile, warps=8) for _, tile in packed_bits.TILES.by_tokens]


def product(
    kernel: Any, number: str, architecture: int, folder: Path, tile: Tile, whole: bool, **constants: int
) -> str:
    """PTX of a product's kernel."""
    constants |= {"ADD": False, "WHOLE": whole, "ROWS": tile.rows, "TOKENS": tile.tokens, "WORDS": tile.words}
    constants |= {"PARTS": tile.warps}
    options = {"num_warps": tile.warps, "num_stages": 1}
    return compiled(kernel, number, architecture, folder, options, **constants)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("architecture", [AMPERE, HOPPER])
@pytest.mark.parametrize("kernel", [ternary._multiply, codebook._multiply])
def test_products_read_whole_words_convert_no_integer_and_pass_nothing_between_threads(
    kernel: Any, architecture: int, tile: Tile, tmp_path: Path
) -> None:
    ptx = product(kernel, "bf16", architecture, tmp_path, tile, whole=True)
    assert f"ld.global.v{tile.words}.b32" in ptx
    if kernel is ternary._multiply:  # Triton 3.9 gives the sum of x, which 1 bit needs, another layout
        assert not re.search(r"bar\.sync|shfl|st\.shared", ptx[: ptx.rindex("mma.sync")])
    # Slow: an instruction a weight, at a quarter of the rate.
    assert not re.search(r"cvt\.rn\.(f32|bf16|f16)\.[su]", ptx)


@pytest.mark.parametrize("kernel", [ternary._multiply, codebook._multiply])
@pytest.mark.parametrize("number", ["fp32", "fp16"])
def test_products_of_rows_that_begin_within_words_compile(kernel: Any, number: str, tmp_path: Path) -> None:
    for tile in TILES:
        assert "mma.sync" in product(kernel, number, HOPPER, tmp_path, replace(tile, words=1), whole=False)


@pytest.mark.parametrize("kernel", [ternary._multiply, codebook._multiply])
@pytest.mark.parametrize("ones", [("n",), ("m", "n"), ("m", "k", "n", "x_stride", "size", "runs")])
def test_products_compile_where_a_count_is_one_and_becomes_a_constant(
    kernel: Any, ones: tuple[str, ...], tmp_path: Path
) -> None:
    tile = replace(TILES[0], words=1, warps=1)
    assert "mma.sync" in product(kernel, "fp16", HOPPER, tmp_path, tile, whole=False, **dict.fromkeys(ones, 1))


@pytest.mark.parametrize("number", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("add", [True, False])
def test_decoding_masks_compiles_and_stores_sixteen_bytes_at_a_time(number: str, add: bool, tmp_path: Path) -> None:
    ptx = compiled(ternary._expand, number, HOPPER, tmp_path, ADD=add, WHOLE=True, WORDS=64)
    assert "st.global.v4.b32" in ptx


@pytest.mark.parametrize("bits", codebook.WIDTHS)
def test_decoding_codes_compiles(bits: int, tmp_path: Path) -> None:
    assert "st.global" in compiled(codebook._look_up, "bf16", AMPERE, tmp_path, BITS=bits, BYTES=256 * bits)
