"""Sums, inner products and cuts of low-rank updates, against dense matrices in float64."""

import pytest
import torch
from torch.testing import assert_close

from training import low_rank
from training.low_rank import LowRank, norm, stacked, truncated


def random_update(seed: int, m: int = 12, n: int = 9, rank: int = 4) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))
    return LowRank(A, B)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 5), (4, 20, 1)])
def test_stacked_is_the_sum(ranks: tuple[int, ...]) -> None:
    updates = [random_update(seed, rank=rank) for seed, rank in enumerate(ranks)]
    coefficients = [0.5, -2.0, 0.0][: len(ranks)]
    total = stacked(updates, coefficients)
    assert total.rank == sum(ranks)
    dense = sum(c * update.B @ update.A for c, update in zip(coefficients, updates, strict=True))
    assert_close(total.dense(), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [(3, 3), (1, 30)])
def test_inner_and_norm_are_those_of_the_matrices(ranks: tuple[int, int]) -> None:
    a, b = (random_update(seed, rank=rank) for seed, rank in enumerate(ranks))
    assert a.inner(b) == pytest.approx(float((a.dense() * b.dense()).sum()))
    assert norm(a) == pytest.approx(float(a.dense().norm()))
    assert norm(stacked([a, a], [1, -1])) < 1e-13 * norm(a)


@pytest.mark.parametrize("m, n, rank", [(12, 9, 4), (3, 20, 8), (20, 3, 8), (5, 5, 11), (1, 7, 2), (1, 1, 1)])
@pytest.mark.parametrize("kept", [1, 2, 3, 100])
def test_a_cut_of_factors_is_eckart_and_youngs(m: int, n: int, rank: int, kept: int) -> None:
    update = random_update(0, m, n, rank)
    S = torch.linalg.svdvals(update.dense())
    for source in (update, update.dense()):
        part = truncated(source, kept, None)
        assert_close(float((part.update.dense() - update.dense()).norm()), float(S[kept:].norm()), rtol=0, atol=1e-11)
        assert_close(part.error, float(S[kept:].norm()), rtol=0, atol=1e-11)
        assert_close(part.norm, float(S.norm()), rtol=1e-12, atol=0)
        assert part.update.rank <= max(kept, 1)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_keeps_the_lowest_rank_that_holds_it(energy: float) -> None:
    update = random_update(1, rank=6)
    shares = torch.linalg.svdvals(update.dense()).square().cumsum(0)
    wanted = next(k for k in range(1, 7) if shares[k - 1] / shares[-1] >= energy - 1e-14)
    for source in (update, update.dense()):
        part = truncated(source, None, energy)
        assert part.update.rank == wanted
        assert part.error**2 <= (1 - energy + 1e-12) * part.norm**2
    assert truncated(update, 2, energy).update.rank == min(2, wanted)


@pytest.mark.parametrize("flat", [True, False])
def test_the_leading_triplets_of_a_large_matrix_are_nearly_the_best(
    flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "EXACT", 8)
    update = torch.randn(130, 110, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if not flat:
        update = update * torch.logspace(0, -3, 110, dtype=torch.float64)
    best = float(torch.linalg.svdvals(update)[5:].norm())
    part = truncated(update, 5, None)
    assert part.update.rank == 5
    assert part.error == pytest.approx(float((part.update.dense() - update).norm()))
    assert best <= part.error * (1 + 1e-12) < 1.002 * best
    assert part.norm == pytest.approx(float(update.norm()))
    assert not truncated(torch.zeros(130, 110, dtype=torch.float64), 5, None).update.dense().any()


def test_no_update_stays_none() -> None:
    nothing = LowRank(torch.zeros(3, 5, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64))
    for rank, energy in ((1, None), (None, 0.5), (2, 1.0), (None, None)):
        part = truncated(nothing, rank, energy)
        assert (part.error, part.norm) == (0, 0)
        assert not part.update.dense().any() and part.update.rank >= 1
