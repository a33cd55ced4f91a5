"""`regraft migrate --all`: a whole base model's adapters, planned, moved and told."""

import time
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from cli.console import console, measured, percent, print_json, show, table
from cli.queueing import leave

if TYPE_CHECKING:
    from flows.fleet_plan import FleetPlan
    from flows.migrate_fleet import Fleet
    from training.evaluation.suite import Suite

_MOST_SHOWN = 40
_MOST_WATCHED = 15
_SECONDS_BETWEEN_LOOKS = 0.5


def migrate_all(
    source: str | None,
    target: str,
    inputs: int | None,
    method: str | None,
    filtered: bool,
    changes: dict[str, Any],
    suites: "tuple[Suite, ...]",
    evaluate: bool,
    alias: str | None,
    promote: str | None,
    dry_run: bool,
    queue: bool,
    as_json: bool,
) -> None:
    """What `regraft migrate --all` does; see its help."""
    from cli.session import connect_flows, live_progress, resumable
    from flows.fleet_plan import plan_fleet
    from infra.errors import InvalidInput
    from registry.addresses import alias_name
    from training.migration.options import FleetOptions

    source = _required(source)
    for each in filter(None, (alias, promote)):
        alias_name(each)
    if promote and not evaluate:
        raise InvalidInput(f"'{promote}' cannot move to versions that are not measured.", "Leave out --no-evaluate.")
    options = FleetOptions(inputs=inputs, method=method, filtered=filtered, changes=changes)
    plan = plan_fleet(source, target, options, alias, own_suites=evaluate and not suites)
    if dry_run:
        print_json(plan) if as_json else _tell_plan(plan)
        return
    settings = connect_flows()  # what needs no server has come first
    from flows.migrate_fleet import migrate_fleet

    told: dict[str, Any] = {
        "source": source,
        "target": target,
        "options": options,
        "suites": suites,
        "evaluate": evaluate,
        "alias": alias,
        "promote_to": promote,
    }
    if queue:
        leave(migrate_fleet, f"{plan.source} to {plan.target}", told, settings, as_json=as_json)
        return
    with live_progress(), resumable("The migration"):
        fleet = migrate_fleet(**told)
    print_json(fleet) if as_json else _tell(fleet)
    if any(a.decision == "not as good" or (a.problem and a.decision != "cannot move") for a in fleet.adapters):
        raise typer.Exit(7)


def watch_all(source: str | None, target: str, as_json: bool) -> None:
    """Show where a fleet is until it has ended; it does not matter who runs it, nor if this is closed."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from flows.fleet_board import WAITING, is_running, read_board
    from registry import AdapterRegistry

    registry = AdapterRegistry()
    old, new = (registry.base_model(base).name for base in (_required(source), target))
    if as_json:
        print_json({"board": read_board(old, new), "running": is_running(old, new)})
        return

    def shown() -> Group:
        board = read_board(old, new)
        counts = "   ".join(f"{number:,} {state}" for state, number in board.counts.items())
        begun = [place for place in board.places if place.state != WAITING]
        grid = table("version", "state", "~")
        for place in begun[-_MOST_WATCHED:]:
            grid.add_row(place.address, f"[{_COLOURS.get(place.state, 'red')}]{place.state}[/]", escape(place.note))
        return Group(Text(f"{old} → {new}   {counts}"), Text(), grid)

    with Live(shown(), console=console, refresh_per_second=2) as live:
        while is_running(old, new):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            live.update(shown())
        live.update(shown())
    if not console.is_terminal:
        console.print()  # what was live has left no newline
    console.print("[dim]Nobody is at work on it now.[/]")


def _required(source: str | None) -> str:
    if source is None:
        raise typer.BadParameter("--all needs --from BASE: the base model whose adapters are to move.")
    return source


def _tell_plan(plan: "FleetPlan") -> None:
    rows = [
        (
            item.address,
            ", ".join(item.aliases) or "–",
            item.method,
            "–" if item.kit is None else "seeds" if item.discriminator is None else percent(item.discriminator),
            str(item.inputs),
            "–" if item.seconds is None or item.migrated or item.obstacle else duration(item.seconds),
            f"is {item.migrated} already" if item.migrated else escape(item.obstacle or "moves"),
        )
        for item in plan.items[:_MOST_SHOWN]
    ]
    columns = ("version", "~aliases", "method", ">discriminator", ">inputs", ">estimate", "~what happens")
    show(columns, rows, f"No adapter stands on {plan.source}.")
    if len(plan.items) > _MOST_SHOWN:
        console.print(f"[dim]… and {len(plan.items) - _MOST_SHOWN:,} more; --json shows all[/]")
    lacking = sum(item.obstacle is not None and item.migrated is None for item in plan.items)
    there = sum(item.migrated is not None for item in plan.items)
    console.print(
        f"\n[bold]{len(plan.to_do):,}[/] of {len(plan.items):,} move from {plan.source} to {plan.target}"
        + (f", {there:,} are there already" if there else "")
        + (f", {lacking:,} cannot" if lacking else "")
    )
    if plan.left_out:
        shown = ", ".join(plan.left_out[:5]) + (f" and {len(plan.left_out) - 5:,} more" if plan.left_out[5:] else "")
        console.print(f"[dim]left out, since a newer or aliased version of the same adapter moves: {shown}[/]")
    if plan.seconds is not None:
        console.print(f"about {duration(plan.seconds)} on this machine [dim](from {plan.estimate})[/]")


def _tell(fleet: "Fleet") -> None:
    rows = [
        (
            adapter.address,
            adapter.migrated or "–",
            *(
                "\n".join(measured(c.metric, getattr(c, who)[0]) for c in adapter.compared) or "–"
                for who in ("teacher", "bare", "student")
            ),
            "–" if adapter.acceptance is None else f"{adapter.acceptance:.0%}",
            f"[{_COLOURS.get(adapter.decision, 'red')}]{adapter.decision}[/]"
            + (f": {escape(adapter.problem)}" if adapter.problem else ""),
        )
        for adapter in fleet.adapters[:_MOST_SHOWN]
    ]
    columns = ("version", "new", ">old adapter", ">bare", ">new adapter", "+>looked real", "~decision")
    show(columns, rows, f"No adapter stands on {fleet.source}.")
    if len(fleet.adapters) > _MOST_SHOWN:
        console.print(f"[dim]… and {len(fleet.adapters) - _MOST_SHOWN:,} more in the report[/]")
    console.print(f"\n{duration(fleet.seconds)}   report: {escape(str(fleet.report))}", soft_wrap=True)
    if fleet.count("failed"):
        console.print("[dim]The same command tries again what failed, and nothing else.[/]")


_COLOURS = {
    "promoted": "bold green",
    "as good": "green",
    "moved": "green",
    "moving": "bold",
    "not measured": "yellow",
    "cannot move": "yellow",
}


def duration(seconds: float) -> str:
    """Seconds for people: `4 min`, `2.5 h`."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"
