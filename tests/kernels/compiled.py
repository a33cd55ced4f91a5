"""Kernels compiled for a GPU that is not here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

AMPERE, HOPPER = 80, 90


def assembly(kernel: Any, types: Mapping[str, str], architecture: int, folder: Path, **constants: int) -> str:
    """PTX of a kernel; what has no type and is no constant is an i32. Pointers and counts are divisible by 16.

    Args:
        kernel: made by `triton.jit`.
        types: of its arguments, by name, as Triton writes them ("*bf16").
        architecture: of the GPU.
        folder: for Triton's cache.
        **constants: arguments that are known when it is compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    divisible = [name for name in names if signature[name].startswith("*") or signature[name] == "i32"]
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["ptx"]
