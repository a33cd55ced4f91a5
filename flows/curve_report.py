"""What a learning-curve study leaves: a table of all trainings, a picture, and both in MLflow and Prefect."""

import csv
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.curves import Curve, Measurement
from flows.pictures import as_png, axes_of_a_picture
from flows.reports import report_picture, report_table
from infra.errors import ServiceUnavailable
from infra.settings import get_settings
from registry.tracking import Tracking

logger = logging.getLogger(__name__)

_COLOURS = ("#3b6ea5", "#c8553d", "#4c956c", "#8d6a9f", "#b08900", "#555555")


def report_curves(
    name: str, curves: Sequence[Curve], measurements: Sequence[Measurement], folder: Path, tags: Mapping[str, str]
) -> None:
    """Write curve.csv and curve.png to `folder`, and show them in Prefect and MLflow.

    Args:
        name: of the adapter that the study is filed under.
        curves: what it found.
        measurements: a row of the table each.
        folder: where the files go.
        tags: of the MLflow run.
    """
    rows = [measurement.model_dump() for measurement in measurements]
    with (folder / "curve.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Measurement.model_fields), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    picture = curve_picture(name, curves)
    (folder / "curve.png").write_bytes(picture)
    report_table(name, "learning curve", rows)
    report_picture(name, "learning curve", picture)
    try:
        _show_in_mlflow(name, curves, folder, tags)
    except ServiceUnavailable as error:
        logger.warning("The learning curve of %s is not shown in MLflow: %s", name, error.what)


def curve_picture(name: str, curves: Sequence[Curve]) -> bytes:
    """PNG of the headline curves (of several tasks, their mean), with bands, on a logarithmic axis."""
    headline = [curve for curve in curves if curve.task == curves[-1].task]
    figure, axes = axes_of_a_picture(6.4, 3.8)
    for place, curve in enumerate(headline):
        colour = _COLOURS[place % len(_COLOURS)]
        sizes = [point.examples for point in curve.points]
        label = " ".join([curve.base, *([f"({curve.arm})"] if len({c.arm for c in headline}) > 1 else [])])
        axes.fill_between(
            sizes, [p.low for p in curve.points], [p.high for p in curve.points], color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(sizes, [p.value for p in curve.points], "o-", color=colour, linewidth=1.4, markersize=4, label=label)
        for point in curve.points:
            axes.plot([point.examples] * len(point.seeds), point.seeds, ".", color=colour, alpha=0.4, markersize=4)
        axes.axhline(curve.bare, color=colour, linewidth=0.8, linestyle="--", alpha=0.6)
        if curve.enough is not None:
            axes.plot(curve.enough.examples, curve.enough.value, "o", color=colour, markersize=10, fillstyle="none")
    axes.axhline(headline[0].reference, color="0.4", linewidth=1, linestyle=":")
    axes.set(title=f"{name}: {headline[0].task}", xlabel="training examples of a task", ylabel=headline[0].metric)
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=8)
    return as_png(figure)


def _show_in_mlflow(name: str, curves: Sequence[Curve], folder: Path, tags: Mapping[str, str]) -> None:
    """A run of the adapter's experiment: the score of each curve over the number of examples, and the two files."""
    tracking = Tracking(get_settings())
    run_id = tracking.start_run(name, name="learning curve", tags=tags, params={})
    points = [
        (round(point.examples), {re.sub(r"[^\w\-. :/]", "_", f"{curve.base}/{curve.arm}/{curve.task}"): point.value})
        for curve in curves
        for point in curve.points
    ]
    tracking.log_series(run_id, points)
    with TemporaryDirectory() as copies:
        for file in ("curve.csv", "curve.png"):
            (Path(copies) / file).write_bytes((folder / file).read_bytes())
        tracking.log_artifacts(run_id, Path(copies))
    tracking.finish(run_id)
