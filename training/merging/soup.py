"""Greedy soup: the mean of those adapters that help (Wortsman et al., arXiv 2203.05482; POINTS, arXiv 2409.04828).

    sort by own score, S = {best};  for each next i: if score(mean(S ∪ {i})) ≥ score(mean(S)), S ← S ∪ {i}

The uniform soup is `Linear()`. Means are of updates, uniform over S; of LoRAs exact, of rank Σrᵢ. The result scores no
less than the best adapter alone, on what scores it: that is selection, so let a held-out set score and another report.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from infra.errors import InvalidInput
from training.merging.adapter import Adapter, Merged, check
from training.merging.linear import Linear
from training.merging.merge import merge


@dataclass(frozen=True)
class Tasting:
    """One score that was asked for.

    Args:
        ingredients: whose mean was scored.
        score: of it.
        taken: whether it is the soup from then on.
    """

    ingredients: tuple[str, ...]
    score: float
    taken: bool


@dataclass(frozen=True)
class Soup:
    """What came out, and how.

    Args:
        merged: the mean of the ingredients; the best adapter itself where nothing helped it.
        ingredients: by name, best first.
        score: of `merged`.
        tastings: every score, the single ones first, in the adapters' order.
    """

    merged: Merged
    ingredients: tuple[str, ...]
    score: float
    tastings: tuple[Tasting, ...]


def greedy_soup(
    adapters: Sequence[Adapter],
    score: Callable[[Adapter], float],
    mean: Linear = Linear(),
    base: Mapping[str, Tensor] | None = None,
) -> Soup:
    """The greedy soup of `adapters`; asks for n scores of single ones and n − 1 of means.

    Args:
        adapters: two or more, as `merge` takes them.
        score: higher is better.
        mean: says to what rank or energy a LoRA's mean is cut before it is scored; weights are not for it.
        base: as `merge` takes it.

    Raises:
        InvalidInput: a score is NaN or infinite, weights are given, or the adapters do not go together.
    """
    check(adapters)
    if mean.weights is not None or mean.scale != 1:
        raise InvalidInput("A soup's weights are uniform.", "Leave weights and scale out.")

    def taste(adapter: Adapter, names: tuple[str, ...]) -> float:
        found = float(score(adapter))
        if not isfinite(found):
            raise InvalidInput(f"The score of {' + '.join(names)} is {found}.", "Does it answer at all? Leave it out.")
        return found

    own = [taste(adapter, (adapter.name,)) for adapter in adapters]
    order = sorted(range(len(adapters)), key=lambda place: -own[place])  # stable: of equals the first
    best = adapters[order[0]]
    chosen, high = [best], own[order[0]]
    merged = Merged(best.name, best.config, best.tensors)
    tastings = [Tasting((each.name,), found, each is best) for each, found in zip(adapters, own, strict=True)]
    for place in order[1:]:
        tried = [*chosen, adapters[place]]
        names = tuple(adapter.name for adapter in tried)
        candidate = merge(tried, mean, base)
        found = taste(candidate, names)
        tastings.append(Tasting(names, found, found >= high))
        if found >= high:
            chosen, high, merged = tried, found, candidate
    return Soup(merged, tuple(adapter.name for adapter in chosen), high, tuple(tastings))
