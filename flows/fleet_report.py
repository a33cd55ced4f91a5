"""The page that a fleet migration ends with: what became of every adapter, with the numbers and three pictures.

One file, without scripts and without anything from elsewhere, to be sent around.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from flows.pictures import as_svg, axes_of_a_picture

_PAGE = Path(__file__).with_name("fleet_report.html")


def fleet_page(source: str, target: str, adapters: Sequence[Mapping[str, Any]]) -> str:
    """HTML of a fleet's outcome.

    Args:
        source: name of the base model that is going away.
        target: name of the other one.
        adapters: as `flows.migrate_fleet.Moved` dumps itself.
    """
    page = Environment(autoescape=True).from_string(_PAGE.read_text(encoding="utf-8"))
    return page.render(
        source=source,
        target=target,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        decisions=Counter(adapter["decision"] for adapter in adapters).most_common() or [("adapters", 0)],
        pictures=list(_pictures(adapters)),
        adapters=adapters,
        measured=_measured,
        percent=lambda share: f"{100 * share:.0f} %",
    )


def _measured(metric: str, value: float, low: float | None, high: float | None) -> str:
    scale, unit = (1, "") if metric == "perplexity" else (100, " %")
    interval = f" [{scale * low:.1f}–{scale * high:.1f}]" if low is not None and high is not None else ""
    return f"{scale * value:.1f}{unit}{interval}"


def _pictures(adapters: Sequence[Mapping[str, Any]]) -> Sequence[Markup]:
    """Old against new accuracy, shares that looked real, and seconds; each where there is something to show."""
    shares = [c for a in adapters for c in a["compared"] if c["metric"] != "perplexity"]
    made = []
    if shares:
        made.append(_scatter([100 * c["teacher"][0] for c in shares], [100 * c["student"][0] for c in shares]))
    for key, scale, label in (("acceptance", 100, "inputs that looked real, %"), ("seconds", 1, "seconds")):
        if known := [scale * a[key] for a in adapters if a[key] is not None]:
            made.append(_histogram(known, label))
    return made


def _scatter(old: Sequence[float], new: Sequence[float]) -> Markup:
    figure, axes = axes_of_a_picture()
    axes.plot((0, 100), (0, 100), color="0.8", linewidth=1)
    axes.scatter(old, new, s=14, color="#3b6ea5", alpha=0.7)
    axes.set(xlabel="old adapter, %", ylabel="new adapter, %", xlim=(-2, 102), ylim=(-2, 102))
    return as_svg(figure)


def _histogram(values: Sequence[float], label: str) -> Markup:
    figure, axes = axes_of_a_picture()
    axes.hist(values, bins=min(20, max(5, len(values) // 5)), color="#3b6ea5")
    axes.set(xlabel=label, ylabel="adapters")
    return as_svg(figure)
