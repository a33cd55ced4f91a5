"""Entropic optimal transport between a target sample and a pool of millions, in memory that does not grow with both.

Sinkhorn in the log domain, with uniform weights a = 1/n on the target's x₁…xₙ and b = 1/m on the pool's y₁…yₘ:

    OT = max over f, g of  Σᵢ a fᵢ + Σⱼ b gⱼ  =  ⟨P, C⟩ + ε KL(P ‖ a ⊗ b)
    gⱼ = −ε log Σᵢ a exp((fᵢ − Cᵢⱼ)/ε)            so that every pool row of the plan sums to b
    fᵢ ← fᵢ + ε log(a / Σⱼ Pᵢⱼ)                    the Sinkhorn step, from what the plan gives target i

Only the n numbers f are iterated on. As C = |x|² + |y|² − 2 x·y, and |y|² is the same for all targets, b Pᵢ|ⱼ is the
softmax over i of 2 x·y/ε + (fᵢ − |xᵢ|²)/ε: one matrix product and one softmax of a block of the pool give its part of
Σⱼ Pᵢⱼ and its gⱼ, and one pass over the pool is one whole iteration. The product costs most: a pool, or a part of one,
that is small enough keeps it. What makes the passes few:

- Anderson's acceleration of the step (Anderson 1965; type II as in Walker and Ni 2011) over the last few f;
- f begins at the solution for a random part of the pool, whose passes cost a fraction;
- where ε is small, that solution is reached through larger ε (ε-scaling; Schmitzer 2019, section 3).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra.errors import InvalidInput
from training.selection.rows import Rows, blocks, require_finite, require_matching, taken

_BLOCK_NUMBERS = 2**21  # of a block of the cost matrix: 8 MiB in float32
_BLOCK_NUMBERS_ON_GPU = 2**26
_KEPT_NUMBERS = 2**27  # most products x·y that are kept from pass to pass: 512 MiB in float32
_MEMORY = 6  # differences that Anderson's acceleration looks back on
_SAMPLE = 2**16  # most rows of the pool that f is first found on
_SMALLEST_SHARE = 8  # the sample is at most this part of the pool
_SMALL_EPSILON = 0.02  # ε, in mean costs, above which Sinkhorn needs no ε-scaling
_SCALING = 4.0


@dataclass(frozen=True)
class Transport:
    """The dual solution. f and g have an additive constant in common, f + c and g − c, which is as it came.

    Args:
        f: potential of each target (n), float64.
        g: potential of each candidate (m), on the CPU; exact for `f`: the pool's marginal has no error.
        cost: ⟨P, C⟩ + ε KL(P ‖ a ⊗ b) at these potentials, the mean of f plus the mean of g; never above the optimum.
        mean_cost: of the squared Euclidean distance over all pairs.
        epsilon: ε in units of the cost.
        passes: over the whole pool, those over its sample counted by its share; the one that checks rows is not.
        marginal_error: Σᵢ |Σⱼ Pᵢⱼ − 1/n|, between 0 and 2.
        converged: whether that is within the tolerance.
        warning: empty, or what did not go well and what to do about it.
    """

    f: Tensor
    g: Tensor
    cost: float
    mean_cost: float
    epsilon: float
    passes: float
    marginal_error: float
    converged: bool
    warning: str = ""


@dataclass(frozen=True)
class _Problem:
    """Target (n, d) and pool around the target's mean, which loses fewer digits; distances stay what they are."""

    target: Tensor
    centre: Tensor
    pool: Rows
    squares: Tensor  # |y|² of the pool (m)
    mean_cost: float
    block_rows: int
    products: Tensor | None = None  # y·x of all pairs (m, n)


@dataclass(frozen=True)
class _Iterate:
    f: Tensor
    g: Tensor
    marginal: Tensor  # n × Σⱼ Pᵢⱼ: all ones at the solution

    @property
    def error(self) -> float:
        return float((self.marginal - 1).abs().mean())

    @property
    def cost(self) -> float:
        return float(self.f.mean() + self.g.double().mean())


def solve(
    target: Tensor,
    pool: Rows,
    *,
    epsilon: float = 0.05,
    tolerance: float = 1e-3,
    most_passes: int = 200,
    block_rows: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Transport:
    """Entropic optimal transport with squared Euclidean cost.

    Computes with the dtype (float32, or float64 for tolerances below 1e-6) and on the device of `target`; memory is
    O(block_rows · (n + d) + n · d + m), and at most 512 MiB (1 GiB in float64) of products that are kept.

    Args:
        target: (n, d).
        pool: (m, d), of any dtype; read in blocks, and once at random rows.
        epsilon: of the entropy, as a fraction of the mean cost.
        tolerance: of the marginal error at which to stop.
        most_passes: over the whole pool, and as many over its sample for each ε on the way.
        block_rows: of the pool in memory at a time; by default so many that a block of costs stays small.
        seed: of the sample that f is first found on.
        on_progress: told (passes over the whole pool, most_passes), and `most_passes` of it at the end.

    Raises:
        InvalidInput: shapes that do not fit, fewer than two candidates, a row that is not finite (named), one point.
    """
    require_matching(target, pool)
    if not 0 < epsilon < math.inf or not 0 < tolerance < math.inf:
        raise InvalidInput(f"epsilon {epsilon} and tolerance {tolerance} must be above 0.", "0.05 and 0.001 are usual.")
    target = target.to(torch.promote_types(target.dtype, torch.float32))
    with torch.no_grad():
        problem = _kept(_prepared(target, pool, block_rows or _default_rows(target)))
        f, share = _begun(problem, epsilon, tolerance, most_passes, seed)
        told = (lambda passes: on_progress(passes, most_passes)) if on_progress else None
        last, passes = _iterated(problem, f, epsilon * problem.mean_cost, tolerance, most_passes, told)
    if on_progress:
        on_progress(most_passes, most_passes)
    converged = last.error <= tolerance
    return Transport(
        f=last.f,
        g=last.g,
        cost=last.cost,
        mean_cost=problem.mean_cost,
        epsilon=epsilon * problem.mean_cost,
        passes=passes + share,
        marginal_error=last.error,
        converged=converged,
        warning="" if converged else _warning(last.error, tolerance, passes, target.dtype),
    )


def _default_rows(target: Tensor) -> int:
    numbers = _BLOCK_NUMBERS_ON_GPU if target.device.type == "cuda" else _BLOCK_NUMBERS
    return max(1, numbers // target.shape[0])


def _warning(error: float, tolerance: float, passes: int, dtype: torch.dtype) -> str:
    remedy = "a larger epsilon or more passes"
    if dtype == torch.float32 and error < 1e-4:
        remedy = "a target in float64, or a larger tolerance"
    return (
        f"Optimal transport has not converged after {passes} passes: a marginal error of {error:.2g} is left, where "
        f"{tolerance:.2g} was asked for. The potentials are approximate; {remedy} would help."
    )


def _prepared(target: Tensor, pool: Rows, block_rows: int) -> _Problem:
    """One pass: |y|², the mean cost and whether every row is finite."""
    require_finite(target, "target")
    centre = target.mean(0)
    target = target - centre
    squares = torch.empty(pool.shape[0], dtype=target.dtype)
    total = torch.zeros_like(centre, dtype=torch.float64)
    for place, block in blocks(pool, block_rows, target):
        require_finite(block, "candidate pool", place.start)
        block -= centre
        squares[place] = block.square().sum(1).cpu()
        total += block.sum(0)
    # The mean of x·y is a product of means, and that of the centred target is zero but for rounding.
    product = float(target.double().mean(0) @ total) / len(squares)
    mean_cost = float(target.double().square().sum(1).mean() + squares.double().mean()) - 2 * product
    if not mean_cost > 0:
        raise InvalidInput("All embeddings, target's and pool's, are one point.", "Is the encoder a trained one?")
    return _Problem(target, centre, pool, squares, mean_cost, block_rows)


def _begun(problem: _Problem, epsilon: float, tolerance: float, most_passes: int, seed: int) -> tuple[Tensor, float]:
    """f to begin with, and the passes that it cost: the solution on a sample, through larger ε where ε is small."""
    n, m = len(problem.target), len(problem.squares)
    f = torch.zeros(n, dtype=torch.float64, device=problem.target.device)
    scales = [epsilon * _SCALING**k for k in range(_scalings(epsilon), 0, -1)]
    part = problem
    if (size := min(m // _SMALLEST_SHARE, _SAMPLE)) >= _SMALLEST_SHARE * n:
        part = _part(problem, np.sort(np.random.default_rng(seed).choice(m, size, replace=False)))
        scales.append(epsilon)
    done = 0
    for scale in scales:  # loosely, as neither a larger ε nor a sample has the potentials that are wanted
        last, passes = _iterated(part, f, scale * problem.mean_cost, max(tolerance, 1e-2), most_passes)
        f, done = last.f, done + passes
    return f, done * len(part.squares) / m


def _scalings(epsilon: float) -> int:
    return max(0, math.ceil(math.log(_SMALL_EPSILON / epsilon, _SCALING)))


def _part(problem: _Problem, which: NDArray[np.int64]) -> _Problem:
    rows = taken(problem.pool, which, problem.target)
    return _kept(replace(problem, pool=rows, squares=problem.squares[which], products=None))


def _kept(problem: _Problem) -> _Problem:
    """With the products of all pairs in memory, where that is little."""
    m, n = len(problem.squares), len(problem.target)
    if m * n > _KEPT_NUMBERS:
        return problem
    products = problem.target.new_empty(m, n)
    for place, block in _products(problem):
        products[place] = block
    return replace(problem, products=products)


def _products(problem: _Problem) -> Iterator[tuple[slice, Tensor]]:
    """y·x (rows, n) of each block of the pool, with its place; overwritten by the next one unless they are kept."""
    if problem.products is not None:
        for begin in range(0, len(problem.products), problem.block_rows):
            place = slice(begin, begin + problem.block_rows)
            yield place, problem.products[place]
        return
    room = problem.target.new_empty(min(problem.block_rows, len(problem.squares)), len(problem.target))
    for place, block in blocks(problem.pool, problem.block_rows, problem.target):
        block -= problem.centre
        yield place, torch.mm(block, problem.target.T, out=room[: len(block)])


def _iterated(
    problem: _Problem,
    f: Tensor,
    epsilon: float,
    tolerance: float,
    most_passes: int,
    told: Callable[[int], None] | None = None,
) -> tuple[_Iterate, int]:
    """Sinkhorn steps, accelerated, until the marginal error is within the tolerance; and how many passes it took."""
    tiny = torch.finfo(problem.target.dtype).tiny
    iterates: list[Tensor] = []
    steps: list[Tensor] = []
    last = None
    for passes in range(1, most_passes + 1):
        found = _pass(problem, f, epsilon)
        if told:
            told(passes)
        if len(iterates) > 1 and last and found.error > last.error and found.cost <= last.cost:
            # Extrapolated too far. A plain step, unlike this one, always raises the cost, which has one maximum.
            f, iterates, steps = iterates[-1] + steps[-1], [], []
            continue
        last = found
        if last.error <= tolerance:
            break
        # A target that nothing reaches has a marginal of 0, and comes nearer by a bounded step.
        step = -epsilon * last.marginal.clamp_min(tiny).log()
        iterates, steps = [*iterates, f][-_MEMORY - 1 :], [*steps, step][-_MEMORY - 1 :]
        f = _accelerated(iterates, steps)
    assert last
    return last, passes


def _accelerated(iterates: list[Tensor], steps: list[Tensor]) -> Tensor:
    """f + r − (ΔF + ΔR) γ with γ = argmin |r − ΔR γ|, for the last iterate f, its step r, and what both changed by."""
    f, r = iterates[-1], steps[-1]
    if len(iterates) == 1:
        return f + r
    dF, dR = (torch.stack(values, 1).diff(dim=1) for values in (iterates, steps))
    gram = dR.T @ dR
    ridge = (1e-10 * gram.diagonal().sum()).clamp_min(1e-300)  # where steps are parallel, or no longer change
    gamma = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), dR.T @ r)
    extrapolated: Tensor = f + r - (dF + dR) @ gamma
    return extrapolated


def _pass(problem: _Problem, f: Tensor, epsilon: float) -> _Iterate:
    """The plan's marginals on the target, and g, for `f`: once over the pool."""
    target, n = problem.target, len(problem.target)
    bias = ((f - target.double().square().sum(1)) / epsilon).to(target.dtype)
    marginal = torch.zeros_like(f)
    g = torch.empty_like(problem.squares)
    logits = target.new_empty(min(problem.block_rows, len(g)), n)
    shares = torch.empty_like(logits)
    for place, products in _products(problem):
        z, p = logits[: len(products)], shares[: len(products)]
        torch.add(bias, products, alpha=2 / epsilon, out=z)
        torch.softmax(z, 1, out=p)
        marginal += p.sum(0)
        # log Σ exp z from the largest term and its share, without a second exponential of the block
        log_sum = z.amax(1) - p.amax(1).log()
        g[place] = problem.squares[place] - epsilon * (log_sum - math.log(n)).cpu()
    return _Iterate(f, g, marginal * (n / len(g)))
