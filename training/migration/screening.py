"""Which written inputs are worth keeping, before anything judges whether they look real."""

from collections import Counter
from collections.abc import Iterable

from training.data.content_hash import normalised

SHINGLE = 5  # characters
NEAR = 0.8  # of all shingles of two texts, from which they count as the same


class Screen:
    """Passes each input once; remembers what it has passed.

    An input is near another where the two share `NEAR` of their runs of five characters (Jaccard): in a sentence of
    seventy, a change of one short word.

    Args:
        seeds: what the model was shown, which is no new input.
        longest: characters of the longest real input; whatever is longer is not of their kind. None: no limit.

    Attributes:
        dropped: how many inputs were dropped, by reason.
    """

    def __init__(self, seeds: Iterable[str], longest: int | None) -> None:
        self.longest = longest
        self.dropped: Counter[str] = Counter()
        self._seeds = {normalised(seed) for seed in seeds}
        self._passed: dict[str, frozenset[str]] = {}

    def passes(self, item: str) -> bool:
        """Whether to keep `item`; if so, none that is like it passes later."""
        text = normalised(item)
        shingles = frozenset(text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1)))
        reason = self._reason(item, text, shingles)
        if reason:
            self.dropped[reason] += 1
            return False
        self._passed[text] = shingles
        return True

    def _reason(self, item: str, text: str, shingles: frozenset[str]) -> str:
        if not text:
            return "empty"
        if self.longest is not None and len(item) > self.longest:
            return "over-long"
        if text in self._seeds:
            return "seed"
        if text in self._passed:
            return "duplicate"
        if any(_alike(shingles, other) for other in self._passed.values()):
            return "near duplicate"
        return ""


def _alike(one: frozenset[str], other: frozenset[str]) -> bool:
    most, least = max(len(one), len(other)), min(len(one), len(other))
    if least < NEAR * most:  # more than that they cannot share
        return False
    shared = len(one & other)
    return shared >= NEAR * (len(one) + len(other) - shared)
