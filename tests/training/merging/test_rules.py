"""The rules for single tensors, against loops over single entries."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from training.merging.dare import Dare, dropped, generator
from training.merging.ema import Ema, towards_mean
from training.merging.slerp import Slerp, arc
from training.merging.ties import Ties, Vote, elected, trimmed

NAMES = ["a", "b", "c"]


def parts(seed: int, *shape: int) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- TIES --------------------------------------------------------------------------------------------------------------


def ties_by_loop(updates: Tensor, weights: Sequence[float], density: float, vote: Vote, scale: float) -> Tensor:
    flat = [row.tolist() for row in updates.flatten(1)]
    kept = max(1, math.floor(density * len(flat[0]) + 1e-9))
    for row in flat:
        order = sorted(range(len(row)), key=lambda place: -abs(row[place]))
        for place in order[kept:]:
            row[place] = 0.0
    merged = []
    for column in zip(*flat, strict=True):
        weighted = [w * value for w, value in zip(weights, column, strict=True)]
        elected_sign = _sign(sum(weighted))
        if vote == "frequency":
            elected_sign = _sign(sum(map(_sign, weighted))) or elected_sign
        agreeing = [(w, value) for w, value in zip(weights, weighted, strict=True) if _sign(value) == elected_sign != 0]
        merged.append(scale * sum(v for _, v in agreeing) / sum(abs(w) for w, _ in agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view(updates.shape[1:])


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 2, -1), (1, 0, 1)])
@pytest.mark.parametrize("vote", ["mass", "frequency"])
def test_ties_is_trim_elect_and_mean(density: float, weights: tuple[float, ...], vote: Vote) -> None:
    updates = parts(0, 6, 7)
    made = Ties(weights=weights, density=density, vote=vote, scale=0.7).entries("", NAMES, updates)
    assert_close(made, ties_by_loop(updates, weights, density, vote, 0.7))


def test_where_no_sign_is_elected_nothing_changes() -> None:
    third = [torch.tensor([each], dtype=torch.float64) for each in (0.1, 0.2, -0.3)]  # 0.1 + 0.2 − 0.3 ≠ 0 in float64
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        assert elected([third[place] for place in order], [1, 1, 1], "mass") == 0
    assert elected([torch.ones(2), -torch.ones(2)], [1, 1], "frequency").tolist() == [0, 0]
    assert elected([torch.ones(2), torch.ones(2)], [0, 0], "mass").tolist() == [0, 0]


@pytest.mark.parametrize("density, kept", [(1e-9, 1), (0.29, 29), (0.3, 30), (0.999, 99), (1.0, 100)])
def test_trimming_keeps_the_share_and_one_entry_at_least(density: float, kept: int) -> None:
    assert int((trimmed(torch.arange(1.0, 101.0), density) != 0).sum()) == kept


def test_of_equal_entries_the_first_are_kept() -> None:
    assert trimmed(torch.tensor([1.0, -2.0, 2.0, 2.0]), 0.5).tolist() == [0, -2, 2, 0]


def test_adapters_that_agree_are_left_alone() -> None:
    update = parts(1, 4, 4)[:1].expand(3, 4, 4)
    assert_close(Ties(density=1).entries("", NAMES, update), update[0])


# -- DARE --------------------------------------------------------------------------------------------------------------


def test_dare_keeps_and_rescales_what_it_draws_for_each_adapter_and_tensor() -> None:
    updates = parts(2, 30, 40)
    made = Dare(weights=(1, 1, 1), density=0.25, seed=3).entries("q", NAMES, updates)
    kept = [torch.rand(30, 40, generator=generator(3, name, "q")) < 0.25 for name in NAMES]
    assert_close(made, sum(update * mask / 0.25 for update, mask in zip(updates, kept, strict=True)))
    for mask in kept:
        assert abs(float(mask.float().mean()) - 0.25) < 0.06
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(made, Dare(weights=(1, 1, 1), density=0.25, seed=4).entries("q", NAMES, updates))
    assert not torch.equal(made, Dare(weights=(1, 1, 1), density=0.25, seed=3).entries("v", NAMES, updates))


def test_dare_is_right_on_average() -> None:
    update = parts(3, 20)[0]
    draws = torch.stack([dropped(update, 0.5, generator(seed, "a", "")) for seed in range(2000)])
    assert_close(draws.mean(0), update, rtol=0, atol=5 * float(update.abs().max()) / math.sqrt(2000))


def test_dare_with_a_vote_averages_those_that_agree() -> None:
    updates = parts(4, 10, 10)
    made = Dare(density=0.5, vote="frequency", seed=1, scale=2.0).entries("q", NAMES, updates)
    kept = [dropped(u, 0.5, generator(1, name, "q")) for u, name in zip(updates, NAMES, strict=True)]
    assert_close(made, ties_by_loop(torch.stack(kept), (1, 1, 1), 1.0, "frequency", 2.0))


# -- SLERP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp_keeps_the_length_and_divides_the_angle(t: float) -> None:
    a, b = (each / each.norm() for each in parts(5, 12)[:2])
    made = Slerp(t=t).entries("", ["a", "b"], torch.stack([a, b]))
    assert float(made.norm()) == pytest.approx(1)
    assert math.acos(min(1.0, float(made @ a))) == pytest.approx(t * math.acos(float(a @ b)), abs=1e-7)


@pytest.mark.parametrize(
    "a, b", [((1.0, 0.0), (2.0, 1e-3)), ((1.0, 2.0), (-1.0, -2.0)), ((0.0, 0.0), (1.0, 2.0)), ((0.0, 0.0), (0.0, 0.0))]
)
def test_slerp_takes_the_line_where_there_is_no_arc(a: tuple[float, float], b: tuple[float, float]) -> None:
    updates = torch.tensor([a, b], dtype=torch.float64)
    made = Slerp(t=0.3).entries("", ["a", "b"], updates)
    assert_close(made, 0.7 * updates[0] + 0.3 * updates[1])


def test_the_arc_is_continuous_where_the_line_takes_over() -> None:
    for cosine in (0.99949, 0.99951):
        assert arc(0.3, cosine, 1.0, 1.0) == pytest.approx((0.7, 0.3), abs=1e-4)


# -- moving averages (MOS) ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("older", [1, 2, 5])
@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
def test_one_step_is_the_papers_closed_form(older: int, momentum: float) -> None:
    theta, *others = torch.randn(older + 1, 4, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    before = [other.clone() for other in others]
    made = towards_mean(theta, others, momentum)
    assert_close(made, (1 - momentum) * theta + momentum / older * sum(others), rtol=0, atol=1e-7)
    assert all(torch.equal(*pair) for pair in zip(others, before, strict=True))
    together = Ema(momentum=momentum).entries("", [], torch.stack([*others, theta]))
    assert_close(together, made)


def test_without_older_ones_or_momentum_it_stays_bit_for_bit() -> None:
    theta = torch.randn(5, generator=torch.Generator().manual_seed(7)).bfloat16()
    assert torch.equal(towards_mean(theta, []), theta)
    assert torch.equal(towards_mean(theta, [theta * 2], 0.0), theta)
    assert towards_mean(theta, [theta], 0.3).dtype == torch.bfloat16
