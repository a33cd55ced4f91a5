"""Pictures: within pages that hold everything themselves, or as artifacts."""

import io
from typing import Any

from markupsafe import Markup

_DOTS = 110  # of a PNG, an inch


def axes_of_a_picture(width: float = 3.6, height: float = 3.2) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes, without a frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def as_png(figure: Any) -> bytes:
    """A figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(_DOTS)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def as_svg(figure: Any) -> Markup:
    """A figure as an element of HTML."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return Markup(buffer.getvalue()[buffer.getvalue().index("<svg") :])
