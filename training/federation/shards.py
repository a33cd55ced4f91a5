"""Parting examples among clients that are unlike."""

from collections.abc import Sequence

import numpy as np

from training.data.example import Example

MOST_ANSWERS = 50  # different ones, above which answers say nothing and lengths stand for kinds
KINDS = 10


def shards(examples: Sequence[Example], clients: int, skew: float, seed: int) -> list[list[Example]]:
    """Each client's examples: of every kind of example a share drawn from Dirichlet(`skew`) (Hsu et al., arXiv
    1909.06335), in their original order.

    A kind is an answer, where there are few; else a tenth of the examples by length. Nobody is left without any.

    Args:
        examples: to part; as many as clients at least.
        clients: how many.
        skew: concentration; small for clients that are unlike.
        seed: of the draw.
    """
    kinds = _kinds(examples)
    generator = np.random.default_rng(seed)
    owner = np.empty(len(examples), dtype=np.int64)
    for kind in sorted(set(kinds)):
        places = generator.permutation([place for place, own in enumerate(kinds) if own == kind])
        ends = np.cumsum(generator.dirichlet(np.full(clients, skew))) * len(places)
        owner[places] = np.searchsorted(ends, np.arange(len(places)) + 0.5).clip(max=clients - 1)
    for client in range(clients):
        if not (owner == client).any():
            richest = np.bincount(owner, minlength=clients).argmax()
            owner[np.flatnonzero(owner == richest)[0]] = client
    return [[examples[place] for place in np.flatnonzero(owner == client).tolist()] for client in range(clients)]


def _kinds(examples: Sequence[Example]) -> list[str]:
    answers = [example.completion for example in examples]
    if len(set(answers)) <= MOST_ANSWERS:
        return answers
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].prompt))
    kinds = [""] * len(examples)
    for rank, place in enumerate(order):
        kinds[place] = str(rank * KINDS // len(order))
    return kinds
