"""Matrices of two levels applied and decoded from their bits, against dense matrices, the plain reference, and copying.

    python -m benchmarks.kernels.codebook

Of the GPU where there is one.
"""

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels import packed
from benchmarks.kernels.measuring import Ceilings
from benchmarks.kernels.one import measure
from benchmarks.results_file import Row
from kernels.codebook import (
    PackedCodes,
    apply_binary,
    apply_binary_reference,
    decode_codes,
    decode_codes_reference,
)
from kernels.packed_bits import Tiles

REPEATS = 9
LOW, HIGH = -0.0234375, 0.03125  # bfloat16 has both


def matrix(shape: tuple[int, int], seed: int, device: str) -> packed.Packed:
    """Random bits."""
    generator = torch.Generator(device).manual_seed(seed)
    content = torch.randint(256, (shape[0] * shape[1] // 8,), generator=generator, device=device, dtype=torch.uint8)
    codes = PackedCodes(shape, 1, content)
    levels = {dtype: torch.tensor([LOW, HIGH], dtype=dtype, device=device) for dtype in packed.DTYPE_NAMES}
    return packed.Packed(
        size=len(content),
        decode=lambda dtype: decode_codes(codes, levels[dtype]),
        decode_reference=lambda dtype: decode_codes_reference(codes, levels[dtype]),
        unpack=lambda dtype: unpackbits(codes, dtype),
        apply=lambda x: apply_binary(x, codes, LOW, HIGH),
        apply_reference=lambda x: apply_binary_reference(x, codes, LOW, HIGH),
    )


def unpackbits(codes: PackedCodes, dtype: torch.dtype) -> Tensor:
    bits = np.unpackbits(codes.content.numpy(), count=codes.length, bitorder="little")
    return torch.from_numpy(bits).to(dtype).mul_(HIGH - LOW).add_(LOW).view(codes.shape)


def on_cpu() -> list[Row]:
    return packed.cpu_rows("1-bit", matrix, REPEATS)


def on_gpu(ceilings: Ceilings) -> list[Row]:
    return packed.gpu_rows("1-bit", matrix, ceilings, REPEATS)


def sweep(ceilings: Ceilings) -> Tiles:
    return packed.sweep("1-bit", matrix, REPEATS)


if __name__ == "__main__":
    measure("codebook")
