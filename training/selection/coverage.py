"""What GOT-D is compared with: choices that cover the pool, that resemble the target, or that are left to chance."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.selection.rows import Rows, blocks, require_budget, require_finite, require_matching, taken

_BLOCK_NUMBERS = 2**21  # of a block of similarities
_BLOCK_ROWS = 2**14
_NEIGHBOURS = 10  # of each target to begin with


def random(candidates: int, budget: int, seed: int) -> NDArray[np.int64]:
    """`budget` different rows; a smaller budget with the same seed chooses the first of them.

    Raises:
        InvalidInput: a budget below 1 or above the number of candidates.
    """
    require_budget(budget, candidates)
    return np.random.default_rng(seed).permutation(candidates)[:budget]


def k_centre(pool: Rows, budget: int, *, seed: int = 0, device: str | torch.device = "cpu") -> NDArray[np.int64]:
    """Rows such that every candidate has a chosen one near: no choice of equal size has less than half the radius.

    Farthest-first traversal (Gonzalez 1985) under Euclidean distance: the first row is random, each next one is the
    candidate farthest from all chosen so far, the lowest row of equal ones. One pass over the pool for each.

    Raises:
        InvalidInput: a budget below 1 or above the pool, or a row that is not finite.
    """
    m = pool.shape[0]
    require_budget(budget, m)
    like = torch.empty(0, dtype=torch.float32, device=device)
    chosen = [int(np.random.default_rng(seed).integers(m))]
    nearest = torch.full((m,), torch.inf, device=device)  # squared distance to the nearest chosen row
    while True:
        centre = taken(pool, slice(chosen[-1], chosen[-1] + 1), like)
        for place, block in blocks(pool, _BLOCK_ROWS, like):
            if len(chosen) == 1:
                require_finite(block, "candidate pool", place.start)
            block -= centre
            nearest[place] = torch.minimum(nearest[place], block.square().sum(1))
        nearest[chosen[-1]] = -1  # never again, also where all that is left is a copy of what was chosen
        if len(chosen) == budget:
            return np.array(chosen, dtype=np.int64)
        chosen.append(int(nearest.argmax()))


def nearest_neighbours(target: Tensor, pool: Rows, budget: int) -> NDArray[np.int64]:
    """The nearest candidates by cosine, the targets taking turns: what TAPT-style selection does.

    Each target in turn takes its nearest candidate that nobody has taken, until the budget is spent. So many
    neighbours of each target are held as that needs, 10 to begin with, and one pass over the pool finds them.

    Args:
        target: (n, d); its dtype and device are computed with.
        pool: (m, d).
        budget: how many to choose.

    Raises:
        InvalidInput: shapes that do not fit, a budget below 1 or above the pool, or a row that is not finite.
    """
    require_matching(target, pool)
    require_budget(budget, pool.shape[0])
    require_finite(target, "target")
    held = min(pool.shape[0], max(_NEIGHBOURS, -(-budget // len(target))))
    while True:
        neighbours = _neighbours(target, pool, held)
        chosen = list(dict.fromkeys(neighbours.T.ravel().tolist()))[:budget]
        if len(chosen) == budget:
            return np.array(chosen, dtype=np.int64)
        held = min(pool.shape[0], 2 * held)


def _neighbours(target: Tensor, pool: Rows, held: int) -> NDArray[np.int64]:
    """(n, held): the rows nearest to each target, nearest first."""
    unit = torch.nn.functional.normalize(target.to(torch.promote_types(target.dtype, torch.float32)), dim=1)
    similarities = unit.new_empty(len(unit), 0)
    rows = torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device)
    for place, block in blocks(pool, max(1, _BLOCK_NUMBERS // len(unit)), unit):
        require_finite(block, "candidate pool", place.start)
        found = unit @ torch.nn.functional.normalize(block, dim=1).T
        numbers = torch.arange(place.start, place.stop, device=unit.device).expand_as(found)
        similarities, rows = torch.cat([similarities, found], 1), torch.cat([rows, numbers], 1)
        similarities, which = similarities.topk(min(held, similarities.shape[1]), dim=1)
        rows = rows.gather(1, which)
    return rows.cpu().numpy()
