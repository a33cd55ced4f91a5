"""Run by test_fused_lora.py in a process of its own: prints, for each case, how far kernels and float64 are apart."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels import low_rank_passes as kernel
from kernels.dispatch import runs_on_triton
from kernels.fused_lora import fused_lora
from tests.kernels.packed import DTYPES, error, inputs

# Tokens, n, m, r: less and more than a program takes of each; one of each; columns that are divided among programs.
SHAPES = ((1, 1, 1, 1), (3, 33, 40, 5), (70, 130, 67, 16), (65, 24, 300, 17), (2, 1100, 16, 40), (66, 64, 65, 130))
SCALE = 0.7


def factors(n: int, m: int, rank: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, its bias, A and B."""
    W, A, B = (inputs(*shape, dtype, False, device) for shape in ((m, n), (rank, n), (m, rank)))
    return W / n**0.5, inputs(1, m, dtype, False, device)[0], A / n**0.5, B / rank**0.5


def exact(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    g: Tensor,
    scale: float = SCALE,
    noise: Tensor | float = 1,
) -> dict[str, Tensor]:
    """y and gradients by float64 autograd; `noise` is D/q."""
    x, A, B = (tensor.detach().double().requires_grad_() for tensor in (x, A, B))
    y = x @ W.double().T + scale * ((x * noise) @ A.T @ B.T)
    if bias is not None:
        y = y + bias.double()
    (y * g.double()).sum().backward()
    return {"y": y.detach(), "x": x.grad, "A": A.grad, "B": B.grad}


def found(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    g: Tensor,
    scale: float = SCALE,
    dropout: float = 0.0,
) -> dict[str, Tensor]:
    """The same by `fused_lora`."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, A, B)]
    y = fused_lora(leaves[0], W, bias, *leaves[1:], scale, dropout)
    y.backward(g)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    for leaf in leaves:
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.is_contiguous()
    return {"y": y.detach(), "x": leaves[0].grad, "A": leaves[1].grad, "B": leaves[2].grad}


def errors(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: error(ours[name], truth[name]) for name in truth}


def case(shape: Sequence[int], name: str, device: str) -> dict[str, float | bool]:
    """Once with all of one dtype and a bias; once, in 16 bits, with float32 factors and x and g of odd strides."""
    tokens, n, m, rank = shape
    dtype = getattr(torch, name)
    W, bias, A, B = factors(n, m, rank, dtype, device)
    x, g = inputs(tokens, n, dtype, False, device), inputs(tokens, m, dtype, False, device)
    result: dict[str, float | bool] = {"kernel": runs_on_triton(x)}
    result |= errors(found(x, W, bias, A, B, g), exact(x, W, bias, A, B, g))
    x, g = inputs(tokens, n, dtype, True, device), inputs(tokens, 2 * m, dtype, False, device)[:, m:]
    A, B = A.float() * 1.001, B.float() * 1.001
    # What is rounded to x's dtype is no error.
    truth = exact(x, W.T.contiguous().T, None, A.to(dtype), B.to(dtype), g)
    strided = errors(found(x, W.T.contiguous().T, None, A, B, g), truth)
    return result | {f"{what}, strided": value for what, value in strided.items()}


def observed_noise(tokens: int, n: int, dropout: float, seed: int, device: str) -> Tensor:
    """D [tokens, n] of the next call: with W = 0 and all else 1, the gradient of x is D/q."""
    ones = torch.ones(tokens, n, device=device), torch.ones(1, n, device=device), torch.ones(1, 1, device=device)
    torch.manual_seed(seed)
    kept = found(ones[0], 0 * ones[1], None, ones[1], ones[2], torch.ones(tokens, 1, device=device), 1.0, dropout)
    return kept["x"] != 0


def dropped(device: str, name: str, shape: Sequence[int] = (130, 83, 70, 20)) -> dict[str, float | bool]:
    """Forward and backward of different tiles under one mask, which two seeds do not share, of the right share."""
    tokens, n, m, rank = shape
    dtype, p = getattr(torch, name), 0.25
    W, bias, A, B = factors(n, m, rank, dtype, device)
    x, g = inputs(tokens, n, dtype, False, device), inputs(tokens, m, dtype, False, device)
    D, other = (observed_noise(tokens, n, p, seed, device) for seed in (5, 6))
    torch.manual_seed(5)
    first = found(x, W, bias, A, B, g, dropout=p)
    second = found(x, W, bias, A, B, g, dropout=p)
    torch.manual_seed(5)
    again = found(x, W, bias, A, B, g, dropout=p)
    result: dict[str, float | bool] = errors(first, exact(x, W, bias, A, B, g, noise=D / (1 - p)))
    return result | {
        "the same by the same seed": all(torch.equal(first[key], again[key]) for key in first),
        "another by the next draw": not torch.equal(first["y"], second["y"]),
        "share kept": abs(D.double().mean().item() - (1 - p)) < 0.02,
        "independent of another seed": abs((D & other).double().mean().item() - (1 - p) ** 2) < 0.02,
        "independent of the neighbours": all(
            abs((D[:-down, : n - right] & D[down:, right:]).double().mean().item() - (1 - p) ** 2) < 0.02
            for down, right in ((1, 0), (1, 1), (8, 4), (64, 8))
        )
        and all(
            abs((D[:, :-right] & D[:, right:]).double().mean().item() - (1 - p) ** 2) < 0.02 for right in (1, 2, 4, 8)
        ),
    }


def partial(device: str) -> dict[str, float | bool]:
    """Gradients that nobody wants are not made, and those that are wanted stay right."""
    W, bias, A, B = factors(40, 50, 4, torch.float32, device)
    x, g = inputs(9, 40, torch.float32, False, device), inputs(9, 50, torch.float32, False, device)
    truth = exact(x, W, bias, A, B, g)
    result: dict[str, float | bool] = {}
    for wanted in ("x", "A", "B", "AB"):
        leaves = {key: tensor.detach().requires_grad_(key in wanted) for key, tensor in (("x", x), ("A", A), ("B", B))}
        fused_lora(leaves["x"], W, bias, leaves["A"], leaves["B"], SCALE, 0.0).backward(g)
        for key, leaf in leaves.items():
            if key in wanted:
                result[f"{key} of {wanted}"] = error(leaf.grad, truth[key])
            else:
                result[f"no {key} of {wanted}"] = leaf.grad is None
    return result


def shapes_of_x(device: str) -> dict[str, float | bool]:
    """Vectors, batches and nothing; a gradient of one number for all (strides of 0)."""
    W, bias, A, B = factors(6, 5, 3, torch.float32, device)
    result: dict[str, float | bool] = {}
    for shape in ((), (4,), (2, 3), (0,), (2, 0, 3)):
        x = inputs(24, 6, torch.float32, False, device)[: torch.Size(shape).numel()].reshape(*shape, 6)
        g = torch.ones(1, device=device).expand(*shape, 5)
        ours, truth = found(x, W, bias, A, B, g), exact(x, W, bias, A, B, g)
        result |= {f"{key} of {(*shape, 6)}": value for key, value in errors(ours, truth).items()}
        result[f"empty {shape} gives zeros"] = bool(x.numel()) or not (ours["A"].any() or ours["B"].any())
    return result


def by_few_programs(device: str, name: str) -> dict[str, float | bool]:
    """Every program has all tokens, or all columns, of its own to go through: more than it takes at a time."""
    chosen = {tile: getattr(kernel, tile) for tile in ("SHRINK", "EXPAND", "BOTH", "JOINT")}
    for tile, own in chosen.items():
        setattr(kernel, tile, replace(own, programs=1))
    try:
        return case((200, 300, 270, 16), name, device)
    finally:
        for tile, own in chosen.items():
            setattr(kernel, tile, own)


def others(device: str) -> dict[str, dict[str, float | bool]]:
    """Everything that is asked once, each named "… DTYPE"."""
    return {
        "dropped float32": dropped(device, "float32"),
        "dropped bfloat16": dropped(device, "bfloat16"),
        "few programs bfloat16": by_few_programs(device, "bfloat16"),
        "partial float32": partial(device),
        "shapes float32": shapes_of_x(device),
    }


if __name__ == "__main__":
    device = sys.argv[1]
    cases = {f"{shape} {dtype}": case(shape, dtype, device) for shape in SHAPES for dtype in DTYPES}
    print(json.dumps({"cases": cases, "others": others(device)}))
