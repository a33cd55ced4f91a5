"""Which device work runs on, and what a base model's weights are there."""

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def best_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16; others only imitate them, slowly."""
    can = torch.cpu.get_capabilities()
    return any(can.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def base_dtype(device: torch.device, precision: Precision = "auto", *, trained: bool = False) -> torch.dtype:
    """The dtype of a base model's weights: bfloat16 on a GPU, which is half the memory, and float32 elsewhere.

    Args:
        device: that computes.
        precision: as a recipe's `training.precision`; `float32` keeps the weights so on a GPU, too.
        trained: the weights themselves are trained; small updates would be lost in bfloat16.
    """
    half = device.type == "cuda" and precision != "float32" and not trained
    return torch.bfloat16 if half else torch.float32
