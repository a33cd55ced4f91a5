"""`regraft leaderboard`."""

import csv
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.console import Json, console, count, measured, print_json, show, size

if TYPE_CHECKING:
    from registry.leaderboard import Leaderboard, Standing

_MOST_SHOWN = 50


def leaderboard(
    task: Annotated[str, typer.Argument(help="A task, or the title of one suite, as object_counting/test.")],
    base: Annotated[str | None, typer.Option(help="Only versions on this base model.")] = None,
    method: Annotated[str | None, typer.Option(help="Only versions of this method.")] = None,
    metric: Annotated[str | None, typer.Option(help="Only numbers of this metric.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows of each table. Default: 50; of --json and --csv, all.")
    ] = None,
    all_versions: Annotated[
        bool,
        typer.Option(
            "--all-versions", help="Every version, not one for each adapter, base and method (production, else newest)."
        ),
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of tables.")] = False,
    as_json: Json = False,
) -> None:
    """Rank the versions that were measured on a task, across adapters, methods and base models.

    Only numbers on the same items stand in one table. Rank 1 are the best and all that are not significantly worse.

    Examples:
      [bold]regraft leaderboard object_counting[/]
      [bold]regraft leaderboard object_counting/test --base smollm2-135m-instruct --limit 10[/]
      [bold]regraft leaderboard object_counting --all-versions --csv > counting.csv[/]
    """
    from infra.errors import InvalidInput
    from registry import AdapterRegistry

    if as_csv and as_json:
        raise InvalidInput("--csv and --json are two forms of the same.", "Leave one out.")
    tables = AdapterRegistry().leaderboard(
        task,
        base=base,
        method=method,
        metric=metric,
        limit=limit or (None if as_csv or as_json else _MOST_SHOWN),
        all_versions=all_versions,
    )
    if as_json:
        print_json(tables)
    elif as_csv:
        _write_csv(tables)
    else:
        _tell(tables)


def _write_csv(tables: "list[Leaderboard]") -> None:
    from dataclasses import fields

    from registry.leaderboard import Standing

    of_table = ("suite", "metric", "dataset_fingerprint", "samples")
    of_standing = tuple(field.name for field in fields(Standing))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow((*of_table, *of_standing))
    for table in tables:
        head = [getattr(table, name) for name in of_table]
        writer.writerows([*head, *(getattr(each, name) for name in of_standing)] for each in table.standings)


def _tell(tables: "list[Leaderboard]") -> None:
    if not tables:
        console.print("[dim]None of them fits.[/]")
        return
    several = {name for name in (t.suite for t in tables) if sum(t.suite == name for t in tables) > 1}
    for number, table in enumerate(tables):
        if number:
            console.print()
        items = f"items {table.dataset_fingerprint[:8]}" if table.dataset_fingerprint else "unknown items: no ranks"
        told = f"{table.samples:,} {items}" if table.dataset_fingerprint is None or table.suite in several else ""
        console.print(f"[bold]{escape(table.suite)}[/]  [dim]{escape(table.metric)}  {told}[/]")
        columns = ("", "version", "method", "base", "+>base size", "+>parameters", ">size", ">score", "", ">p")
        show(columns, [_row(table.metric, each) for each in table.standings], "")
        if len(table.standings) < table.versions:
            console.print(f"[dim]… and {table.versions - len(table.standings):,} more[/]")
    console.print(
        "\n[dim]p: against the best, exact McNemar test or sign flips, Holm-corrected; rank 1: not significantly worse "
        "(5 %). ◆ nothing as good has a smaller adapter or base. "
        "Bare base models are not on it: regraft evaluate BASE[/]"
    )


def _row(metric: str, each: "Standing") -> tuple[str, ...]:
    rank = "" if each.rank is None else f"[bold]{each.rank}[/]" if each.rank == 1 else str(each.rank)
    return (
        rank,
        f"[bold]{each.address}[/]" if each.in_production else each.address,
        each.method,
        each.base,
        count(each.base_parameters),
        f"{each.trainable_parameters:,}",
        size(each.size_bytes),
        measured(metric, each.value, each.low, each.high),
        "◆" if each.pareto else "",
        "–" if each.p_value is None else f"{each.p_value:.2g}",
    )
