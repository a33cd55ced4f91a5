"""DSIR: the oracle counts features in a dictionary, one text and one word at a time."""

import hashlib
import math
import random
import re
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import InvalidInput
from tests.training.selection.pool_files import pool_of
from training.selection import dsir, pieces
from training.selection.dsir import gumbel_top, log_ratio, pool_counts, resample, together, weigh

M64 = 2**64 - 1


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 128)


def plain_bucket(*words: str) -> int:
    """splitmix64's last steps of a polynomial in the words' blake2b."""
    value = 0
    for word in words:
        value += int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
        value = value * 0x9E3779B97F4A7C15 & M64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & M64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & M64
    return (value ^ value >> 31) % 10_000


def plain_features(text: str) -> Counter[int]:
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    features = [plain_bucket(word) for word in words]
    features += [plain_bucket(*pair) for pair in pairwise(words)]
    return Counter(features)


def plain_log_weights(pool: list[str], target: list[str]) -> list[float]:
    def shares(texts: list[str]) -> Counter[int]:
        total: Counter[int] = Counter()
        for text in texts:
            total.update(plain_features(text))
        return total

    of_target, of_pool = shares(target), shares(pool)
    n, m = of_target.total(), of_pool.total()
    return [
        sum(
            count * (math.log(of_target[bucket] / n + 1e-8) - math.log(of_pool[bucket] / m + 1e-8))
            for bucket, count in plain_features(text).items()
        )
        for text in pool
    ]


TEXTS = st.lists(st.sampled_from(["a", "b", "Cat", "dog's", "(x+y)", "été", "!", "猫が"]), min_size=1, max_size=9).map(
    " ".join
)


@settings(max_examples=50)
@given(
    st.lists(TEXTS, min_size=1, max_size=20),
    st.lists(TEXTS, min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_weights_are_those_of_a_dictionary_whatever_the_blocks_and_shards(
    texts: list[str], target: list[str], block_rows: int, shards: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = pool_of(Path(folder), texts)
        whole = weigh(pool, log_ratio(target, pool_counts(pool)))
        parts = replace(pool, block_rows=block_rows).shards(shards)
        counts = sum(pool_counts(part) for part in parts)
        joined = together([weigh(part, log_ratio(target, counts)) for part in parts])
    assert whole.log_weights == pytest.approx(plain_log_weights(texts, target), abs=1e-9)
    assert np.array_equal(joined.log_weights, whole.log_weights)
    assert joined.positions.tolist() == whole.positions.tolist() == list(range(len(texts)))


def test_shards_may_be_counted_at_the_same_time(tmp_path: Path) -> None:
    rng = random.Random(2)
    pool = pool_of(tmp_path, [" ".join(f"word{rng.randrange(3000)}" for _ in range(20)) for _ in range(2000)])
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(pool_counts, pool.shards(8)))
    assert np.array_equal(sum(parts), pool_counts(pool)) and sum(parts).sum() == 2000 * (20 + 19)


def test_a_planted_domain_is_found(tmp_path: Path) -> None:
    rng = random.Random(0)
    common = [f"word{number}" for number in range(200)]
    useful = [f"cell{number}" for number in range(50)]

    def text(domain: bool) -> str:
        return " ".join(rng.choice(useful if domain and rng.random() < 0.5 else common) for _ in range(30))

    texts = [text(number % 10 == 0) for number in range(1000)]
    target = [text(True) for _ in range(200)]
    drawn, weights = resample(pool_of(tmp_path, texts), target, rows=100, seed=0)
    assert len(drawn) == 100 and sum(position % 10 == 0 for position in drawn) >= 60, "chance gives 10"
    assert len(weights.positions) == 1000
    noise = [" ".join(f"x{rng.randrange(10**6)}" for _ in range(30)) for _ in range(200)]
    drawn, _ = resample(pool_of(tmp_path, [*texts, *noise]), target, rows=100, seed=0)
    assert max(drawn) < 1000, "words that nobody else uses are not what the target wants"


def test_rows_are_drawn_in_proportion_to_their_weights() -> None:
    weights = np.array([1.0, 2.0, 4.0, 8.0])
    trials = 4000
    first = Counter(int(gumbel_top(np.log(weights), 1, seed)[0]) for seed in range(trials))
    pairs = Counter(tuple(gumbel_top(np.log(weights), 2, seed).tolist()) for seed in range(trials))
    p = weights / weights.sum()
    for row in range(4):
        assert first[row] / trials == pytest.approx(p[row], abs=4 * math.sqrt(p[row] / trials))
    for (i, j), count in pairs.items():  # one after the other, without putting back
        wanted = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert count / trials == pytest.approx(wanted, abs=4 * math.sqrt(wanted / trials))


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=30), st.integers(0, 100), st.data())
def test_a_draw_has_its_size_and_its_seed(log_weights: list[float], seed: int, data: st.DataObject) -> None:
    values = np.array(log_weights)
    rows = data.draw(st.integers(0, len(values)))
    drawn = gumbel_top(values, rows, seed).tolist()
    assert len(set(drawn)) == rows and drawn == sorted(drawn)
    assert drawn == gumbel_top(values, rows, seed).tolist() == gumbel_top(values + 7.0, rows, seed).tolist()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, ["one two", "three"])
    with pytest.raises(InvalidInput, match="3 rows are wanted of a pool of 2"):
        resample(pool, ["one"], 3, 0)
    for target in ([], [" "]):
        with pytest.raises(InvalidInput, match="The target has no word"):
            resample(pool, target, 1, 0)
    assert dsir.BUCKETS == 10_000
