"""Run by test_codebook.py in a process of its own: prints, for each case, how far kernels and float64 are apart."""

import json
import sys

import torch

from kernels.codebook import WIDTHS, add_binary_product, apply_binary, decode_codes
from kernels.dispatch import runs_on_triton
from tests.kernels.packed import DTYPES, SHAPES, codes, error, inputs

LOW, HIGH = -0.25, 0.5


def decoded(shape: tuple[int, int], dtype: torch.dtype, device: str) -> bool:
    found = []
    for bits in WIDTHS:
        packed, exact = codes(shape, bits, bits, device)
        levels = inputs(1, 2**bits, dtype, False, device)[0]
        found.append(torch.equal(decode_codes(packed, levels), levels[exact]))
    return all(found)


def case(shape: tuple[int, int], name: str, device: str) -> dict[str, float | bool]:
    dtype = getattr(torch, name)
    packed, exact = codes(shape, 1, sum(shape), device)
    W = LOW + (HIGH - LOW) * exact.double()
    found: dict[str, float | bool] = {
        "kernel": runs_on_triton(packed.content),
        "decoded": decoded(shape, dtype, device),
    }
    for tokens, strided in ((1, False), (19, True)):
        x = inputs(tokens, shape[1], dtype, strided, device)
        product = x.double() @ W.T
        y = inputs(tokens, shape[0], dtype, False, device)
        total = y.double() + product
        found[f"applied to {tokens}"] = error(apply_binary(x, packed, LOW, HIGH), product)
        add_binary_product(y, x, packed, LOW, HIGH)
        found[f"product of {tokens} added"] = error(y, total)
    return found


def many_tokens(device: str) -> float:
    """More tokens than the kernel takes."""
    packed, exact = codes((40, 96), 1, 0, device)
    x = inputs(150, 96, torch.float32, False, device)
    return error(apply_binary(x, packed, LOW, HIGH), x.double() @ (LOW + (HIGH - LOW) * exact.double()).T)


def gradient(device: str) -> float:
    packed, exact = codes((7, 13), 1, 0, device)
    x = inputs(3, 13, torch.float32, False, device).requires_grad_()
    upstream = inputs(3, 7, torch.float32, False, device)
    (apply_binary(x, packed, LOW, HIGH) * upstream).sum().backward()
    return error(x.grad, upstream.double() @ (LOW + (HIGH - LOW) * exact.double()))


if __name__ == "__main__":
    device = sys.argv[1]
    cases = {f"{m}x{k} {dtype}": case((m, k), dtype, device) for m, k in SHAPES for dtype in DTYPES}
    print(json.dumps({"cases": cases, "others": {"many tokens": many_tokens(device), "gradient": gradient(device)}}))
