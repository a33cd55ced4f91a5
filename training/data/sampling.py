"""A seeded sample that stays put when data are added, removed or reordered."""

from collections import Counter
from collections.abc import Sequence

from training.data.content_hash import content_hash
from training.data.example import Example


def sample(examples: Sequence[Example], n: int, seed: int) -> list[Example]:
    """A uniformly random choice of `n` examples (all where there are fewer), in their original order.

    Each example's chance hangs on the seed and its own content, not on its position: a sample of n is part of every
    larger sample with the same seed, reordering the data chooses the same examples, and a new row takes the place
    of at most one.
    """
    copies: Counter[Example] = Counter()
    ranks: list[tuple[int, int]] = []
    for position, example in enumerate(examples):
        copies[example] += 1
        rank = content_hash(seed, example.prompt, example.completion, *example.choices, copies[example])
        ranks.append((rank, position))
    return [examples[position] for position in sorted(position for _, position in sorted(ranks)[:n])]
