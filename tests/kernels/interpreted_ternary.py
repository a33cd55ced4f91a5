"""Run by test_ternary.py in a process of its own: prints, for each case, how far kernels and float64 are apart."""

import json
import sys

import torch

from kernels.dispatch import runs_on_triton
from kernels.ternary import add_ternary, add_ternary_product, apply_ternary, decode_ternary
from tests.kernels.packed import DTYPES, SHAPES, error, inputs, ternary

SCALE = 0.3


def case(shape: tuple[int, int], name: str, device: str) -> dict[str, float | bool]:
    dtype = getattr(torch, name)
    gamma, exact = ternary(shape, 0.4, sum(shape), device)
    base = inputs(*shape, dtype, False, device)
    summed = base.clone()
    add_ternary(summed, gamma, SCALE)
    found: dict[str, float | bool] = {
        "kernel": runs_on_triton(gamma.nonzero),
        "decoded": torch.equal(decode_ternary(gamma, SCALE, dtype), (SCALE * exact).to(dtype)),
        "from one": torch.equal(decode_ternary(gamma, SCALE, dtype, start=1.0), (1 + SCALE * exact).to(dtype)),
        "added": error(summed, base.double() + SCALE * exact),
    }
    scale = torch.tensor(SCALE, dtype=torch.float64).to(dtype).item()  # what a dense matrix would hold
    for tokens, strided in ((1, False), (19, True)):
        x = inputs(tokens, shape[1], dtype, strided, device)
        product = scale * (x.double() @ exact.T)
        y = inputs(tokens, shape[0], dtype, False, device)
        total = y.double() + product
        found[f"applied to {tokens}"] = error(apply_ternary(x, gamma, SCALE), product)
        add_ternary_product(y, x, gamma, SCALE)
        found[f"product of {tokens} added"] = error(y, total)
    return found


def many_tokens(device: str) -> float:
    """More tokens than the kernel takes, in three dimensions."""
    gamma, exact = ternary((40, 96), 0.05, 0, device)
    x = inputs(150, 96, torch.float32, False, device).view(3, 50, 96)
    return error(apply_ternary(x, gamma, 0.5), 0.5 * (x.double() @ exact.T))


def unaligned(device: str) -> float:
    """Masks that begin in the middle of a word: rows do, too, whatever their length."""
    gamma, exact = ternary((9, 64), 0.5, 0, device)
    shifted = [torch.cat([mask.new_zeros(3), mask])[3:] for mask in (gamma.nonzero, gamma.negative)]
    x = inputs(2, 64, torch.float32, False, device)
    return error(apply_ternary(x, type(gamma)(gamma.shape, *shifted), 0.5), 0.5 * (x.double() @ exact.T))


def gradient(device: str) -> float:
    gamma, exact = ternary((7, 13), 0.5, 0, device)
    x = inputs(3, 13, torch.float32, False, device).requires_grad_()
    upstream = inputs(3, 7, torch.float32, False, device)
    (apply_ternary(x, gamma, 0.5) * upstream).sum().backward()
    return error(x.grad, 0.5 * (upstream.double() @ exact))


if __name__ == "__main__":
    device = sys.argv[1]
    cases = {f"{m}x{k} {dtype}": case((m, k), dtype, device) for m, k in SHAPES for dtype in DTYPES}
    others = {"many tokens": many_tokens(device), "unaligned": unaligned(device), "gradient": gradient(device)}
    print(json.dumps({"cases": cases, "others": others}))
