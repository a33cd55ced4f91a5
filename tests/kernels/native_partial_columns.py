"""Run by test_partial_columns.py in a process of its own: prints, for each case, how far it is from float64."""

import json
import sys

import torch
from torch import Tensor

from kernels.partial_columns import Columns, add_from_columns, add_to_columns, column_gradient, gradient_of_picked
from tests.kernels.packed import DTYPES, error, inputs

# (m, n), k: one, all, none, of odd sizes and a multiple of 8.
CASES = (
    ((1, 1), 1),
    ((5, 7), 7),
    ((6, 9), 0),
    ((130, 65), 3),
    ((70, 300), 33),
    ((70, 300), 40),
    ((40, 260), 129),
    ((0, 4), 2),
)
TOKENS = (0, 1, 19, 150)


def columns(n: int, k: int, device: str) -> Columns:
    return Columns(torch.randperm(n, generator=torch.Generator().manual_seed(n + k))[:k].sort().values.to(device), n)


def case(shape: tuple[int, int], k: int, name: str, device: str) -> dict[str, float]:
    (m, n), dtype = shape, getattr(torch, name)
    chosen = columns(n, k, device)
    found: dict[str, float] = {}
    for tokens in TOKENS:
        strided = tokens == 19
        g, x = inputs(tokens, m, dtype, strided, device), inputs(tokens, n, dtype, strided, device)
        found |= {f"{what}, {tokens} tokens": each for what, each in _products(g, x, chosen, strided).items()}
    return found


def _products(g: Tensor, x: Tensor, chosen: Columns, strided: bool) -> dict[str, float]:
    """s = 0.5; B is float32 as parameters are, and multiplied as the dtype has it."""
    m, k, I = g.shape[1], len(chosen.indices), chosen.indices  # noqa: E741
    B = inputs(m, k, torch.float32, strided, str(x.device))
    exact = B.to(x.dtype).double()
    y, into = (
        inputs(len(x), m, x.dtype, False, str(x.device)),
        inputs(len(x), chosen.size, x.dtype, False, str(x.device)),
    )
    added = y.double() + 0.5 * x.double()[:, I] @ exact.T
    scattered = into.double().index_add(1, I, 0.5 * g.double() @ exact)
    gradient = g.double().T @ x.double()[:, I]
    picked = add_from_columns(y, x, B, chosen, 0.5)
    add_to_columns(into, g, B.T, chosen, 0.5)
    return {
        "picked": error(picked[:, :k], x.double()[:, I]),
        "from": error(y, added),
        "to": error(into, scattered),
        "gradient": error(column_gradient(g, x, chosen), gradient),
        "gradient of the picked": error(gradient_of_picked(g, picked, k), gradient),
    }


def mixed(device: str) -> float:
    """Inputs in float32, outputs in bfloat16, as autocast has it."""
    chosen = columns(30, 4, device)
    x, B = inputs(9, 30, torch.float32, False, device).bfloat16().float(), inputs(20, 4, torch.bfloat16, False, device)
    y = torch.zeros(9, 20, dtype=torch.bfloat16, device=device)
    picked = add_from_columns(y, x, B, chosen)
    exact = x.double()[:, chosen.indices] @ B.double().T
    return max(error(y, exact), error(picked[:, :4], x.double()[:, chosen.indices]))


def repeated(device: str) -> float:
    """The same bits every time."""
    chosen = columns(30, 4, device)
    g, x = (inputs(900, size, torch.bfloat16, False, device) for size in (70, 30))
    first = column_gradient(g, x, chosen)
    return float(not all(torch.equal(column_gradient(g, x, chosen), first) for _ in range(3)))


if __name__ == "__main__":
    device = sys.argv[1]
    cases = {f"{m}x{n} {k} {dtype}": case((m, n), k, dtype, device) for (m, n), k in CASES for dtype in DTYPES}
    print(json.dumps({"cases": cases, "others": {"mixed": mixed(device), "repeated": repeated(device)}}))
