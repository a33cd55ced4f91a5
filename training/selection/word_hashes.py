"""Words of many texts as 64-bit numbers, and the n-grams over them, without a loop over n-grams."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from training.data.content_hash import normalised

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]

_MOST_WORDS_KNOWN = 2**20  # about 150 MB
_BASE = np.uint64(0x9E3779B97F4A7C15)

# Thai, kana and Han are written without spaces: there each character counts as a word.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of the `normalised` text: texts that are equal there have the same words."""
    text = normalised(text)
    return text.split() if text.isascii() else _WORD.findall(text)


@dataclass(frozen=True)
class Runs:
    """A list of numbers for each text.

    Args:
        values: [N], those of the first text, then of the second, and so on.
        starts: [texts + 1], where each one's begin; N at the end.
    """

    values: Hashes
    starts: Places

    @property
    def counts(self) -> Places:
        """[texts], how many numbers each has."""
        return np.diff(self.starts)

    @property
    def texts(self) -> Places:
        """[N], which text each number belongs to."""
        return np.repeat(np.arange(len(self.starts) - 1), self.counts)

    def of(self, text: int) -> Hashes:
        """One text's numbers."""
        return self.values[self.starts[text] : self.starts[text + 1]]


def word_hashes(texts: Sequence[Sequence[str]]) -> Runs:
    """The first 64 bits of each word's blake2b, equal in every process."""
    counts = np.fromiter(map(len, texts), np.int64, len(texts))
    values = np.fromiter(map(_HASHES.__getitem__, chain.from_iterable(texts)), np.uint64, int(counts.sum()))
    if len(_HASHES) > _MOST_WORDS_KNOWN:
        _HASHES.clear()
    return Runs(values, _starts(counts))


def ngram_hashes(words: Runs, n: int) -> Runs:
    """One number for each `n` neighbouring words w of a text; none where it has fewer than `n`.

    mix(Σₖ wₖ·baseⁿ⁻ᵏ mod 2⁶⁴), with the last steps of splitmix64 to mix.
    """
    counts = np.maximum(words.counts - (n - 1), 0)
    windows = max(len(words.values) - (n - 1), 0)  # of all the words in a row; some cross from text to text
    sums = np.zeros(windows, np.uint64)
    for k in range(n):
        sums = (sums + words.values[k : k + windows]) * _BASE
    starts = _starts(counts)
    within = np.arange(starts[-1]) + np.repeat(words.starts[:-1] - starts[:-1], counts)
    return Runs(_mixed(sums[within]), starts)


def _mixed(values: Hashes) -> Hashes:
    """Each bit of a value has a say in each bit of its result (Steele et al. 2014, splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _starts(counts: Places) -> Places:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


class _Hashes(dict[str, int]):
    def __missing__(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
        self[word] = value
        return value


_HASHES = _Hashes()  # of words met before: natural text has few that are new
