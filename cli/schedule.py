"""`regraft schedule` and `regraft worker`: training on a timetable."""

import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import Json, ago, console, print_json, show
from cli.queueing import tell_queued

if TYPE_CHECKING:
    from flows.schedules import Schedule

app = typer.Typer(
    help="Train on a timetable. Schedules live in Prefect; regraft worker runs them.", no_args_is_help=True
)

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def _interval(text: str) -> timedelta:
    from infra.errors import InvalidInput

    match = re.fullmatch(r"(\d+)\s*([smhdw])", text.strip())
    if match is None or int(match[1]) == 0:
        raise InvalidInput(f"'{text}' is not an interval.", "Write a number and a unit: 30m, 6h, 1d, 2w.")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


@app.command("train")
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe to train by. Its adapter names the schedule.")],
    cron: Annotated[str | None, typer.Option(help='"minute hour day month weekday", e.g. "0 3 * * 1".')] = None,
    interval: Annotated[str | None, typer.Option(help="Instead of cron: 30m, 6h, 1d, 2w.")] = None,
    timezone: Annotated[str | None, typer.Option(help="Time zone of the cron line, e.g. Europe/Berlin.")] = None,
    when_dataset_changes: Annotated[
        bool,
        typer.Option(
            "--when-dataset-changes",
            help="Train only where the data differ from those of the newest version; looks every hour unless told.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Create or update the training schedule of a recipe's adapter.

    Examples:
      [bold]regraft schedule train recipes/counting.yaml --cron "0 3 * * 1" --timezone Europe/Berlin[/]
      [bold]regraft schedule train recipes/counting.yaml --when-dataset-changes --interval 30m[/]
    """
    from cli.session import connect_flows

    settings = connect_flows()
    from flows.schedules import Trigger, create
    from training.recipe import load_recipe

    if when_dataset_changes and cron is None and interval is None:
        interval = "1h"
    trigger = Trigger(cron=cron, interval=_interval(interval) if interval else None, timezone=timezone)
    schedule = create(load_recipe(recipe), trigger, settings, only_when_data_changes=when_dataset_changes)
    if as_json:
        print_json(schedule)
        return
    console.print(f"[bold]{schedule.adapter}[/] trains {_when(schedule)}. Next:")
    for moment in schedule.next_runs:
        console.print(f"  {_at(moment)}")
    console.print("[dim]A worker runs it: regraft worker[/]")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Every schedule: when, next run, last result, owner."""
    from cli.session import connect_flows

    connect_flows()
    from flows.schedules import listing

    schedules = listing()
    if as_json:
        print_json(schedules)
        return
    show(
        ("adapter", "~when", "next run", "~last result", "owner"),
        _rows(schedules),
        "No schedules. Make one: regraft schedule train RECIPE --cron …",
    )


@app.command("pause")
def pause(adapter: str, as_json: Json = False) -> None:
    """Stop a schedule from starting runs, until [bold]regraft schedule resume[/]."""
    from cli.session import connect_flows

    connect_flows()
    from flows.schedules import pause as pause_schedule

    _told(pause_schedule(adapter), as_json)


@app.command("resume")
def resume(adapter: str, as_json: Json = False) -> None:
    """Let a paused schedule start runs again."""
    from cli.session import connect_flows

    connect_flows()
    from flows.schedules import resume as resume_schedule

    _told(resume_schedule(adapter), as_json)


@app.command("run-now")
def run_now(adapter: str) -> None:
    """Queue one run at once, beside the schedule. A worker picks it up."""
    from cli.session import connect_flows

    connect_flows()
    from flows.schedules import run_now as queue_run

    tell_queued(queue_run(adapter))


@app.command("remove")
def remove(adapter: str) -> None:
    """Delete a schedule. Its past runs and the versions they made stay."""
    from cli.session import connect_flows

    connect_flows()
    from flows.schedules import remove as remove_schedule

    remove_schedule(adapter)
    console.print(f"The schedule of [bold]{adapter}[/] is gone.")


def worker(
    once: Annotated[bool, typer.Option("--once", help="Run what is due now, then leave.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Flow runs at a time.")] = 1,
) -> None:
    """Execute scheduled trainings and queued migrations until Ctrl-C.

    Each run is a process of its own; those on a GPU share its slots (setting [bold]gpu_slots[/]).
    """
    import os
    import subprocess
    import sys

    from cli.session import connect_flows

    connect_flows()
    from flows.schedules import due
    from flows.work_pool import POOL, ensure_pool
    from infra.settings import configuration_file

    ensure_pool()
    from cli.quiet import outspoken_environment

    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--limit", str(limit)]
    console.print(
        f"A worker for the pool [bold]{POOL}[/]; Prefect at {os.environ['PREFECT_API_URL']}. Ctrl-C stops it."
    )
    environment = outspoken_environment()
    if configuration := configuration_file():  # runs start in folders of their own
        environment["REGRAFT_CONFIG"] = str(configuration.resolve())

    def work(*options: str) -> int:
        process = subprocess.Popen([*command, *options], env=environment)
        try:
            return process.wait()
        except KeyboardInterrupt:  # the worker got it too and ends its runs
            raise typer.Exit(process.wait()) from None

    if not once:
        raise typer.Exit(work())
    waiting = due()
    while not (code := work("--run-once")) and 0 < (left := due()) < waiting:  # it takes no more than `limit` at a time
        waiting = left
    raise typer.Exit(code)


def _rows(schedules: Iterable["Schedule"]) -> list[tuple[str, ...]]:
    return [
        (
            f"[bold]{s.adapter}[/]",
            _when(s),
            "paused" if s.paused else _at(s.next_runs[0]) if s.next_runs else "–",
            f"{s.last_result}, {ago(s.last_run)}" if s.last_result and s.last_run else s.last_result or "–",
            s.owner,
        )
        for s in schedules
    ]


def _told(schedule: "Schedule", as_json: bool) -> None:
    if as_json:
        print_json(schedule)
        return
    state = "paused" if schedule.paused else f"on; next run {_at(schedule.next_runs[0])}"
    console.print(f"[bold]{schedule.adapter}[/] is {state}.")


def _when(schedule: "Schedule") -> str:
    return schedule.when + (", if the data changed" if schedule.only_when_data_changes else "")


def _at(moment: datetime) -> str:
    return moment.strftime("%a %d %b %Y %H:%M %Z")
