"""GOT-D: the candidates that pull what a model has seen toward a target task, by the gradient of optimal transport.

Kang et al., "Get more for less: Principled data selection for warming up fine-tuning in LLMs", ICLR 2024
(arXiv 2405.02774), section 3; calibrated gradients as in LAVA (Just et al., ICLR 2023). A model that was pretrained on
something like the pool and is tuned lightly on a choice from it has seen λ · choice + (1 − λ) · pool. To first order in
λ, the choice that brings this nearest to the target is that of the smallest ∂OT(pool, target)/∂(weight of candidate j).
The gradient holds for small budgets; near-duplicates have near-equal scores and come together: remove them first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from training.selection.optimal_transport import Transport, solve
from training.selection.rows import Rows, require_budget, require_matching


@dataclass(frozen=True)
class GotdChoice:
    """What GOT-D chose.

    Args:
        rows: of the pool, best first (budget).
        scores: of every candidate (m), float64; comparable within this choice alone.
        transport: the solution that they come from; its `warning` is to be told.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]
    transport: Transport


def choose(
    target: Tensor,
    pool: Rows,
    budget: int,
    *,
    direction: Literal["toward", "away"] = "toward",
    epsilon: float = 0.05,
    tolerance: float = 1e-3,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> GotdChoice:
    """The `budget` candidates of the pool whose weight moves it most toward the target.

    Args:
        target: embeddings (n, d) of the target task's inputs; its dtype and device are computed with.
        pool: embeddings (m, d) of the candidates, by the same encoder.
        budget: how many to choose.
        direction: `away` chooses what moves the pool away from the target, such as one of toxic texts.
        epsilon: as for `optimal_transport.solve`.
        tolerance: as for `optimal_transport.solve`.
        seed: as for `optimal_transport.solve`.
        on_progress: as for `optimal_transport.solve`.

    Raises:
        InvalidInput: a budget below 1 or above the pool, or embeddings that `solve` refuses.
    """
    require_matching(target, pool)
    require_budget(budget, pool.shape[0])
    transport = solve(target, pool, epsilon=epsilon, tolerance=tolerance, seed=seed, on_progress=on_progress)
    scores = calibrated(transport.g)
    order = np.argsort(scores if direction == "toward" else -scores, kind="stable")
    return GotdChoice(order[:budget], scores, transport)


def calibrated(g: Tensor) -> NDArray[np.float64]:
    """sⱼ = gⱼ − Σₖ≠ⱼ gₖ / (m − 1): what weight moved onto j, evenly from all others, changes OT by per unit.

    The constant that g has in common with f falls out. Equals g m/(m − 1) − Σ g/(m − 1), so it ranks as g does.
    """
    potentials = g.double().numpy()
    m = len(potentials)
    scores: NDArray[np.float64] = (potentials - potentials.mean()) * (m / (m - 1))
    return scores
