"""Recognises what was compressed before, so that compressing it again changes nothing.

What a decoder gives does not have the moments of what the encoder saw: a task vector of ±s and few non-zeros has a
smaller standard deviation than s, the ±0.67·σ of a 1-bit matrix has 0.67·σ. Estimated anew, each round would shrink it.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from training.compression.codec import Origin, pieces
from training.compression.rounding import moved, preimage

CANDIDATES = 16
PROBES = 8
REFITS = 4
MOST_ASSIGNMENTS = 64
SLOPES = 4096


def ternary_scale(sources: Sequence[tuple[Tensor, Origin]], most: int) -> float | None:
    """s of 16 bits (bfloat16), if all tensors are just their origin + s·γ, rounded to their dtype; None if not.

    Each non-zero tells between what s must lie; one s of that range is tried on all.

    Args:
        sources: tensors and what they are measured from, a number or a tensor of the same dtype.
        most: non-zeros that γ may have.
    """
    count, low, high = 0, 0.0, math.inf
    for tensor, origin in sources:
        for values, start in _beside(tensor, origin):
            changed = values != start
            count += int(changed.sum())
            if count > most:
                return None
            if not changed.any():
                continue
            below, above = preimage(values[changed])
            base, up = start[changed].double(), values[changed] > start[changed]
            low = max(low, float(torch.where(up, below - base, base - above).max()))
            high = min(high, float(torch.where(up, above - base, base - below).min()))
            if low > high:
                return None
    if not count:
        return 0.0
    ends = torch.tensor([low, min(high, 3e38)]).bfloat16().view(torch.int16).tolist()
    around = torch.arange(ends[0], ends[1] + 1, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).tolist()
    numbers: list[float] = [number for number in around if low <= number <= high]
    middle = len(numbers) // 2
    for scale in sorted(numbers, key=lambda number: abs(numbers.index(number) - middle))[:CANDIDATES]:
        if all(
            torch.equal(moved(start, (values > start).int() - (values < start).int(), scale), values)
            for source in sources
            for values, start in _beside(*source)
        ):
            return scale
    return None


def _beside(tensor: Tensor, origin: Origin) -> Iterator[tuple[Tensor, Tensor]]:
    """Values and what they are measured from, a piece at a time."""
    if isinstance(origin, Tensor):
        return zip(pieces(tensor), pieces(origin), strict=True)
    return ((piece, torch.full_like(piece, origin)) for piece in pieces(tensor))


def affine(values: Tensor, levels: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The levels that `values` are, as level·σ + μ in float32, rounded to their dtype; None if there are no such σ, μ.

    Args:
        values: different, ascending, [m], no more than there are levels.
        levels: ascending (float64).
        mean: of the whole matrix, in which each value may be many times.
        deviation: of that matrix.

    Returns:
        the index of each value's level (int64, [m]); μ and σ (float32).
    """
    if values.dtype == torch.float64:
        if not torch.equal(values.float().double(), values):
            return None
        values = values.float()
    if len(values) == 1:
        return torch.zeros(1, dtype=torch.int64), values[0].float(), torch.zeros(())
    for places in _assignments(values, levels, (values.double() - mean) / deviation):
        found = _line(values, levels[places].float())
        if found is not None:
            return places, *found
    return None


def _assignments(values: Tensor, levels: Tensor, z: Tensor) -> Iterator[Tensor]:
    """Levels that the values could be: what the first and the last would have to be, then lines through all.

    The likeliest come first. Through very few values a line goes for almost any levels; then those are likely that are
    near to the standardised values z.
    """
    below, above = preimage(values)
    borders, wide = (levels[:-1] + levels[1:]) / 2, values.double()
    allowed = (above - below) / 2 + 2**-22 * wide.abs().max()
    first, last = torch.triu_indices(len(levels), len(levels), offset=len(values) - 1)
    slope = (wide[-1] - wide[0]) / (levels[last] - levels[first])
    offset = wide[0] - slope * levels[first]
    few = torch.linspace(0, len(values) - 1, min(PROBES, len(values))).round().long()
    near = torch.bucketize((wide[few] - offset[:, None]) / slope[:, None], borders)
    off = (levels[near] * slope[:, None] + offset[:, None] - wide[few]).abs() / (allowed[few] + allowed[[0, -1]].sum())
    rank = off.amax(dim=1)
    if len(values) <= PROBES:
        ends = torch.bucketize(z[[0, -1]], borders)
        rank = torch.where(rank <= 1, ((first - ends[0]).abs() + (last - ends[1]).abs()) / (2 * len(levels)), rank)
    likely = rank.argsort(stable=True)[: min(MOST_ASSIGNMENTS, int((rank <= 1).sum()))]
    slope, offset = slope[likely, None], offset[likely, None]
    for _ in range(REFITS):
        near = torch.bucketize((wide - offset) / slope, borders)
        level = levels[near]
        centred = level - level.mean(dim=1, keepdim=True)
        slope = (centred * wide).sum(dim=1, keepdim=True) / centred.square().sum(dim=1, keepdim=True)
        offset = wide.mean() - slope * level.mean(dim=1, keepdim=True)
    off = (levels[near] * slope + offset - wide).abs().amax(dim=1) / allowed.max()
    order = off.argsort(stable=True)
    return (near[row] for row in order if off[row] <= 2 and (near[row].diff() > 0).all())


def _line(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor] | None:
    """μ and σ with level·σ + μ = value for all, bit for bit.

    Each σ leaves a range for μ, whose width is a concave function of σ: the search narrows down to its top until only
    as many float32 are left as can be tried.
    """
    below, above = preimage(values)
    span = float(levels[-1].double() - levels[0].double())
    noise = 2**-22 * float(values.double().abs().max())
    low = max(float(below[-1] - above[0]) - noise, 0) / span
    high = min((float(above[-1] - below[0]) + noise) / span, 3e38)
    while high - low > SLOPES / 4 * 2**-23 * high:
        slopes = torch.linspace(low, high, 65, dtype=torch.float64)
        least, most = _offsets(below, above, levels.double() * slopes[:, None])
        top = int((most - least).argmax())
        low, high = float(slopes[max(top - 1, 0)]), float(slopes[min(top + 1, 64)])
    slopes = torch.linspace(low * (1 - 2**-22), high * (1 + 2**-22), SLOPES, dtype=torch.float64).float().unique()  # type: ignore[no-untyped-call]
    least, most = _offsets(below, above, (levels * slopes[:, None]).double())
    for row in (most - least).argsort(descending=True, stable=True)[:CANDIDATES]:
        middle = ((least[row] + most[row]) / 2).float()
        for mean in (middle, *(torch.nextafter(middle, torch.tensor(end)) for end in (-math.inf, math.inf))):
            if torch.equal((levels * slopes[row] + mean).to(values.dtype), values):
                return mean, slopes[row]
    return None


def _offsets(below: Tensor, above: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Between what μ must lie for each row of level·σ, [slopes, m]."""
    return (below - products).amax(dim=1), (above - products).amin(dim=1)
