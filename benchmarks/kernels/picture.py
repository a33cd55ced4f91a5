"""A results file of a kernel as a picture: how many times as fast as each peer, and how near to what the device can do.

python -m benchmarks.kernels.picture benchmarks/results/NAME.DEVICE.json ...
"""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parents[2] / "docs" / "images"
ROW_HEIGHT, WIDTH = 0.28, 9.0  # inches
BANDWIDTH, RATE = "GB/s", "TFLOP/s"  # units of which only shares of what a device does are told


def draw(results: Path) -> Path | None:
    """docs/images/NAME.DEVICE.svg; nothing, with a line that says so, where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        print(f"matplotlib is not installed: {results.name} is not drawn")
        return None
    import matplotlib

    matplotlib.rcParams |= {"svg.hashsalt": "regraft", "svg.fonttype": "none"}  # small, the same for the same numbers
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    content = json.loads(results.read_text(encoding="utf-8"))
    peers = [row for row in content["rows"] if not is_share(row)]
    shares = [row for row in content["rows"] if is_share(row)]
    panels = [(_against_peers, peers), (_of_the_ceilings, shares)]
    panels = [(panel, rows) for panel, rows in panels if rows]
    figure = Figure(figsize=(WIDTH, 1.2 * len(panels) + ROW_HEIGHT * len(content["rows"])), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=[len(rows) + 1 for _, rows in panels])[:, 0]
    for (panel, rows), place in zip(panels, axes, strict=True):
        panel(place, rows)
        place.invert_yaxis()
        place.spines[["top", "right"]].set_visible(False)
        place.tick_params(labelsize=7)
    figure.suptitle(f"{content['script']}, {content['device']}, {content['date']}", fontsize=9)
    IMAGES.mkdir(parents=True, exist_ok=True)
    path = IMAGES / f"{results.stem}.svg"
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
    return path


def is_share(row: Mapping[str, Any]) -> bool:
    """Whether a row of a results file compares with what the device can do at most, not with another program."""
    return row["unit"] in (BANDWIDTH, RATE)


def _against_peers(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """A bar a row, to the right where ours is better, whatever the unit; a stroke where the goal is."""
    from matplotlib.ticker import LogLocator

    names = list(dict.fromkeys(row["peer_name"] for row in rows))
    lengths = [_better(row, row["ratio"]) for row in rows]
    colors = [f"C{names.index(row['peer_name'])}" for row in rows]
    axes.barh(range(len(rows)), [length - 1 for length in lengths], left=1, color=colors, height=0.7)
    axes.plot([_better(row, row["goal"]) for row in rows], range(len(rows)), "k|", markersize=9, label="goal")
    for place, length in enumerate(lengths):
        axes.annotate(
            f"{length:.3g}×", (max(length, 1), place), (3, 0), textcoords="offset points", va="center", size=6
        )
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter("")
    axes.set_yticks(range(len(rows)), [f"{row['claim']}, {row['unit']}" for row in rows])
    for number, name in enumerate(names):
        axes.barh([0], [0], left=1, color=f"C{number}", label=f"against {name}")
    axes.legend(fontsize=6, loc="best", framealpha=0.8)
    axes.set_xlabel("times as good as the peer", fontsize=7)


def _better(row: Mapping[str, Any], ratio: float) -> float:
    """More where ours is better; a peer or a measurement of 0 is drawn as a thousand times."""
    ratio = min(max(ratio, 1e-3), 1e3)
    return ratio if row["better"] == "higher" else 1 / ratio


def _of_the_ceilings(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    colors = ["C0" if row["unit"] == BANDWIDTH else "C1" for row in rows]
    axes.barh(range(len(rows)), [100 * row["ratio"] for row in rows], color=colors, height=0.7)
    axes.plot([100 * row["goal"] for row in rows], range(len(rows)), "k|", markersize=9)
    axes.set_yticks(range(len(rows)), [row["claim"] for row in rows])
    axes.set_xlim(0, max(105, *(100 * row["ratio"] for row in rows)))
    axes.set_xlabel("% of the speed of copying (blue), of a matrix product (orange)", fontsize=7)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)))
