"""Run by test_cross_entropy.py in a process of its own: prints, for each case, how far kernel and reference differ."""

import json
import sys

import torch

from kernels.cross_entropy import IGNORE, _CrossEntropy, cross_entropy, cross_entropy_reference
from kernels.dispatch import runs_on_triton


def case(N: int, V: int, dtype: torch.dtype, scale: float, strided: bool, device: str) -> dict[str, float | bool]:
    generator = torch.Generator().manual_seed(N * 10_007 + V)
    wide = (torch.randn(N, V + 3, generator=generator) * scale).to(device, dtype)
    logits = wide[:, :V] if strided else wide[:, :V].contiguous()
    targets = torch.randint(V, (N,), generator=generator).to(device)
    targets[N // 2 + 1 :: 2] = IGNORE
    weights = torch.rand(N, generator=generator).to(device)

    exact = logits.detach().double().requires_grad_()
    truth = cross_entropy_reference(exact, targets)  # the reference computes in float32 …
    oracle = torch.logsumexp(exact, 1) - exact.gather(1, targets.clamp(min=0)[:, None])[:, 0]  # … this in float64
    oracle = torch.where(targets == IGNORE, 0.0, oracle)
    (oracle * weights).sum().backward()

    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    ours = cross_entropy(leaf * 1, targets)
    assert ours.dtype == torch.float32
    (ours * weights).sum().backward()
    return {
        "kernel": runs_on_triton(logits),
        "loss": (ours.double() - oracle).abs().max().item(),
        "reference": (truth.double() - oracle).abs().max().item(),
        "gradient": (leaf.grad.double() - exact.grad).abs().max().item(),
    }


def reuse_is_refused(device: str) -> bool:
    logits = torch.randn(2, 5, device=device, requires_grad=True) * 1
    loss = cross_entropy(logits, torch.tensor([1, 2], device=device)).sum()
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


def expanded(device: str) -> float:
    """How far the gradient of one row is off that is shown as three."""
    row = torch.randn(1, 7, device=device, requires_grad=True)
    targets = torch.tensor([1, 2, 2], device=device)
    gradients = [
        torch.autograd.grad(loss(row.expand(3, 7), targets).sum(), row)[0]
        for loss in (cross_entropy, cross_entropy_reference)
    ]
    return (gradients[0] - gradients[1]).abs().max().item()


def unknown(device: str) -> list[list[float]]:
    """The losses and gradients of rows, of which the middle ones have targets that there are not."""
    logits = torch.zeros(4, 3, device=device, requires_grad=True)
    targets = torch.tensor([1, 3, -1, IGNORE], device=device)
    losses = _CrossEntropy.apply(logits * 1, targets, IGNORE)  # on the CPU they are refused before
    losses.sum().backward()
    return [losses.tolist(), logits.grad.sum(1).tolist()]


if __name__ == "__main__":
    device = sys.argv[1]
    results = {
        f"{N}x{V} {dtype} x{scale:g} {'strided' if strided else 'dense'}": case(
            N, V, getattr(torch, dtype), scale, strided, device
        )
        for N in (1, 3)
        for V in (1, 7, 1000, 4097, 9000)
        for dtype in ("float32", "bfloat16", "float16")
        for scale, strided in ((1, False), (30, True))
    }
    others = {"reuse_is_refused": reuse_is_refused(device), "expanded": expanded(device), "unknown": unknown(device)}
    print(json.dumps({"cases": results, **others}))
