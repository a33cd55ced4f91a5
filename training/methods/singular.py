"""Leading singular vectors of a matrix, exact or randomised."""

import torch
from torch import Tensor

EXACT_UP_TO = 512  # min(m, n) up to which a full decomposition costs less than it is worth to avoid


def leading(matrix: Tensor, rank: int, iterations: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], S [r] descending, Vᵀ [r, n] of the r largest singular values, in float32.

    Args:
        matrix: [m, n].
        rank: r ≤ min(m, n).
        iterations: of the randomised method's subspace (Halko et al., arXiv 0909.4061), drawn from the global
            generator; None for the full decomposition, which is also taken of what is small.
    """
    matrix = matrix.detach().float()
    if iterations is None or min(matrix.shape) <= EXACT_UP_TO:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    # A few directions more than are wanted make the last wanted ones accurate.
    U, S, V = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=iterations)
    return U[:, :rank], S[:rank], V[:, :rank].T
