"""The page about a selection: what was left out and why, the scores, and where the rows lie between pool and target.

One file, without scripts and without anything from elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from markupsafe import Markup

from flows.pictures import as_svg, axes_of_a_picture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PAGE = Path(__file__).with_name("selection_report.html")
_GREY, _BLUE, _RED = "#b8b8b8", "#3b6ea5", "#c8553d"
_BINS = 60
_SHOWN = (0.5, 99.5)  # percentiles of the scores; what lies beyond is shown at the edge


@dataclass(frozen=True)
class Samples:
    """Vectors of some rows of the pool [P, d], of the target [T, d] (none of it, where there is none) and of the
    selected rows [S, d]."""

    pool: "NDArray[np.float32]"
    target: "NDArray[np.float32]"
    selected: "NDArray[np.float32]"


def selection_page(
    name: str,
    steps: Sequence[Mapping[str, Any]],
    hits: Sequence[Mapping[str, Any]],
    scores: "NDArray[np.float64]",
    selected: "NDArray[np.bool_]",
    meaning: str,
    samples: Samples | None,
    warnings: Sequence[str],
) -> str:
    """HTML of a selection.

    Args:
        name: of the data set.
        steps: `step` and `rows` of each, in order.
        hits: of each evaluation set, how many of its items had a piece in the pool.
        scores: of all rows that were left to choose from [rows].
        selected: which of them were chosen [rows].
        meaning: what a score says.
        samples: of vectors; None where rows were not embedded.
        warnings: what is to be known about the numbers.
    """
    page = Environment(autoescape=True).from_string(_PAGE.read_text(encoding="utf-8"))
    pictures = [_histogram(scores, selected)]
    if samples is not None:
        pictures.append(_projection(samples))
    return page.render(
        name=name,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        steps=steps,
        hits=hits,
        meaning=meaning,
        pictures=pictures,
        warnings=warnings,
    )


def _histogram(scores: "NDArray[np.float64]", selected: "NDArray[np.bool_]") -> Markup:
    import numpy as np

    figure, axes = axes_of_a_picture(5.4, 3.6)
    shown = np.clip(scores, *np.percentile(scores, _SHOWN))
    _, edges, _ = axes.hist(shown, _BINS, color=_GREY, label=f"pool ({len(scores):,})")
    axes.hist(shown[selected], edges, color=_RED, label=f"selected ({int(selected.sum()):,})")
    axes.set(xlabel="score", ylabel="rows", yscale="log")
    axes.legend(frameon=False)
    return as_svg(figure)


def _projection(samples: Samples) -> Markup:
    """The samples on the two principal components of the pool's."""
    import numpy as np

    figure, axes = axes_of_a_picture(5.4, 3.6)
    centre = samples.pool.mean(axis=0)
    _, _, components = np.linalg.svd(samples.pool - centre, full_matrices=False)
    shown = ((samples.pool, _GREY, "pool"), (samples.target, _BLUE, "target"), (samples.selected, _RED, "selected"))
    for rows, colour, name in shown:
        if len(rows):
            x, y = ((rows - centre) @ components[:2].T).T
            axes.scatter(x, y, s=6, color=colour, label=name, alpha=0.6, linewidths=0)
    axes.set(xlabel="first principal component of the pool", ylabel="second")
    axes.legend(frameon=False, markerscale=2)
    return as_svg(figure)
