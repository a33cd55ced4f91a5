"""DSIR: rows drawn from a pool by how much likelier a target makes their n-grams (Xie et al. 2023, arXiv 2302.03169).

A text z has features: its words and pairs of neighbouring words, hashed into 10,000 buckets. With γ the share of each
bucket among all features of the target, and of the pool, a text's importance weight is

    log w(z) = Σ_j z_j · (log γ_target[j] − log γ_pool[j])

and k texts are drawn without replacement by w: the k largest log w + g, g from a Gumbel distribution (algorithm 1).
Words, and 10⁻⁸ on every share, are those of the authors' code (p-lambda/dsir), which leaves a pseudo-count on the
target's counts to the user: there is none here. With one, of a target of a few hundred texts, the rows of noise come
first, since words that hardly anybody uses then look wanted. The sum grows with the length of a text, so texts of a
pool should be of like length.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infra.errors import InvalidInput
from training.selection.pool import BLOCK_ROWS, Pool, Positions
from training.selection.word_hashes import ngram_hashes, word_hashes

BUCKETS = 10_000
_SMOOTHING = 1e-8
_WORD = re.compile(r"\w+|[^\w\s]+")

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Weights:
    """How much likelier the target makes each row than the pool does.

    Args:
        positions: of the rows, ascending.
        log_weights: [rows], in nats.
    """

    positions: Positions
    log_weights: NDArray[np.float64]


def resample(pool: Pool, target: Sequence[str], rows: int, seed: int) -> tuple[Positions, Weights]:
    """Draw `rows` rows of a pool like the target. Reads the pool twice; 40 bytes a row are in memory.

    Args:
        pool: what to choose from.
        target: texts of what is wanted.
        rows: how many to draw.
        seed: of the Gumbel noise.

    Returns:
        The positions that were drawn, ascending, and the weights of all rows.

    Raises:
        InvalidInput: a target without a word, or a pool of fewer rows.
    """
    ratio = log_ratio(target, pool_counts(pool))
    weights = weigh(pool, ratio)
    return weights.positions[gumbel_top(weights.log_weights, rows, seed)], weights


def pool_counts(shard: Pool) -> Counts:
    """[buckets], how often each feature is in a shard; a pool's are the sum of its shards'."""
    return _counted(block.texts for block in shard.blocks())


def log_ratio(target: Sequence[str], pool: Counts) -> NDArray[np.float64]:
    """[buckets], log γ_target − log γ_pool.

    Raises:
        InvalidInput: either has no word.
    """
    target_counts = _counted(target[begin : begin + BLOCK_ROWS] for begin in range(0, len(target), BLOCK_ROWS))
    for name, counts in (("target", target_counts), ("pool", pool)):
        if not counts.any():
            raise InvalidInput(f"The {name} has no word, so nothing can be told from it.", "Give it texts.")
    of_target, of_pool = (np.log(counts / counts.sum() + _SMOOTHING) for counts in (target_counts, pool))
    return np.asarray(of_target - of_pool)


def weigh(shard: Pool, ratio: NDArray[np.float64]) -> Weights:
    """log w of each row of a shard, in order."""
    positions, found = [np.empty(0, np.int64)], [np.empty(0)]
    for block in shard.blocks():
        log_weights = np.zeros(len(block.examples))
        for buckets, texts in _features(block.texts):
            log_weights += np.bincount(texts, ratio[buckets], len(log_weights))
        positions.append(block.positions)
        found.append(log_weights)
    return Weights(np.concatenate(positions), np.concatenate(found))


def together(shards: Sequence[Weights]) -> Weights:
    """The weights of all shards, in order."""
    return Weights(
        np.concatenate([shard.positions for shard in shards]), np.concatenate([shard.log_weights for shard in shards])
    )


def gumbel_top(log_weights: NDArray[np.float64], rows: int, seed: int) -> NDArray[np.int64]:
    """Indices of `rows` rows drawn without replacement in proportion to their weights, ascending.

    Raises:
        InvalidInput: there are fewer.
    """
    if rows > len(log_weights):
        raise InvalidInput(
            f"{rows:,} rows are wanted of a pool of {len(log_weights):,}.", "Lower the budget, or add to the pool."
        )
    keys = log_weights + np.random.default_rng(seed).gumbel(size=len(log_weights))
    return np.sort(np.argsort(-keys, kind="stable")[:rows])


def _counted(blocks: Iterable[Sequence[str]]) -> Counts:
    counts = np.zeros(BUCKETS, np.int64)
    for texts in blocks:
        for buckets, _ in _features(texts):
            counts += np.bincount(buckets, minlength=BUCKETS)
    return counts


def _features(texts: Sequence[str]) -> Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(bucket, text) of each word, then of each pair of words."""
    words = word_hashes([_WORD.findall(text.lower()) for text in texts])
    for length in (1, 2):
        grams = ngram_hashes(words, length)
        yield (grams.values % np.uint64(BUCKETS)).astype(np.int64), grams.texts
