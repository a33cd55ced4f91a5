"""A picture of how well confidence and accuracy agree."""

from collections.abc import Sequence

from flows.pictures import as_png, axes_of_a_picture
from training.evaluation.calibration import BINS, reliability


def reliability_diagram(title: str, error: float, items: Sequence[Sequence[float]]) -> bytes:
    """PNG of the share of right answers over their confidence, in equally wide bins (Guo et al., arXiv:1706.04599).

    Args:
        title: what was measured.
        error: the expected calibration error, to be shown.
        items: (confidence, right) of each item.
    """
    bins = reliability([item[0] for item in items], [item[1] for item in items])
    figure, axes = axes_of_a_picture(4.4, 4.2)
    axes.plot((0, 1), (0, 1), color="#b8b8b8", linewidth=1, linestyle=":")
    axes.bar([b.confidence for b in bins], [b.accuracy for b in bins], width=0.8 / BINS, color="#3b6ea5")
    for b in bins:
        axes.annotate(str(b.items), (b.confidence, b.accuracy), fontsize=6, ha="center", va="bottom")
    axes.set(title=title, xlabel="confidence", ylabel=f"share right (ECE {error:.3f})", xlim=(0, 1), ylim=(0, 1.05))
    axes.title.set_fontsize(9)
    return as_png(figure)
