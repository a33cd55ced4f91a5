"""Updates of low rank, ΔW = BA, added, compared and cut without forming ΔW."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-24  # squared, relative: what float64 leaves of a singular value that is zero
EXACT = 1024  # the least of m and n up to which a dense matrix is decomposed whole
SPARE, ITERATIONS = 16, 4  # of the subspace iteration


@dataclass(frozen=True)
class LowRank:
    """ΔW = BA in float64, every scale folded in.

    Args:
        A: [r, n].
        B: [m, r]; r may be 0, which is no change.
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """r, of the factors; ΔW's own may be lower."""
        return len(self.A)

    def dense(self) -> Tensor:
        """ΔW [m, n]."""
        return self.B @ self.A

    def inner(self, other: "LowRank") -> float:
        """⟨ΔW, ΔW'⟩ = tr((BᵀB')(A'Aᵀ)), at the cost of the factors."""
        return float(((self.B.T @ other.B) * (self.A @ other.A.T)).sum())


@dataclass(frozen=True)
class Part:
    """One layer of a merged LoRA.

    Args:
        update: what is stored.
        error: ‖update − the update that is meant‖, Frobenius.
        norm: ‖the update that is meant‖.
    """

    update: LowRank
    error: float
    norm: float


def stacked(updates: Sequence[LowRank], coefficients: Sequence[float]) -> LowRank:
    """Σ cᵢ BᵢAᵢ exactly, of rank Σ rᵢ: A = [c₁A₁; c₂A₂; …], B = [B₁, B₂, …] (FLoRA, arXiv 2409.05976)."""
    scaled = [c * update.A for c, update in zip(coefficients, updates, strict=True)]
    return LowRank(torch.cat(scaled), torch.cat([update.B for update in updates], dim=1))


def norm(update: LowRank) -> float:
    """‖BA‖ (Frobenius), from the triangles of B = Q_B R_B and Aᵀ = Q_A R_A: accurate where BA nearly vanishes."""
    return float(torch.linalg.matrix_norm(_triangle(update.B) @ _triangle(update.A.T).T))


def truncated(update: LowRank | Tensor, rank: int | None, energy: float | None) -> Part:
    """The nearest update of lower rank (Eckart and Young): the leading singular triplets, √S on either factor.

    Of factors, B = Q_B R_B and Aᵀ = Q_A R_A, only R_B R_Aᵀ = USVᵀ [r, r] is decomposed; ΔW is never formed. Of a large
    dense ΔW, for a low rank, subspace iteration finds the leading triplets; the error that is told is still its own.

    Args:
        update: factors, or ΔW [m, n] itself.
        rank: the most that is kept; at least one triplet is.
        energy: the least share of ‖ΔW‖² that is kept, by as few triplets as it takes. Neither given: factors are left
            as they are, and all of ΔW's rank is kept.
    """
    if isinstance(update, LowRank):
        if energy is None and (rank is None or rank >= update.rank):
            return Part(update, 0.0, norm(update))
        left, R_B = torch.linalg.qr(update.B)
        right, R_A = torch.linalg.qr(update.A.T)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        U, Vh = left @ U, Vh @ right.T
    elif rank is not None and energy is None and min(update.shape) > max(EXACT, 4 * (rank + SPARE)):
        return _leading(update, rank)
    else:
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    left_out = S.square().flip(0).cumsum(0).flip(0)  # ‖·‖² by the rank that would leave it out
    kept = len(S) if rank is None else rank
    if energy is not None and len(S):
        kept = min(kept, int((left_out > (1 - energy + ROUNDING) * left_out[0]).sum()))
    kept = max(kept, 1)
    root = S[:kept].sqrt()
    part = LowRank(root[:, None] * Vh[:kept], U[:, :kept] * root)
    return Part(part, float(torch.linalg.vector_norm(S[kept:])), float(torch.linalg.vector_norm(S)))


def _leading(update: Tensor, rank: int) -> Part:
    """By subspace iteration from a random start (Halko et al., arXiv 0909.4061, algorithm 4.4)."""
    generator = torch.Generator(update.device).manual_seed(0)
    start = torch.randn(update.shape[1], rank + SPARE, generator=generator, dtype=update.dtype, device=update.device)
    basis = torch.linalg.qr(update @ start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(update @ torch.linalg.qr(update.T @ basis).Q).Q
    U, S, Vh = torch.linalg.svd(basis.T @ update, full_matrices=False)
    root = S[:rank].sqrt()
    part = LowRank(root[:, None] * Vh[:rank], basis @ U[:, :rank] * root)
    whole = float(update.square().sum())
    return Part(part, math.sqrt(max(whole - float(S[:rank].square().sum()), 0.0)), math.sqrt(whole))


def _triangle(matrix: Tensor) -> Tensor:
    triangle: Tensor = torch.linalg.qr(matrix, mode="r").R
    return triangle
