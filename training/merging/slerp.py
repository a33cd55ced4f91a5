"""SLERP: from one adapter's update to another's along the arc between them, layer by layer (Shoemake 1985).

    Δ = [sin((1−t)θ)·Δ₀ + sin(tθ)·Δ₁] / sin θ,    cos θ = ⟨Δ₀, Δ₁⟩ / (‖Δ₀‖‖Δ₁‖), of the flattened updates of a layer

Where |cos θ| > 0.9995 or one of them is zero: (1−t)Δ₀ + tΔ₁. Of LoRAs cos θ comes from the factors, and the result is
their stack, exact: nothing dense is formed. mergekit's `slerp` is the same rule, but for a zero update, which it takes
to stand at a right angle; it is mostly run on weights instead of updates, whose angle is nearly zero.
"""

from collections.abc import Sequence
from math import acos, sin, sqrt
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from infra.errors import InvalidInput
from training.low_rank import LowRank, Part, stacked, truncated
from training.merging.method import MergeMethod, weighted_sum

PARALLEL = 0.9995


class Slerp(MergeMethod):
    """Along the arc."""

    title: ClassVar[str] = "Spherical interpolation between the updates of two adapters"
    paper: ClassVar[str] = "Animating Rotation with Quaternion Curves, SIGGRAPH 1985"

    t: float = Field(0.5, ge=0, le=1, description="0 is the first adapter, 1 the second.")

    def low_rank(self, place: str, names: Sequence[str], updates: Sequence[LowRank]) -> Part:
        """Stacked."""
        _check_two(names)
        first, second = updates
        c = arc(self.t, first.inner(second), first.inner(first), second.inner(second))
        return truncated(stacked(updates, c), self.rank, self.energy)

    def entries(self, place: str, names: Sequence[str], updates: Tensor) -> Tensor:
        """Of one tensor."""
        _check_two(names)
        first, second = updates
        c = arc(self.t, *(float((x * y).sum()) for x, y in ((first, second), (first, first), (second, second))))
        return weighted_sum(updates, c)


def arc(t: float, inner: float, square_0: float, square_1: float) -> tuple[float, float]:
    """The coefficients of Δ₀ and Δ₁.

    Args:
        t: where on the arc.
        inner: ⟨Δ₀, Δ₁⟩.
        square_0: ‖Δ₀‖².
        square_1: ‖Δ₁‖².
    """
    lengths = sqrt(max(square_0, 0.0)) * sqrt(max(square_1, 0.0))
    if not lengths or abs(inner) > PARALLEL * lengths:
        return 1 - t, t
    angle = acos(inner / lengths)
    return sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)


def _check_two(names: Sequence[str]) -> None:
    if len(names) != 2:
        raise InvalidInput(
            f"'slerp' merges two adapters, not {len(names)}.", "Merge two, then the result with another."
        )
