"""Ternary matrices applied and decoded from their masks, against dense matrices, the plain reference, and copying.

    python -m benchmarks.kernels.ternary

Of the GPU where there is one. 5 % of the numbers are not 0.
"""

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels import packed
from benchmarks.kernels.measuring import Ceilings
from benchmarks.kernels.one import measure
from benchmarks.results_file import Row
from kernels.packed_bits import Tiles
from kernels.ternary import (
    TernaryTensor,
    apply_ternary,
    apply_ternary_reference,
    decode_ternary,
    decode_ternary_reference,
)

DENSITY, REPEATS = 0.05, 9
SCALE = 0.03125
DETAILS = {"density": DENSITY}


def matrix(shape: tuple[int, int], seed: int, device: str) -> packed.Packed:
    """Random places and signs."""
    generator = torch.Generator(device).manual_seed(seed)
    places = torch.arange(8, device=device, dtype=torch.uint8)

    def mask(bits: Tensor) -> Tensor:
        return (bits.view(-1, 8).to(torch.uint8) << places).sum(1, dtype=torch.uint8)

    kept = torch.rand(shape, generator=generator, device=device) < DENSITY
    negative = kept & (torch.rand(shape, generator=generator, device=device) < 0.5)
    gamma = TernaryTensor(shape, mask(kept), mask(negative))
    return packed.Packed(
        size=2 * len(gamma.nonzero),
        decode=lambda dtype: decode_ternary(gamma, SCALE, dtype),
        decode_reference=lambda dtype: decode_ternary_reference(gamma, SCALE, dtype),
        unpack=lambda dtype: unpackbits(gamma, dtype),
        apply=lambda x: apply_ternary(x, gamma, SCALE),
        apply_reference=lambda x: apply_ternary_reference(x, gamma, SCALE),
    )


def unpackbits(ternary: TernaryTensor, dtype: torch.dtype) -> Tensor:
    nonzero, negative = (
        np.unpackbits(mask.numpy(), count=ternary.length, bitorder="little").view(np.int8)
        for mask in (ternary.nonzero, ternary.negative)
    )
    return torch.from_numpy(nonzero - 2 * negative).to(dtype).mul_(SCALE).view(ternary.shape)


def on_cpu() -> list[Row]:
    return packed.cpu_rows("ternary", matrix, REPEATS)


def on_gpu(ceilings: Ceilings) -> list[Row]:
    return packed.gpu_rows("ternary", matrix, ceilings, REPEATS)


def sweep(ceilings: Ceilings) -> Tiles:
    return packed.sweep("ternary", matrix, REPEATS)


if __name__ == "__main__":
    measure("ternary")
