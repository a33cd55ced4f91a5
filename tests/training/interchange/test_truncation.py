"""Updates cut down to a rank: the best there is, by SciPy's decomposition, and a loss that is true."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.interchange.lora_layers import LoraLayer
from training.interchange.truncation import Keep, truncated


def drawn(m: int, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


@settings(max_examples=60)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 12), st.integers(0, 99))
def test_no_lora_of_that_rank_is_nearer_and_the_loss_is_what_it_is(m: int, n: int, rank: int, seed: int) -> None:
    update = drawn(m, n, seed)
    layers, loss = truncated([("layer", update)], Keep(rank=rank))
    assert layers["layer"].rank == rank
    singular = scipy.linalg.svdvals(update.numpy())
    best = np.sqrt(np.square(singular[rank:]).sum())
    error = float(torch.linalg.matrix_norm(update - layers["layer"].update()))
    assert error == pytest.approx(best, abs=1e-5)
    assert loss.layers["layer"] == loss.total == pytest.approx(best / np.linalg.norm(update.numpy()), abs=1e-12)


@settings(max_examples=60)
@given(st.integers(1, 16), st.integers(1, 8), st.floats(0.1, 9), st.integers(0, 99))
def test_factors_are_cut_as_their_product_would_be(size: int, rank: int, scale: float, seed: int) -> None:
    layer = LoraLayer(drawn(rank, 12, seed), drawn(size, rank, seed + 1), scale)
    for kept in (1, rank, rank + 3):
        (by_factors, lost), (by_product, same) = (
            truncated([("a", update)], Keep(rank=kept)) for update in (layer, layer.update())
        )
        torch.testing.assert_close(by_factors["a"].update(), by_product["a"].update(), atol=1e-4, rtol=1e-4)
        assert lost.total == pytest.approx(same.total, abs=1e-7)
    assert lost.total < 1e-7


@settings(max_examples=60)
@given(st.integers(2, 16), st.integers(2, 16), st.floats(0, 1), st.integers(0, 99))
def test_energy_takes_the_lowest_rank_that_holds_it(m: int, n: int, energy: float, seed: int) -> None:
    update = drawn(m, n, seed)
    layers, loss = truncated([("a", update)], Keep(energy=energy))
    assert 1 - loss.total**2 >= energy - 1e-9
    rank = layers["a"].rank
    if rank > 1:
        _, less = truncated([("a", update)], Keep(rank=rank - 1))
        assert 1 - less.total**2 < energy


def test_the_total_weighs_layers_by_their_size_and_the_worst_is_named() -> None:
    large, small = 10 * torch.eye(4, dtype=torch.float64), torch.diag(torch.tensor([1.0, 1, 1, 0])).double()
    layers, loss = truncated([("large", large), ("small", small), ("none", torch.zeros(4, 4).double())], Keep(rank=2))
    assert layers.keys() == {"large", "small"}
    assert loss.layers["large"] == pytest.approx((2 / 4) ** 0.5)
    assert loss.layers["small"] == pytest.approx((1 / 3) ** 0.5)
    assert loss.total == pytest.approx(((200 + 1) / (400 + 3)) ** 0.5)
    assert loss.worst[0] == "large"
    assert truncated([], Keep(rank=2))[1].total == 0
