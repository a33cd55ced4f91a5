"""The code of gaps, against a plain Golomb coder that works bit by bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import CorruptArtifact
from training.compression import rice


def golomb(places: list[int], length: int, b: int) -> tuple[str, str]:
    """Quotients in unary (q zeros, then a one) and remainders, lowest bit first; what is behind is a quotient, too."""
    quotients, remainders, before = "", "", 0
    for place in places:
        quotient, remainder = divmod(place - before, 2**b)
        quotients += "0" * quotient + "1"
        remainders += "".join(str(remainder >> bit & 1) for bit in range(b))
        before = place + 1
    return quotients + "0" * ((length - before) // 2**b), remainders


def bits(content: np.ndarray, length: int) -> str:
    assert len(content) == -(-length // 8)
    return "".join(map(str, np.unpackbits(content, bitorder="little")[:length]))


@settings(max_examples=150, deadline=None)
@given(length=st.integers(0, 3000), density=st.sampled_from((0, 0.001, 0.05, 0.1, 0.3, 0.7, 1)), seed=st.integers(0))
def test_it_is_the_code_of_a_plain_coder_and_comes_back(length: int, density: float, seed: int) -> None:
    places = np.flatnonzero(np.random.default_rng(seed).random(length) < density)
    coded = rice.encode(places, length)
    quotients, remainders = golomb(places.tolist(), length, coded.parameter)
    assert bits(coded.quotients, len(quotients)) == quotients
    assert bits(coded.remainders, len(remainders)) == remainders
    assert np.array_equal(rice.decode(coded, length), places)
    assert length <= rice.longest(len(coded.quotients), coded.parameter)


@pytest.mark.parametrize(
    ("density", "parameter", "expected", "entropy"),
    [
        (0.05, 4, 0.3393, 0.3364),
        (0.1, 3, 0.5756, 0.5690),
        (0.2, 2, 0.9388, 0.9219),
        (0.3, 1, 1.1882, 1.1813),
        (0.5, 0, 1.5, 1.5),
    ],
)
def test_parameter_and_sizes_are_those_of_the_paper(
    density: float, parameter: int, expected: float, entropy: float
) -> None:
    assert rice.parameter(density) == parameter
    assert (rice.expected_bits(density, 10**6) - 16) / 10**6 == pytest.approx(expected, abs=5e-5)
    assert (rice.entropy_bits(density, 10**6) - 16) / 10**6 == pytest.approx(entropy, abs=5e-5)


def test_sizes_at_the_ends() -> None:
    assert rice.entropy_bits(0, 100) == rice.expected_bits(0, 100) == 16
    assert rice.entropy_bits(1, 100) == rice.expected_bits(1, 100) - 100 == 116
    assert (rice.parameter(0), rice.parameter(1e-9), rice.parameter(1)) == (10, 10, 0)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_random_places_take_what_the_formula_says(density: float) -> None:
    length = 200_000
    places = np.flatnonzero(np.random.default_rng(0).random(length) < density)
    coded = rice.encode(places, length)
    size = 8 * (len(coded.quotients) + len(coded.remainders)) + len(places) + 16
    share = len(places) / length
    assert rice.entropy_bits(share, length) <= size
    assert size == pytest.approx(rice.expected_bits(share, length), rel=0.01)


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 50),
    parameter=st.integers(0, 10),
    quotients=st.binary(max_size=20),
    remainders=st.binary(max_size=40),
    length=st.integers(0, 500),
)
def test_any_bytes_are_places_within_the_vector_or_refused(
    count: int, parameter: int, quotients: bytes, remainders: bytes, length: int
) -> None:
    coded = rice.Coded(count, parameter, np.frombuffer(quotients, np.uint8), np.frombuffer(remainders, np.uint8))
    try:
        places = rice.decode(coded, length)
    except CorruptArtifact:
        return
    assert len(places) == count and (np.diff(places) > 0).all()
    assert not count or 0 <= places[0] <= places[-1] < length
