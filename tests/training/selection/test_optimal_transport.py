import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import InvalidInput
from training.selection import optimal_transport
from training.selection.optimal_transport import solve


def points(n: int, m: int, d: int, seed: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """A target and a pool that lies elsewhere, and wider."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(n, d, generator=generator, dtype=dtype)
    return target, 1.5 * torch.randn(m, d, generator=generator, dtype=dtype) + 0.5


def costs(target: torch.Tensor, pool: torch.Tensor) -> np.ndarray:
    """(n, m), by differences."""
    return (target[:, None] - pool[None]).square().sum(2).double().numpy()


def plain_sinkhorn(C: np.ndarray, epsilon: float, tolerance: float) -> tuple[np.ndarray, np.ndarray, int]:
    """f, g and the iterations of the textbook's dense algorithm in the log domain."""
    n, m = C.shape
    f = np.zeros(n)
    for iteration in range(1, 100_000):
        g = -epsilon * (np.logaddexp.reduce((f[:, None] - C) / epsilon, axis=0) - math.log(n))
        plan = np.exp((f[:, None] + g - C) / epsilon) / (n * m)
        if np.abs(plan.sum(1) - 1 / n).sum() <= tolerance:
            return f, g, iteration
        f = -epsilon * (np.logaddexp.reduce((g - C) / epsilon, axis=1) - math.log(m))
    raise AssertionError("no convergence")


def centred(values) -> np.ndarray:
    """Without the additive constant that potentials have in common."""
    values = np.asarray(values, dtype=np.float64)
    return values - values.mean()


@pytest.mark.parametrize("epsilon", [0.2, 0.05, 0.01])
@pytest.mark.parametrize(("n", "m", "d"), [(12, 40, 3), (40, 12, 5), (1, 5, 2), (7, 2, 2)])
def test_potentials_are_those_of_pots_log_sinkhorn(n, m, d, epsilon):
    target, pool = points(n, m, d, seed=n)
    C = costs(target, pool)
    found = solve(target, pool, epsilon=epsilon, tolerance=1e-10)
    assert found.converged and found.mean_cost == pytest.approx(C.mean())
    _, log = ot.bregman.sinkhorn_log([], [], C, epsilon * C.mean(), numItermax=20_000, stopThr=1e-12, log=True)
    assert np.allclose(centred(found.f), found.epsilon * centred(log["log_u"]), atol=1e-6)
    assert np.allclose(centred(found.g), found.epsilon * centred(log["log_v"]), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "m"), [(5, 7), (7, 16), (11, 6), (1, 4)])
def test_small_epsilon_gives_the_duals_of_the_linear_programme(n, m, seed):
    target, pool = points(n, m, 3, seed)
    C = costs(target, pool)
    plan, log = ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), C, log=True)
    # n and m have no common divisor, so the optimal plan is a spanning tree, and its duals are the only ones.
    assert (plan > 1e-9).sum() == n + m - 1
    found = solve(target, pool, epsilon=1e-6, tolerance=1e-4, most_passes=5000)
    assert found.converged
    assert np.allclose(centred(found.f), centred(log["u"]), atol=1e-4)
    assert np.allclose(centred(found.g), centred(log["v"]), atol=1e-4)
    assert found.cost == pytest.approx(log["cost"], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [0, 2**27])
def test_blocks_and_dense_agree_and_the_plan_has_the_marginals(monkeypatch, dtype, kept):
    monkeypatch.setattr(optimal_transport, "_KEPT_NUMBERS", kept)
    target, pool = points(20, 300, 6, seed=1, dtype=dtype)
    C = costs(target, pool)
    found = {rows: solve(target, pool, epsilon=0.05, tolerance=1e-6, block_rows=rows) for rows in (1, 7, 300, 1000)}
    _, g, _ = plain_sinkhorn(C, 0.05 * C.mean(), 1e-7)
    for each in found.values():
        assert each.converged
        assert np.allclose(centred(each.g), centred(g), atol=1e-4)
        f, own = each.f.numpy(), each.g.double().numpy()
        plan = np.exp((f[:, None] + own - C) / each.epsilon) / C.size
        assert np.allclose(plan.sum(0), 1 / 300, rtol=1e-4)
        assert np.abs(plan.sum(1) - 1 / 20).sum() == pytest.approx(each.marginal_error, abs=2e-5)


@pytest.mark.parametrize("kept", [0, 5000, 2**27])  # products of neither, of the sample, of the pool, too
def test_a_solution_that_began_on_a_sample_is_the_same(monkeypatch, kept):
    monkeypatch.setattr(optimal_transport, "_KEPT_NUMBERS", kept)
    target, pool = points(10, 2001, 4, seed=2)
    found = solve(target, pool, epsilon=0.05, tolerance=1e-9)
    assert found.passes % 1  # part of the pool was passed over
    C = costs(target, pool)
    _, g, _ = plain_sinkhorn(C, 0.05 * C.mean(), 1e-10)
    assert np.allclose(centred(found.g), centred(g), atol=1e-7)


def test_fewer_than_half_the_passes_of_plain_sinkhorn():
    target, pool = points(50, 300, 3, seed=3)
    C = costs(target, pool)
    _, _, plain = plain_sinkhorn(C, 0.005 * C.mean(), 1e-4)
    found = solve(target, pool, epsilon=0.005, tolerance=1e-4)
    assert found.converged and found.passes < plain / 2


def test_permuting_the_pool_permutes_its_potentials():
    target, pool = points(8, 700, 3, seed=4)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(5))
    straight, permuted = (solve(target, rows, tolerance=1e-10) for rows in (pool, pool[order]))
    assert np.allclose(centred(permuted.g), centred(straight.g[order]), atol=1e-8)


def test_distances_are_what_counts_not_where_the_origin_is():
    target, pool = points(15, 200, 4, seed=6, dtype=torch.float32)
    near, far = (solve(target + shift, pool + shift, tolerance=1e-5) for shift in (0, 100))
    assert np.allclose(centred(near.g), centred(far.g), atol=2e-3 * near.mean_cost)


def test_a_memory_map_in_float16_gives_what_the_same_numbers_in_float32_give(tmp_path):
    target, pool = points(9, 600, 5, seed=7, dtype=torch.float32)
    np.save(tmp_path / "pool.npy", pool.numpy().astype(np.float16))
    stored = np.load(tmp_path / "pool.npy", mmap_mode="r")
    from_file, in_memory = solve(target, stored), solve(target, torch.from_numpy(stored.astype(np.float32)))
    assert torch.equal(from_file.g, in_memory.g) and torch.equal(from_file.f, in_memory.f)
    assert torch.equal(solve(target, pool.half()).g, in_memory.g)


def test_a_target_that_nothing_reaches_at_first_gets_its_share():
    target, pool = points(6, 40, 2, seed=8, dtype=torch.float32)
    target[0] += 100  # its kernel underflows even in double precision
    found = solve(target, pool, epsilon=1e-3, tolerance=1e-3)
    assert found.converged and found.f.isfinite().all() and found.g.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12),
    m=st.integers(2, 30),
    d=st.integers(1, 5),
    epsilon=st.floats(1e-4, 1),
    seed=st.integers(0, 10**6),
)
def test_the_cost_is_a_lower_bound_that_convergence_reaches(n, m, d, epsilon, seed):
    target, pool = points(n, m, d, seed)
    loose, tight = (
        solve(target, pool, epsilon=epsilon, tolerance=tolerance, most_passes=3000) for tolerance in (0.5, 1e-8)
    )
    assert tight.converged
    assert loose.cost <= tight.cost + 1e-9 * tight.mean_cost
    C, f, g = costs(target, pool), tight.f.numpy(), tight.g.numpy()
    plan = np.exp((f[:, None] + g - C) / tight.epsilon) / C.size
    entropy = tight.epsilon * (plan * (f[:, None] + g - C) / tight.epsilon).sum()
    assert tight.cost == pytest.approx((plan * C).sum() + entropy, abs=1e-6 * tight.mean_cost)


def test_what_has_not_converged_says_so():
    target, pool = points(30, 100, 2, seed=9)
    found = solve(target, pool, epsilon=0.001, most_passes=2)
    assert not found.converged and found.marginal_error > 1e-3
    assert "not converged after 2 passes" in found.warning and "more passes" in found.warning
    assert solve(target, pool).warning == ""
    single = solve(target.float(), pool.float(), tolerance=1e-9, most_passes=30)
    assert not single.converged and "float64" in single.warning


def test_progress_ends_at_its_total():
    told = []
    target, pool = points(5, 50, 2, seed=10)
    solve(target, pool, most_passes=40, on_progress=lambda done, total: told.append((done, total)))
    assert told[0] == (1, 40) and told[-1] == (40, 40)


def rows_with(value: float, row: int) -> torch.Tensor:
    pool = points(4, 50, 3, seed=11, dtype=torch.float32)[1]
    pool[row, 1] = value
    return pool


@pytest.mark.parametrize(
    ("target", "pool", "message"),
    [
        (torch.ones(4, 3), torch.ones(0, 3), "holds no candidates"),
        (torch.ones(4, 3), torch.ones(1, 3), "holds one candidate"),
        (torch.ones(0, 3), torch.ones(5, 3), "target sample is empty"),
        (torch.ones(4, 2), torch.ones(5, 3), "2 dimensions, the pool's 3"),
        (torch.ones(4), torch.ones(5, 3), r"target's embeddings have the shape \(4,\)"),
        (torch.ones(4, 3), rows_with(math.nan, 41), "Row 41 of the candidate pool's"),
        (torch.ones(4, 3), rows_with(-math.inf, 0), "Row 0 of the candidate pool's"),
        (torch.ones(4, 3), rows_with(1e30, 7), "Row 7 of the candidate pool's"),
        (rows_with(math.nan, 3), torch.ones(5, 3), "Row 3 of the target's"),
        (torch.ones(4, 3), torch.ones(5, 3), "are one point"),
    ],
)
def test_what_cannot_be_compared_is_refused(target, pool, message):
    with pytest.raises(InvalidInput, match=message):
        solve(target, pool, block_rows=8)


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"epsilon": math.nan}, {"tolerance": -1.0}])
def test_an_epsilon_or_tolerance_that_is_not_positive_is_refused(options):
    with pytest.raises(InvalidInput, match="must be above 0"):
        solve(*points(3, 5, 2, seed=0), **options)
