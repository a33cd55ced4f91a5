"""Few out of many: seeds that stand for all examples, and candidates that look like the real inputs."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch

from training.data.example import Example

BINS = 10


def spread(examples: Sequence[Example], number: int) -> list[Example]:
    """One of each of `number` equal shares by length: the first whose answer is new, or else the first."""
    number = min(number, len(examples))
    ordered = sorted(examples, key=lambda example: len(example.prompt))
    chosen: list[Example] = []
    for share in range(number):
        among = ordered[len(ordered) * share // number : len(ordered) * (share + 1) // number]
        answers = {example.completion for example in chosen}
        chosen.append(next((example for example in among if example.completion not in answers), among[0]))
    return chosen


def deciles(lengths: Sequence[int]) -> tuple[int, ...]:
    """The nine lengths that part them into ten equal shares."""
    parts = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1]
    return tuple(round(each) for each in torch.tensor(lengths, dtype=torch.float64).quantile(parts).tolist())


def choose(
    inputs: Sequence[str],
    margins: Sequence[float],
    wanted: int,
    *,
    temperature: float,
    bounds: Sequence[int],
    seed: int,
) -> list[str]:
    """`wanted` of the inputs, distributed as the real ones are, as far as can be told of those.

    Args:
        inputs: what was written.
        margins: of the discriminator; none where there is none.
        wanted: how many.
        temperature: that calibrates the margins.
        bounds: `deciles` of the real lengths; none where they are not known.
        seed: of the draw.
    """
    order = by_likeness(margins, temperature, seed) if margins else range(len(inputs))
    taken = as_long([len(text) for text in inputs], order, bounds, wanted) if bounds else order[:wanted]
    return [inputs[place] for place in taken]


def by_likeness(margins: Sequence[float], temperature: float, seed: int) -> list[int]:
    """All places, in the order in which drawing without replacement takes them: each as likely as p(real)/p(written).

    A calibrated discriminator's odds are that density ratio (Azadi et al., arXiv 1810.06758, section 3.1), so that what
    is drawn first is distributed as the real inputs are, as far as there are enough of each kind. The draw is that of
    the Gumbel-top-k trick (Kool et al., arXiv 1903.06059).

    Args:
        margins: log p(yes) − log p(no) of each candidate.
        temperature: that calibrates them.
        seed: of the draw.
    """
    uniform = torch.rand(len(margins), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gumbel = -(-uniform.clamp_min(1e-300).log()).log()
    return (torch.tensor(margins, dtype=torch.float64) / temperature + gumbel).argsort(descending=True).tolist()


def as_long(lengths: Sequence[int], order: Sequence[int], bounds: Sequence[int], wanted: int) -> list[int]:
    """`wanted` places, the first in `order` of each share of lengths, as many of each; what lacks, in `order`.

    Args:
        lengths: of all candidates.
        order: their places, preferred ones first.
        bounds: `deciles` of the real lengths.
        wanted: how many.
    """
    quota = [wanted * (share + 1) // BINS - wanted * share // BINS for share in range(BINS)]
    taken = []
    for place in order:
        fits = range(
            bisect_left(bounds, lengths[place]), bisect_right(bounds, lengths[place]) + 1
        )  # several where tied
        if (share := next((share for share in fits if quota[share]), None)) is not None:
            quota[share] -= 1
            taken.append(place)
    others = set(taken)
    return (taken + [place for place in order if place not in others])[:wanted]
