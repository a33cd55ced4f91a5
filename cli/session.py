"""What a command needs before it can run flows: a Prefect server to report to, and a bar in the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.markup import escape

from cli.console import errors

if TYPE_CHECKING:
    from flows.progress import Progress as Report
    from infra.settings import Settings


def connect_flows() -> "Settings":
    """Make flows importable and callable: start the local Prefect server where none is set, and point Prefect at it."""
    from infra.prefect_client import configure_prefect
    from infra.settings import get_settings

    settings = get_settings()

    with errors.status("connecting to Prefect (the local server takes about 10 s to start, once)"):
        configure_prefect(settings)
    return settings


@contextmanager
def live_progress() -> Iterator[None]:
    """Show every stage that the flows report as a bar that vanishes when it is full; on a terminal only.

    Bars go to standard error: standard output belongs to the result.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from flows.progress import listening

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bars:
        stages = {}

        def show(report: "Report") -> None:
            if report.stage not in stages:
                stages[report.stage] = bars.add_task(escape(report.stage), total=report.total, note="")
            stage = stages[report.stage]
            bars.update(stage, completed=report.done, total=report.total, note=report.note)
            if report.done >= report.total:
                bars.remove_task(stages.pop(report.stage))

        with listening(show):
            yield
