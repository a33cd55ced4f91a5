"""What a command needs before it can run flows: a Prefect server to report to, and a sign of life while they do."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.markup import escape

from cli.console import errors

if TYPE_CHECKING:
    from flows.progress import Listener
    from flows.progress import Progress as Report
    from infra.settings import Settings

LINE_MARK = "·"
_SECONDS_TO_FIRST_LINE = 10.0
_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_TO_A_LOST_STOP = 0.1


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
    """Show how far every stage is that the flows report: bars on a terminal, else a line from time to time.

    They go to standard error: standard output belongs to the result.
    """
    from flows.progress import listening

    with _bars() if errors.is_terminal else nullcontext(_lines()) as show, listening(show):
        yield


@contextmanager
def resumable(
    what: str, kept: str = "what is done is kept", remedy: str = "The same command goes on from there."
) -> Iterator[None]:
    """Ctrl-C and SIGTERM within it say what is kept; a training within it says more precisely where it is.

    Raises:
        Interrupted: it was stopped.
    """
    from infra.errors import Interrupted, RegraftError

    asked = False

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def once_more(lost: "sys.UnraisableHookArgs") -> None:
        """A stop that came where nothing can be raised, as in the callback that ends an import, comes again."""
        number = signal.SIGINT if lost.exc_type is KeyboardInterrupt else getattr(lost.exc_value, "signal", None)
        if number is None:
            unraisable(lost)
            return
        timer = threading.Timer(_SECONDS_TO_A_LOST_STOP, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    unraisable, sys.unraisablehook = sys.unraisablehook, once_more
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        # What was cut off in the middle may fail in its own way: SQLAlchemy in a commit, Prefect in a call.
        if isinstance(error, RegraftError) or not (asked or isinstance(error, KeyboardInterrupt)):
            raise
        raise Interrupted(f"{what} was stopped; {kept}.", remedy) from error
    finally:
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def whole(what: str, left: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM within it say what is `left` of a piece of work that is done whole or not at all.

    Raises:
        Interrupted: it was stopped.
    """
    with resumable(what, left, "Run the same command again."):
        yield


@contextmanager
def _bars() -> "Iterator[Listener]":
    """A bar for every stage, which vanishes when it is full."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bars:
        stages = {}

        def show(report: "Report") -> None:
            if report.stage not in stages:
                stages[report.stage] = bars.add_task(escape(report.stage), total=report.total, note="")
            stage = stages[report.stage]
            bars.update(stage, completed=report.done, total=report.total, note=report.note)
            if report.done >= report.total:
                bars.remove_task(stages.pop(report.stage))

        yield show


def _lines() -> "Listener":
    """For a log file: nothing for what is done in a moment, then a line now and then."""
    began = time.monotonic()
    due = began + _SECONDS_TO_FIRST_LINE

    def show(report: "Report") -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due:
            due = now + _SECONDS_BETWEEN_LINES
            clock = f"{int(now - began) // 60}:{int(now - began) % 60:02d}"
            line = f"{LINE_MARK} {clock}  {report.stage}  {report.done}/{report.total}  {report.note}"
            errors.print(escape(line.rstrip()), soft_wrap=True)

    return show
