"""Run by test_dora.py in a process of its own: prints, for each case, how far kernels and float64 are apart."""

import json
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dora
from kernels.dispatch import runs_on_triton
from kernels.dora import fused_dora, fused_dora_reference, row_norms, row_squares
from tests.kernels.interpreted_fused_lora import SCALE, factors
from tests.kernels.packed import DTYPES, error, inputs

# Tokens, n, m, r.
SHAPES = ((1, 1, 5, 1), (3, 33, 40, 5), (70, 130, 300, 17))


def found(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, g: Tensor, *, ours: bool
) -> dict[str, Tensor]:
    """y and gradients, by the kernels or by float64 autograd of the reference."""
    leaves = [tensor.detach().clone() for tensor in (x, A, B, magnitude)]
    if not ours:
        leaves = [leaf.double() for leaf in leaves]
        W, bias, g = W.double(), None if bias is None else bias.double(), g.double()
    x, A, B, magnitude = (leaf.requires_grad_() for leaf in leaves)
    if ours:
        y = fused_dora(x, W, bias, A, B, magnitude, SCALE, row_squares(W))
    else:
        y = fused_dora_reference(x, W, bias, A, B, magnitude, SCALE)
    y.backward(g)
    return {"y": y.detach(), "x": x.grad, "A": A.grad, "B": B.grad, "magnitude": magnitude.grad}


def case(shape: Sequence[int], name: str, device: str) -> dict[str, float | bool]:
    """With a bias; then without one, with float32 factors and odd strides; and the norms of rows."""
    tokens, n, m, rank = shape
    dtype = getattr(torch, name)
    W, bias, A, B = factors(n, m, rank, dtype, device)
    magnitude = inputs(1, m, dtype, False, device)[0].abs() + 0.5
    x, g = inputs(tokens, n, dtype, False, device), inputs(tokens, m, dtype, False, device)
    result: dict[str, float | bool] = {"kernel": runs_on_triton(x)}
    arguments = x, W, bias, A, B, magnitude, g
    ours, truth = (found(*arguments, ours=ours) for ours in (True, False))
    result |= {key: error(ours[key], truth[key]) for key in truth}
    x, g = inputs(tokens, n, dtype, True, device), torch.ones(1, dtype=dtype, device=device).expand(tokens, m)
    arguments = x, W.T.contiguous().T, None, A.float(), B.float(), magnitude.float(), g
    ours, truth = (found(*arguments, ours=ours) for ours in (True, False))
    result |= {f"{key}, strided": error(ours[key], truth[key]) for key in truth}
    norms = torch.linalg.vector_norm(W.double() + SCALE * B.double() @ A.double(), dim=1)
    return result | {"norms": error(row_norms(W, row_squares(W), A, B, SCALE), norms)}


if __name__ == "__main__":
    device = sys.argv[1]
    cases = {f"{shape} {dtype}": case(shape, dtype, device) for shape in SHAPES[:2] for dtype in DTYPES}
    dora._PROGRAMS = 1  # each has more tokens to go through than it takes at a time
    cases |= {f"{SHAPES[2]} {dtype}": case(SHAPES[2], dtype, device) for dtype in DTYPES}
    print(json.dumps({"cases": cases}))
