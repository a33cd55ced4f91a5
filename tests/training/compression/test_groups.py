"""Grids for groups: no number is further than half a step from its own."""

import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from infra.errors import CorruptArtifact, InvalidInput
from tests.training.compression.adapters import DTYPES, numbers
from training.compression import compress, container, decompress


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(("normal", "uniform", "heavy", "shifted", "constant", "ternary")),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from((2, 4, 8)),
    symmetric=st.booleans(),
    length=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    size=st.sampled_from((0.02, 1e-5, 100.0)),
)
def test_no_number_moves_by_more_than_half_a_step(
    kind: str, dtype: torch.dtype, bits: int, symmetric: bool, length: int, seed: int, size: float
) -> None:
    assume(dtype != torch.float16 or size > 1e-4)  # whose own numbers are as far apart as such a grid's
    tensor = numbers(kind, (length,), dtype, seed, size)
    line = f"groups:bits={bits},size=32,symmetric={str(symmetric).lower()}"
    found = decompress(compress({"a": tensor}, line))["a"]
    own = torch.finfo(dtype).eps if dtype != torch.float64 else torch.finfo(torch.float32).eps
    for x, q in zip(tensor.double().split(32), found.double().split(32), strict=True):
        low, high = float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
        step = max(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 2)
        smallest = 2.0**-24 if dtype == torch.float16 else 0.0  # a step of float16 is no finer than float16
        allowed = (0.5 + 2**-9) * step + smallest / 2 + 1.5 * own * x.abs()
        assert ((x - q).abs() <= allowed).all(), float(((x - q).abs() - allowed).max())


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_a_group_uses_its_whole_grid(symmetric: str) -> None:
    tensor = torch.linspace(-1, 3, 64)
    found = decompress(compress({"a": tensor}, f"groups:bits=4,symmetric={symmetric}"))["a"]
    assert len(found.unique()) == (10 if symmetric == "true" else 16)
    assert float(found.max()) == pytest.approx(3, rel=1e-3)
    assert (found == 0).any()


@pytest.mark.parametrize(("bits", "symmetric", "size"), [(4, "true", 64), (8, "false", 8), (2, "true", 32)])
def test_a_tensor_takes_codes_scales_and_zero_points(bits: int, symmetric: str, size: int) -> None:
    tensor = numbers("normal", (31, 7), torch.float32, 0)
    line = f"groups:bits={bits},symmetric={symmetric},size={size}"
    (packed,) = container.read(compress({"a": tensor}, line)).tensors
    beside = -(-217 // size) * (2 if symmetric == "true" else 3)
    coded = zlib.decompress(packed.content[: len(packed.content) - beside])
    assert len(coded) == -(-217 * bits // 8)


@pytest.mark.parametrize(("levels", "bits"), [(3, 2), (5, 4), (15, 4)])
def test_codes_take_little_more_than_their_entropy(levels: int, bits: int) -> None:
    tensor = numbers("normal", (64, 3200), torch.float32, 0)
    line = f"groups:bits={bits},levels={levels}"
    steps = torch.cat([(row / row.abs().max() * (levels // 2)).round() for row in tensor.flatten().split(64)])
    shares = steps.unique(return_counts=True)[1] / len(steps)
    entropy = -float((shares * shares.log2()).sum())
    assert entropy + 16 / 64 < 8 * len(compress({"a": tensor}, line)) / tensor.numel() < entropy + 16 / 64 + 0.06


def test_each_direction_of_a_low_rank_factor_has_grids_of_its_own() -> None:
    sizes = torch.tensor([100.0, 1.0, 0.01])
    B = numbers("normal", (640, 3), torch.float32, 0) * sizes
    for factor in (B, B.T.contiguous()):
        found = decompress(compress({"a": factor}, "groups:bits=8"))["a"]
        off = (found - factor).norm(dim=int(factor is not B)) / factor.norm(dim=int(factor is not B))
        assert (off < 0.01).all()


@pytest.mark.parametrize("levels", [2, 4, 17, 257])
def test_levels_that_cannot_be_are_refused(levels: int) -> None:
    with pytest.raises(InvalidInput, match="levels"):
        compress({"a": torch.ones(3)}, f"groups:bits=4,levels={levels}")
    with pytest.raises(InvalidInput, match="symmetric"):
        compress({"a": torch.ones(3)}, "groups:bits=4,levels=5,symmetric=false")


def tampered(content: Callable[[bytes], bytes], shape: tuple[int, ...] = (8, 64)) -> bytes:
    """A file with a sound checksum whose codes are what `content` makes of the true ones."""
    held = container.read(compress({"a": numbers("normal", (8, 64), torch.float32, 0)}, "groups:bits=4"))
    (packed,) = held.tensors
    scales = packed.content[-16:]
    other = replace(packed, shape=shape, content=content(zlib.decompress(packed.content[:-16])) + bytes(scales))
    return container.write(held.codec, held.options, [other])


def test_codes_that_are_not_as_many_as_there_should_be_are_refused() -> None:
    assert decompress(tampered(zlib.compress))["a"].shape == (8, 64)
    wrong: list[Callable[[bytes], bytes]] = [
        lambda codes: zlib.compress(codes[:-1]),
        lambda codes: zlib.compress(codes + b"0"),
        lambda codes: zlib.compress(codes)[:-1],
        lambda codes: zlib.compress(codes) + b"0",
        lambda codes: bytes(len(codes)),
        lambda codes: b"",
    ]
    for content in wrong:
        with pytest.raises(CorruptArtifact, match="a has"):
            decompress(tampered(content))


def test_a_small_file_that_claims_a_large_tensor_takes_no_memory() -> None:
    bomb = tampered(lambda codes: zlib.compress(bytes(10**6), 9), (8, 2 * 10**6 // 8))
    with pytest.raises(CorruptArtifact):
        decompress(bomb)


def test_large_and_small_groups_in_one_tensor() -> None:
    tensor = torch.cat([numbers("normal", (64,), torch.float32, n, 10.0**-n) for n in range(4)])
    found = decompress(compress({"a": tensor}, "groups:bits=8"))["a"]
    for x, q in zip(tensor.split(64), found.split(64), strict=True):
        torch.testing.assert_close(q, x, atol=float(x.abs().max()) / 250, rtol=0)
