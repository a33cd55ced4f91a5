"""Run by test_sparse_delta.py in a process of its own: prints, for each case, how far kernels and float64 are apart."""

import json
import sys

import torch
from torch import Tensor

from kernels.dispatch import runs_on_triton
from kernels.sparse_delta import (
    add_sparse_product,
    blocked_gradient,
    sampled_gradient,
    sparse_gradient,
    sparse_linear,
)
from kernels.sparse_plan import SparsePlan, planned
from tests.kernels.packed import DTYPES, error, inputs

# (m, n), entries: none, one, all; fewer and more than a program takes, of rows without any and of rows with many.
CASES = (((1, 1), 1), ((3, 5), 0), ((7, 5), 35), ((33, 70), 130), ((130, 65), 40), ((0, 4), 0), ((4, 0), 0))


def sparse(shape: tuple[int, int], k: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """η in any order, a third of it in one row; δ; and S, float64."""
    m, n = shape
    generator = torch.Generator().manual_seed(m * n + k)
    crowded = torch.randperm(n, generator=generator)[: k // 3] + (m // 2) * n
    free = torch.ones(m * n, dtype=torch.bool).index_fill(0, crowded, False).nonzero()[:, 0]
    others = free[torch.randperm(len(free), generator=generator)[: k - len(crowded)]]
    indices = torch.cat([crowded, others])[torch.randperm(k, generator=generator)]
    values = torch.randn(k, generator=generator)
    S = torch.zeros(m * n, dtype=torch.float64).index_put((indices,), values.double()).view(m, n)
    return indices.int().to(device), values.to(device), S.to(device)


def gradients(g: Tensor, x: Tensor, indices: Tensor, plan: SparsePlan) -> dict[str, float]:
    exact = (g.double().T @ x.double()).reshape(-1)[indices.long()]
    found = {
        "sampled": sampled_gradient(g, x, plan),
        "in blocks": blocked_gradient(g, x, plan),
        "chosen": sparse_gradient(g, x, plan),
        "of the transposed": sampled_gradient(x, g, plan.transposed),
    }
    return {f"gradient {name}": error(gradient, exact) for name, gradient in found.items()}


def case(shape: tuple[int, int], k: int, name: str, device: str) -> dict[str, float | bool]:
    m, n = shape
    dtype = getattr(torch, name)
    indices, values, S = sparse(shape, k, device)
    plan = planned(indices, shape)
    found: dict[str, float | bool] = {"kernel": runs_on_triton(values)}
    for tokens, strided in ((1, False), (19, True), (150, False), (0, False)):
        g, x = inputs(tokens, m, dtype, strided, device), inputs(tokens, n, dtype, strided, device)
        found |= {f"{what}, {tokens} tokens": each for what, each in gradients(g, x, indices, plan).items()}
        y = inputs(tokens, m, dtype, False, device)
        total = y.double() + x.double() @ S.T
        add_sparse_product(y, x, values, plan)
        found[f"product, {tokens} tokens"] = error(y, total)
    return found


def parts_of_tokens(device: str) -> float:
    """More tokens than go through the cache at a time, of which sums are added."""
    from kernels import sparse_delta

    indices, _, _ = sparse((40, 50), 60, device)
    g, x = inputs(700, 40, torch.float32, False, device), inputs(700, 50, torch.float32, False, device)
    whole, sparse_delta._CACHED = sparse_delta._CACHED, 1
    try:
        return gradients(g, x, indices, planned(indices, (40, 50)))["gradient sampled"]
    finally:
        sparse_delta._CACHED = whole


def repeated(device: str) -> float:
    """The same bits every time."""
    indices, _, _ = sparse((40, 50), 300, device)
    g, x = inputs(300, 40, torch.float32, False, device), inputs(300, 50, torch.float32, False, device)
    plan = planned(indices, (40, 50))
    first = sampled_gradient(g, x, plan)
    return float(not all(torch.equal(sampled_gradient(g, x, plan), first) for _ in range(3)))


def layer(tokens: int, device: str) -> float:
    """A layer and its three gradients, against autograd in float64; few tokens and many go different ways."""
    m, n, k = 30, 40, 50
    indices, values, _ = sparse((m, n), k, device)
    W, b, x, up = (
        torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device)
        for shape in ((m, n), (m,), (2, tokens, n), (2, tokens, m))
    )
    mine = [tensor.clone().requires_grad_() for tensor in (x, values, b)]
    exact = [tensor.double().requires_grad_() for tensor in (x, values, b)]
    y = sparse_linear(mine[0], mine[1], W, planned(indices, (m, n)), mine[2])
    S = torch.zeros(m * n, dtype=torch.float64, device=device).index_put((indices.long(),), exact[1]).view(m, n)
    expected = exact[0] @ (W.double() + S).T + exact[2]
    (y * up).sum().backward()
    (expected * up).sum().backward()
    return max(error(y, expected), *(error(a.grad, b.grad) for a, b in zip(mine, exact, strict=True)))


if __name__ == "__main__":
    device = sys.argv[1]
    cases = {f"{m}x{n} {k} {dtype}": case((m, n), k, dtype, device) for (m, n), k in CASES for dtype in DTYPES}
    others = {
        "parts of tokens": parts_of_tokens(device),
        "repeated": repeated(device),
        "few tokens": layer(1, device),
        "many tokens": layer(100, device),
    }
    print(json.dumps({"cases": cases, "others": others}))
