"""Run by test_linear_cross_entropy.py in a process of its own: prints, for each case, how far from float64 it is."""

import json
import sys

import torch

from kernels.dispatch import runs_on_triton
from kernels.linear_cross_entropy import Head, SoftTargets, linear_cross_entropy
from tests.kernels.heads import KINDS, Case, compared

DTYPES = ("float32", "bfloat16", "float16")
LARGE = (Case(20_000, 24, 500), Case(700, 576, 9001, bias=True), Case(300, 2048, 20_000, soft=(2.0, 0.5)))


def unknown_tokens(device: str) -> list[float]:
    """The losses of rows whose target, or teacher's token, is none of five; on a GPU nobody waits to refuse them."""
    hidden, head = torch.ones(2, 4, device=device), Head(torch.ones(5, 4, device=device))
    tokens, logits = torch.tensor([[0], [-1]], device=device), torch.ones(2, 1, device=device)
    of_target = linear_cross_entropy(hidden, head, torch.tensor([5, 2], device=device))[0]
    soft = SoftTargets(tokens, logits, 1.0, 0.5)
    return [of_target.item(), linear_cross_entropy(hidden, head, torch.tensor([0, 2], device=device), soft)[1].item()]


def captured(device: str) -> float:
    """Forward and backward within a CUDA graph, which nothing may wait in."""
    hidden = torch.randn(64, 32, device=device, requires_grad=True)
    head, targets = Head(torch.randn(300, 32, device=device)), torch.randint(300, (64,), device=device)

    def step() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets).sum(), hidden)
        return gradient

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    return (found - expected).abs().max().item()


if __name__ == "__main__":
    device = sys.argv[1]
    native = device != "cpu"
    cases = [(f"{case} {name}", compared(case, name, device)) for name in DTYPES for case in KINDS]
    if native:
        cases += [(f"{case} {name}", compared(case, name, device)) for name in DTYPES for case in LARGE]
    report = {
        "kernel": runs_on_triton(torch.ones(1, device=device)),
        "cases": dict(cases),
        "unknown tokens": unknown_tokens(device) if native else None,
        "captured": captured(device) if native else None,
    }
    print(json.dumps(report))
