"""The same rules by mergekit's functions, where it is installed: pip install --no-deps mergekit."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from training.merging.linear import Linear
from training.merging.method import MergeMethod
from training.merging.slerp import Slerp
from training.merging.ties import Ties, trimmed

pytest.importorskip("mergekit.merge_methods")

from mergekit.merge_methods import TensorGroup, get
from mergekit.merge_methods.slerp import slerp
from mergekit.sparsify import magnitude

BASE, *UPDATES = torch.randn(4, 11, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_mergekit(
    name: str, weights: Sequence[float], density: float = 1.0, scale: float = 1.0, normalize: bool = False
) -> Tensor:
    """The merged update of UPDATES on BASE."""
    group = TensorGroup.from_tensors([BASE, *(BASE + update for update in UPDATES)], base_index=0)
    merged = get(name).merge_group(
        group,
        weight=dict(enumerate(weights, start=1)),
        density=dict.fromkeys(range(1, 4), density),
        normalize=normalize,
        rescale=False,
        int8_mask=False,
        **{"lambda": scale},
    )
    return merged - BASE


def ours(method: MergeMethod, updates: Sequence[Tensor] = UPDATES) -> Tensor:
    return method.entries("", [str(number) for number in range(len(updates))], torch.stack(list(updates)))


@pytest.mark.parametrize("weights, scale", [((1.0, 1.0, 1.0), 0.3), ((0.7, -0.4, 0.1), 1.0)])
def test_task_arithmetic_is_the_weighted_sum(weights: tuple[float, ...], scale: float) -> None:
    theirs = by_mergekit("task_arithmetic", weights, scale=scale)
    assert_close(ours(Linear(weights=weights, scale=scale)), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0)])
def test_ties_with_its_weights(density: float, weights: tuple[float, ...]) -> None:
    theirs = by_mergekit("ties", weights, density, scale=0.7, normalize=True)
    assert_close(ours(Ties(weights=weights, density=density, scale=0.7)), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("density", [0.1, 0.33, 0.9])
def test_trimming(density: float) -> None:
    assert torch.equal(trimmed(UPDATES[0], density), magnitude(UPDATES[0], density))


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("second", [UPDATES[1], UPDATES[0] * 2 + 1e-4 * UPDATES[1], -UPDATES[0]])
def test_slerp_and_its_fall_back_to_the_line(t: float, second: Tensor) -> None:
    theirs = slerp(torch.tensor([t]), UPDATES[0][None], second[None])[0]
    assert_close(ours(Slerp(t=t), [UPDATES[0], second]), theirs, rtol=0, atol=1e-12)


def test_a_zero_update_stands_at_a_right_angle_there_and_on_the_line_here() -> None:
    nothing = torch.zeros_like(UPDATES[0])
    theirs = slerp(torch.tensor([0.5]), UPDATES[0][None], nothing[None])[0]
    assert_close(theirs, 0.5**0.5 * UPDATES[0])
    assert_close(ours(Slerp(), [UPDATES[0], nothing]), 0.5 * UPDATES[0])
