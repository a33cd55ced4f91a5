"""Hidden states, heads and teachers at random, and how far a loss and its gradients are from those in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cross_entropy import IGNORE
from kernels.linear_cross_entropy import Head, SoftTargets, linear_cross_entropy, linear_cross_entropy_reference


@dataclass(frozen=True)
class Case:
    """A loss of a head.

    Args:
        rows: N.
        width: H.
        vocabulary: V.
        bias: whether there is one.
        scale: γ.
        cap: c.
        soft: τ and w, or None.
        strided: whether hidden states and weights are parts of wider matrices, that begin nowhere in particular.
    """

    rows: int
    width: int
    vocabulary: int
    bias: bool = False
    scale: float = 1.0
    cap: float | None = None
    soft: tuple[float, float] | None = None
    strided: bool = False


KINDS = (
    Case(7, 5, 259),
    Case(9, 40, 1100, bias=True, scale=0.5, cap=3.0, strided=True),
    Case(6, 33, 1030, bias=True, scale=2.0, soft=(2.0, 0.5)),
    Case(5, 16, 300, cap=5.0, soft=(1.0, 0.3), strided=True),
    Case(4, 8, 70, soft=(2.0, 1.0)),
    Case(3, 4, 1, bias=True),
    Case(0, 8, 20, bias=True, soft=(2.0, 0.5)),
)


def inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, SoftTargets | None, Tensor]:
    """Hidden states, weight and, perhaps, bias; targets; a teacher; and what comes from above."""
    generator = torch.Generator().manual_seed(case.rows * 1009 + case.vocabulary)

    def random(*shape: int) -> Tensor:
        made = torch.randn(*shape[:-1], shape[-1] + 3, generator=generator).to(device, dtype)
        return made[..., 1:-2] if case.strided else made[..., 1:-2].contiguous()

    tensors = [random(case.rows, case.width), random(case.vocabulary, case.width)]
    if case.width > 100:  # logits of a model's size, not of hundreds
        tensors[1].mul_(3 / case.width**0.5)
    if case.bias:
        tensors.append(random(case.vocabulary).contiguous())
    targets = torch.randint(case.vocabulary, (case.rows,), generator=generator)
    targets[1::4] = IGNORE
    soft = None
    if case.soft:
        logits = torch.randn(case.rows, case.vocabulary, generator=generator).mul(3)
        logits, tokens = logits.topk(min(5, case.vocabulary), dim=-1)
        soft = SoftTargets(tokens.to(device), logits.to(device), *case.soft)
    return tensors, targets.to(device), soft, torch.randn(case.rows, generator=generator).to(device)


def compared(case: Case, name: str, device: str) -> dict[str, float]:
    """How far the loss and the gradients of hidden states, weight and bias are apart, of the largest number."""
    dtype = getattr(torch, name)
    tensors, targets, soft, upstream = inputs(case, dtype, device)

    def run(loss: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        head = Head(leaves[1], leaves[2] if case.bias else None, case.scale, case.cap)
        found = loss(leaves[0], head, targets, soft)
        (found * upstream).sum().backward()
        return [found.detach(), *(leaf.grad for leaf in leaves)]

    ours, exact = run(linear_cross_entropy, dtype), run(linear_cross_entropy_reference, torch.float64)
    names = ("loss", "gradient", "weight's gradient", "bias's gradient")
    return {name: error(*pair) for name, *pair in zip(names, ours, exact, strict=False)}


def error(found: Tensor, exact: Tensor) -> float:
    """The largest difference, in units of the largest number, or of 1 where all are smaller."""
    if not exact.numel():
        return 0.0 if found.shape == exact.shape else float("inf")
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1)).item()
