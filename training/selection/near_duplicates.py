"""Rows that say the same as an earlier row of the pool: exactly, or nearly (MinHash, Broder 1997).

Two texts are near duplicates where the sets of their shingles (five neighbouring words) have a Jaccard similarity
|A ∩ B| / |A ∪ B| of at least the threshold. MinHash and locality-sensitive hashing only propose pairs; each is held
against the shingles themselves before a row is dropped.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from infra.errors import InvalidInput
from training.data.content_hash import normalised
from training.selection.pool import Pool, Positions
from training.selection.word_hashes import Hashes, Runs, ngram_hashes, word_hashes, words

SHINGLE_WORDS = 5
PERMUTATIONS = 128
_RECALL = 0.99  # of pairs that are exactly as similar as the threshold; of more similar ones it is higher
_SEED = 1


@dataclass(frozen=True)
class Duplicates:
    """What need not be kept.

    Args:
        dropped: positions of rows that are there already, ascending.
        originals: [dropped], the earlier row that stays in place of each; none of them is dropped.
    """

    dropped: Positions
    originals: Positions

    @property
    def groups(self) -> int:
        """How many rows stay for themselves and for others."""
        return len(np.unique(self.originals))


def exact_duplicates(pool: Pool) -> Duplicates:
    """Rows whose prompt and completion are, `normalised`, those of an earlier row. About 80 bytes a row."""
    return repeated([content_hashes(pool)])


def content_hashes(shard: Pool) -> NDArray[np.uint64]:
    """[rows, 3]: position, and 128 bits that name the `normalised` content, of each row of a shard."""
    found = [np.empty((0, 3), np.uint64)]
    for block in shard.blocks():
        keys = b"".join(
            hashlib.blake2b(
                json.dumps([normalised(row.prompt), normalised(row.completion)]).encode(), digest_size=16
            ).digest()
            for row in block.examples
        )
        hashes = np.frombuffer(keys, np.uint64).reshape(-1, 2)
        found.append(np.column_stack([block.positions.astype(np.uint64), hashes]))
    return np.concatenate(found)


def repeated(hashes: Sequence[NDArray[np.uint64]]) -> Duplicates:
    """What is there already, from the `content_hashes` of all shards, in order."""
    positions, first, second = np.concatenate(list(hashes)).T
    order = np.lexsort((second, first))  # stable: equal rows stay in the pool's order
    new = np.ones(len(order), np.bool_)
    new[1:] = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
    originals = positions[order][np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    dropped, originals = positions[order][~new].astype(np.int64), originals[~new].astype(np.int64)
    ascending = np.argsort(dropped)
    return Duplicates(dropped[ascending], originals[ascending])


def near_duplicates(pool: Pool, threshold: float = 0.8) -> Duplicates:
    """Rows that are near duplicates of an earlier row which stays. Drop exact duplicates first: that is cheaper.

    Rows are judged in the pool's order, so each dropped row has its likeness among those that stay, the earliest one
    that was proposed. Who is judged hangs on the texts alone, not on blocks or shards. Of pairs at the threshold at
    least 99 in 100 are found; what is not a near duplicate is never dropped.

    Memory: 33 bytes a row, and half a kilobyte and 8 bytes a word of each row that shares a band with another. On disk,
    in a temporary folder, 8 bytes a row and band (176 a row at the default threshold). Many rows that are almost near
    duplicates of each other are slow: each is held against all.

    Args:
        pool: of texts; a completion counts as the end of its prompt.
        threshold: of the Jaccard similarity, 0 < threshold ≤ 1.

    Raises:
        InvalidInput: another threshold.
    """
    with TemporaryDirectory(prefix="regraft-sketches-") as folder:
        sketch(pool, Path(folder), threshold)
        return judge(pool, [Path(folder)], threshold)


def sketch(shard: Pool, folder: Path, threshold: float) -> None:
    """Write the position and the band keys of a shard's rows into a folder, one file of 64-bit numbers a band.

    Rows without a word are left out: nothing is like them.
    """
    from rensa import RMinHash

    bands, length = banding(threshold)
    names = [_POSITIONS, *map(_band, range(bands))]
    files = [(folder / name).open("wb") for name in names]
    try:
        for block in shard.blocks():
            sets = shingles([words(text) for text in block.texts])
            some = sets.counts > 0
            matrix = RMinHash.digest_matrix_from_flat_token_hashes(
                sets.values, np.append(sets.starts[:-1][some], len(sets.values)).astype(np.uint64), PERMUTATIONS, _SEED
            )
            digests = np.array(matrix.to_rows(), np.uint64).reshape(-1, PERMUTATIONS)[:, : bands * length]
            rows = np.arange(0, digests.size + 1, length, dtype=np.int64)
            keys = ngram_hashes(Runs(digests.reshape(-1), rows), length).values.reshape(-1, bands)
            for file, column in zip(files, [block.positions[some], *keys.T], strict=True):
                file.write(np.ascontiguousarray(column).tobytes())
    finally:
        for file in files:
            file.close()


def judge(pool: Pool, folders: Sequence[Path], threshold: float) -> Duplicates:
    """What need not be kept, from the `sketch`es of all shards of the pool, in order."""
    positions, buckets, number = _candidates(folders, banding(threshold)[0])
    judged: dict[int, Hashes] = {}  # shingles of those that stay
    stay: list[tuple[int, ...]] = [()] * number  # by bucket
    dropped: list[int] = []
    originals: list[int] = []
    for block in pool.only(positions).blocks():
        sets = shingles([words(text) for text in block.texts])
        rows = buckets[np.searchsorted(positions, block.positions)]
        for index, position in enumerate(block.positions.tolist()):
            shared = rows[index][rows[index] >= 0].tolist()
            own = sets.of(index)
            proposed = sorted({other for bucket in shared for other in stay[bucket]})
            original = next((other for other in proposed if jaccard(own, judged[other]) >= threshold), None)
            if original is None:
                judged[position] = own.copy()
                itself = (position,)  # one tuple for all buckets that have no other
                for bucket in shared:
                    stay[bucket] += itself
            else:
                dropped.append(position)
                originals.append(original)
    return Duplicates(np.array(dropped, np.int64), np.array(originals, np.int64))


def shingles(texts: Sequence[Sequence[str]]) -> Runs:
    """The set of each text's shingles as 64-bit numbers, ascending.

    A text of fewer than five words is one shingle, so it is like another only where it is equal to it.
    """
    hashed = word_hashes(texts)
    found = ngram_hashes(hashed, SHINGLE_WORDS)
    values, owners = [found.values], [found.texts]
    for length in range(1, SHINGLE_WORDS):
        short = np.flatnonzero(hashed.counts == length)
        whole = hashed.values[hashed.starts[short][:, None] + np.arange(length)].reshape(-1)
        values.append(ngram_hashes(Runs(whole, np.arange(0, len(whole) + 1, length)), length).values)
        owners.append(short)
    value, owner = np.concatenate(values), np.concatenate(owners)
    order = np.lexsort((value, owner))
    value, owner = value[order], owner[order]
    new = np.ones(len(value), np.bool_)
    new[1:] = (value[1:] != value[:-1]) | (owner[1:] != owner[:-1])
    return Runs(value[new], np.searchsorted(owner[new], np.arange(len(texts) + 1)))


def jaccard(one: Hashes, other: Hashes) -> float:
    """|A ∩ B| / |A ∪ B| of two sets, neither of them empty."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def banding(threshold: float) -> tuple[int, int]:
    """Number of bands b, and of MinHashes r in each: the longest bands that still find pairs at the threshold s.

    A pair of similarity s shares a band with probability 1 − (1 − sʳ)ᵇ (Leskovec et al., Massive Datasets, 3.4).

    Raises:
        InvalidInput: a threshold that is no similarity.
    """
    if not 0 < threshold <= 1:
        raise InvalidInput(f"{threshold} is no threshold of similarity.", "Give a number above 0, and at most 1.")
    lengths = [r for r in range(1, PERMUTATIONS + 1) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= _RECALL]
    length = max(lengths, default=1)
    return PERMUTATIONS // length, length


def _candidates(folders: Sequence[Path], bands: int) -> tuple[Positions, NDArray[np.int32], int]:
    """Rows that share a band with another row, their buckets [rows, bands] (−1 where alone), and how many there are.

    Rows share a band where they are in one bucket.
    """
    positions = _column(folders, _POSITIONS).astype(np.int64)
    candidate = np.zeros(len(positions), np.bool_)
    for band in range(bands):
        candidate |= _shared(_column(folders, _band(band)))
    buckets = np.full((int(candidate.sum()), bands), -1, np.int32)
    number = 0
    for band in range(bands):
        column = _column(folders, _band(band))[candidate]
        shared = _shared(column)
        keys, bucket = np.unique(column[shared], return_inverse=True)
        buckets[shared, band] = bucket + number
        number += len(keys)
    return positions[candidate], buckets, number


def _shared(keys: Hashes) -> NDArray[np.bool_]:
    """Which of the keys are there more than once."""
    order = np.argsort(keys)
    equal = np.diff(keys[order]) == 0
    shared = np.zeros(len(keys), np.bool_)
    shared[order[1:][equal]] = True
    shared[order[:-1][equal]] = True
    return shared


_POSITIONS = "positions.u64"


def _band(number: int) -> str:
    return f"band-{number:03}.u64"


def _column(folders: Sequence[Path], name: str) -> NDArray[np.uint64]:
    return np.concatenate([np.fromfile(folder / name, np.uint64) for folder in folders])
