"""Packed bits made by NumPy alone, with what they stand for in float64, and inputs of every kind of stride."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kernels.codebook import PackedCodes
from kernels.ternary import TernaryTensor

# Rows of one word, of two, of four at a time, that begin with a byte, within one; fewer and more rows than a program
# takes; one and several warps and steps of columns; nothing.
SHAPES = ((1, 1), (3, 5), (8, 32), (130, 64), (17, 1536), (33, 104), (129, 257), (5, 2080), (0, 4), (4, 0))
DTYPES = ("float32", "bfloat16", "float16")


def ternary(shape: tuple[int, ...], density: float, seed: int, device: str = "cpu") -> tuple[TernaryTensor, Tensor]:
    """γ as masks, and as float64."""
    values = np.random.default_rng(seed).choice([-1, 0, 1], shape, p=[density / 2, 1 - density, density / 2])
    nonzero, negative = (
        torch.from_numpy(np.packbits(mask.reshape(-1), bitorder="little")).to(device) for mask in (values, values < 0)
    )
    return TernaryTensor(shape, nonzero, negative), torch.from_numpy(values).double().to(device)


def codes(shape: tuple[int, ...], bits: int, seed: int, device: str = "cpu") -> tuple[PackedCodes, Tensor]:
    """Codes as bytes, and as int64: each code's bits in turn, the lowest first."""
    values = np.random.default_rng(seed).integers(0, 2**bits, shape)
    each = (values.reshape(-1, 1) >> np.arange(bits)) & 1
    content = torch.from_numpy(np.packbits(each.reshape(-1), bitorder="little")).to(device)
    return PackedCodes(shape, bits, content), torch.from_numpy(values).to(device)


def inputs(tokens: int, columns: int, dtype: torch.dtype, strided: bool, device: str = "cpu") -> Tensor:
    """x [tokens, columns]; strided: every second column of a wider tensor."""
    generator = torch.Generator().manual_seed(tokens * 7919 + columns)
    wide = torch.randn(tokens, 2 * columns, generator=generator).to(device, dtype)
    return wide[:, ::2] if strided else wide[:, :columns].contiguous()


def error(found: Tensor, exact: Tensor) -> float:
    """The largest difference, in units of the largest number that should be there; infinite if not of one shape."""
    if found.shape != exact.shape:
        return float("inf")
    if not exact.numel():
        return 0.0
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


def assert_close(name: str, found: Mapping[str, bool | float], tolerance: Mapping[str, float]) -> None:
    """What a case found, named "… DTYPE": truths are true, errors below the tolerance of its dtype."""
    for what, value in found.items():
        if isinstance(value, bool):
            assert value, (name, what)
        else:
            assert value < tolerance[name.split()[-1]], (name, what, value)
