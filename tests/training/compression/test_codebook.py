"""Codebooks: levels are medians of their cells, files are as long as the formula, and training sees what is stored."""

from itertools import pairwise

import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn.utils import parametrize

from infra.errors import InvalidInput
from tests.training.compression.adapters import DTYPES, numbers
from training.compression import compress, container, decompress
from training.compression.levels import borders, levels
from training.compression.straight_through import FakeQuantised, fake_quantised

every_width = pytest.mark.parametrize("bits", [1, 2, 4, 8])


def test_levels_are_those_of_the_paper() -> None:
    torch.testing.assert_close(levels(1), torch.tensor([-0.67449, 0.67449], dtype=torch.float64), atol=5e-6, rtol=0)
    expected = torch.tensor([-1.26572, -0.37775, 0.37775, 1.26572], dtype=torch.float64)
    torch.testing.assert_close(levels(2), expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(borders(2)[1:], torch.tensor([0, 0.82174], dtype=torch.float64), atol=5e-5, rtol=0)


@every_width
def test_each_level_is_the_median_of_its_cell(bits: int) -> None:
    found = levels(bits)
    assert torch.equal(found, -found.flip(0)) and (found.diff() > 0).all()
    p = [0, *scipy.stats.norm.cdf(borders(bits).numpy()), 1]
    medians = scipy.stats.norm.ppf([(low + high) / 2 for low, high in pairwise(p)])
    tolerance = 1e-6 if bits < 8 else 2e-5  # what 500 iterations leave of 256 levels
    torch.testing.assert_close(found, torch.from_numpy(medians), atol=tolerance, rtol=0)


@every_width
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (64, 33), (0, 4)])
def test_a_matrix_takes_its_codes_and_eight_bytes(bits: int, shape: tuple[int, ...]) -> None:
    tensor = numbers("normal", shape, torch.float32, 0)
    (packed,) = container.read(compress({"a": tensor}, f"codebook:bits={bits}")).tensors
    assert len(packed.content) == -(-tensor.numel() * bits // 8) + 8


@every_width
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted", "constant", "zeros"])
def test_what_is_stored_is_what_training_saw(bits: int, kind: str) -> None:
    weight = numbers(kind, (61, 35), torch.float32, 0)
    found = decompress(compress({"a": weight}, f"codebook:bits={bits}"))["a"]
    seen = fake_quantised(weight, bits)
    assert torch.equal(found, seen)
    assert len(found.unique()) <= 2**bits
    x = numbers("normal", (4, 35), torch.float32, 1, 1.0)
    torch.testing.assert_close(x @ found.T, x @ seen.T, atol=1e-5, rtol=0)


@every_width
def test_more_bits_come_nearer(bits: int) -> None:
    weight = numbers("normal", (100, 100), torch.float32, 0, 1.0)
    error = float((decompress(compress({"a": weight}, f"codebook:bits={bits}"))["a"] - weight).abs().mean())
    assert error < {1: 0.49, 2: 0.28, 4: 0.08, 8: 0.006}[bits]


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("numbers_", [[3e38, -3e38, 3e38, 3e38], [3.3e38, -3.3e38]], ids=["a level", "the deviation"])
def test_numbers_whose_levels_a_dtype_cannot_hold_are_refused(bits: int, numbers_: list[float]) -> None:
    with pytest.raises(InvalidInput, match=r"a holds numbers too large for levels of torch\.float32"):
        compress({"a": torch.tensor(numbers_)}, f"codebook:bits={bits}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_stored_matrix_is_not_standardised_again(bits: int, dtype: torch.dtype) -> None:
    for seed, kind in enumerate(("normal", "shifted", "heavy", "uniform") * 3):
        line, tensor = f"codebook:bits={bits}", numbers(kind, (23, 9), dtype, seed, 0.3)
        once = decompress(compress({"a": tensor}, line))["a"]
        assert torch.equal(decompress(compress({"a": once}, line))["a"], once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_256_levels_in_16_bits_move_by_no_more_than_that_rounds(dtype: torch.dtype) -> None:
    """They may lie as close as the dtype's own numbers, so that they are not always found again."""
    tensor = numbers("normal", (100, 33), dtype, 0, 1.0)
    once = decompress(compress({"a": tensor}, "codebook:bits=8"))["a"]
    twice = decompress(compress({"a": once}, "codebook:bits=8"))["a"]
    torch.testing.assert_close(twice, once, atol=0.02, rtol=2**-7)


@every_width
@pytest.mark.parametrize("kind", ["normal", "shifted", "heavy"])
def test_the_gradient_passes_over_nothing_but_the_rounding(bits: int, kind: str) -> None:
    """Against autograd of (z + c)·σ + μ with c = ẑ − z held constant."""
    weight = numbers(kind, (7, 6), torch.float32, 0, 1.0).requires_grad_()
    upstream = numbers("normal", (7, 6), torch.float32, 1, 1.0)
    (found,) = torch.autograd.grad(fake_quantised(weight, bits), weight, upstream)
    mean, deviation = weight.mean(), weight.std()
    z = (weight - mean) / (deviation + 1e-5)
    constant = levels(bits).float()[torch.bucketize(z.detach(), borders(bits).float())] - z.detach()
    (expected,) = torch.autograd.grad((z + constant) * deviation + mean, weight, upstream)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert float(found.sum()) == pytest.approx(float(upstream.sum()), abs=1e-3), "the mean gets all of it"


@every_width
@pytest.mark.parametrize("weight", [torch.ones(1), torch.zeros(3, 4), torch.full((5,), 0.1), torch.zeros(0, 2)])
def test_a_matrix_without_a_deviation_has_a_gradient(bits: int, weight: torch.Tensor) -> None:
    weight = weight.clone().requires_grad_()
    found = fake_quantised(weight, bits)
    torch.testing.assert_close(found, weight)
    found.sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()
    torch.testing.assert_close(weight.grad.sum(), torch.tensor(float(weight.numel())))


def test_as_a_parametrization_it_trains_the_master_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    master = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", FakeQuantised(1))
    assert len(layer.weight.unique()) == 2
    target = torch.randn(4, 6)
    before = float((layer.weight - target).square().sum().detach())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(50):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
    assert float((layer.weight - target).square().sum().detach()) < before
    assert not torch.equal(layer.parametrizations.weight.original, master)


def test_it_computes_in_float32_under_autocast() -> None:
    weight = numbers("normal", (30, 30), torch.float32, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fake_quantised(weight, 2), fake_quantised(weight, 2).float())
        inside = fake_quantised(weight, 2)
    assert torch.equal(inside, fake_quantised(weight, 2))
    assert fake_quantised(weight.bfloat16(), 2).dtype == torch.bfloat16
