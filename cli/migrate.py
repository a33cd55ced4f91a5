"""`regraft migrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cli.console import Json, console, facts, measured, print_json, show
from cli.queueing import leave

if TYPE_CHECKING:
    from flows.migrate_adapter import Link, Migration
    from training.data.example import Example


def migrate(
    address: Annotated[str | None, typer.Argument(help="NAME@VERSION or NAME@ALIAS; or --all --from BASE.")] = None,
    *,
    to: Annotated[
        str,
        typer.Option("--to", metavar="BASE", help="The new base: a registered name or, of one version, a reference."),
    ],
    inputs: Annotated[
        int | None, typer.Option(min=1, help="Synthetic inputs. Default: three for each row there was, at most 750.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Of the new adapter. Default: the old one's.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="E.g. training.steps=250, method.rank=4."),
    ] = None,
    seeds: Annotated[
        Path | None, typer.Option(help="Examples (JSONL, CSV) instead of a kit: weaker, nothing filters then.")
    ] = None,
    filtered: Annotated[bool, typer.Option("--filter/--no-filter", help="Use the kit's discriminator.")] = True,
    task: Annotated[list[str] | None, typer.Option(help="Built-in task(s) to measure on, not the recipe's.")] = None,
    evaluate: Annotated[bool, typer.Option(help="Measure old adapter, bare target and new adapter.")] = True,
    name: Annotated[str | None, typer.Option("--as", help="The adapter that it joins. Default: its own.")] = None,
    promote: Annotated[
        str | None, typer.Option(metavar="ALIAS", help="Move this alias, if the new version passes and policy allows.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every adapter of the base that --from names.")] = False,
    from_: Annotated[str | None, typer.Option("--from", metavar="BASE", help="With --all: the old base.")] = None,
    alias: Annotated[str | None, typer.Option(help="With --all: only versions that this alias points at.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --all: only say what would be done.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="With --all: look on while another process does it.")] = False,
    queue: Annotated[bool, typer.Option("--queue", help="Leave it to a worker (regraft worker).")] = False,
    as_json: Json = False,
) -> None:
    """Move a version to another base model without the data it was trained on; or, with --all, a whole base's adapters.

    The new base writes inputs like the kit's seeds, those are chosen that together look like the real ones, the old
    adapter answers them, and a fresh adapter on the new base learns the answers. Ctrl-C keeps what is done: the same
    command goes on from there. Exit code 7: the new version is worse than the old one or the bare base; nothing is
    promoted.

    With --all, each adapter's aliases, or else its newest version, move one after the other; what fails does not stop
    the rest, what has moved already is left alone, and a page with all numbers is written at the end.

    Examples:
      [bold]regraft migrate counting@3 --to gemma3-270m[/]
      [bold]regraft migrate --all --from smollm2-135m-instruct --to gemma3-270m --dry-run[/]
      [bold]regraft migrate --all --from smollm2-135m-instruct --to gemma3-270m --watch[/]  (from another terminal)
      [bold]regraft migrate counting@production --to gemma3-270m --method dora --promote production[/]
    """
    from cli.session import connect_flows, live_progress, resumable
    from cli.train import overrides
    from registry import AdapterRegistry

    if address is not None and not all_:
        AdapterRegistry().get(address)  # before anything heavy is imported
    from flows.suites import suites_for

    suites, changes = suites_for(task, 0, None), overrides(set_ or [])
    if all_:
        from cli.fleet import migrate_all, watch_all

        _not_with_all(address=address, seeds=seeds, name=name)
        if watch:
            watch_all(from_, to, as_json)
            return
        migrate_all(
            from_, to, inputs, method, filtered, changes, suites, evaluate, alias, promote, dry_run, queue, as_json
        )
        return
    if address is None or from_ or alias or dry_run or watch:
        with_all = {"--from": from_, "--alias": alias, "--dry-run": dry_run, "--watch": watch}
        given = ", ".join(flag for flag, value in with_all.items() if value)
        raise typer.BadParameter(
            f"{given} goes with --all." if address else "Give NAME@VERSION, or --all with --from BASE."
        )
    from flows.migrate_adapter import migrate_adapter
    from flows.migration_plan import plan_migration
    from training.migration.options import options_from

    version = AdapterRegistry().get(address)
    options = options_from(version.recipe, inputs, method, filtered, changes)
    shown = _seeds(seeds)
    plan = plan_migration(version.address, to, options, shown, suites, evaluate, name, promote)
    settings = connect_flows()  # what needs no server has come first
    told: dict[str, Any] = {
        "address": version.address,
        "target": plan.target.name,
        "options": options,
        "seeds": shown,
        "suites": suites,
        "evaluate": evaluate,
        "name": name,
        "promote_to": promote,
    }
    if queue:
        leave(migrate_adapter, f"{version.address} to {plan.target.name}", told, settings, as_json=as_json)
        return
    with live_progress(), resumable("The migration"):
        migration = migrate_adapter(**told)
    if as_json:
        print_json(migration)
    else:
        _tell(migration)
    if migration.passed is False or (migration.promotion and not migration.promotion.moved):
        raise typer.Exit(7)


def _tell(migration: "Migration") -> None:
    when = "by this very migration, made before" if migration.existed else f"in {migration.seconds:.0f} s"
    console.print(
        f"[bold green]✓[/] [bold]{migration.address}[/]  {migration.method} on {migration.base}, "
        f"regrafted from [bold]{migration.source}[/] {when}"
    )
    dropped = ", ".join(f"{count} {reason}" for reason, count in migration.dropped.items() if count)
    kept = "not filtered" if migration.acceptance is None else f"{migration.acceptance:.0%} looked real"
    facts(
        (
            ("synthetic inputs", f"{migration.inputs} of {migration.written} written; {kept}"),
            ("dropped", escape(dropped or "none")),
        )
    )
    if migration.compared:
        console.print()
        tell_compared(migration)
    if migration.chain:
        _tell_chain(migration)
    if migration.passed is False:
        console.print("[bold red]not as good[/] as the better of old adapter and bare target; registered all the same.")
    if migration.promotion is not None:
        from cli.promote import tell_verdict

        tell_verdict(migration.promotion)
    elif migration.passed:
        console.print(f"[dim]next: regraft promote {migration.address} --to production[/]")


def tell_compared(migration: "Migration") -> None:
    """Print what the three models measure on each suite."""
    rows = [
        (
            "[green]✓[/]" if c.passed else "[red]✗[/]",
            c.suite,
            *(measured(c.metric, *values) for values in (c.teacher, c.bare, c.student)),
            str(c.samples),
        )
        for c in migration.compared
    ]
    show(("", "~suite", ">old adapter", ">bare target", ">new adapter", ">samples"), rows, "")


def _tell_chain(migration: "Migration") -> None:
    """What each step from base to base has cost, or brought."""
    console.print()
    metrics = {suite.suite: suite.metric for suite in migration.compared}

    def told(link: "Link", suite: str) -> str:
        return measured(metrics[suite], *link.measured[suite]) if suite in link.measured else "–"

    rows = [(link.address, link.base, *(told(link, suite) for suite in metrics)) for link in migration.chain]
    show(("chain", "base", *(f">{suite}" for suite in metrics)), rows, "")


def _not_with_all(**options: object) -> None:
    flags = {"address": "NAME@VERSION", "name": "--as", "seeds": "--seeds"}
    if given := [flags[option] for option, value in options.items() if value is not None]:
        raise typer.BadParameter(f"{', '.join(given)} says something of one version; --all moves a whole base's.")


def _seeds(path: Path | None) -> "tuple[Example, ...]":
    if path is None:
        return ()
    from infra.errors import InvalidInput, NotFound
    from training.data.sources import DataSource, read_examples

    if not path.is_file():
        raise NotFound(f"{path} is not there.", "Check the path; it counts from the working directory.")
    try:
        examples = tuple(read_examples(DataSource(file=path)))
    except InvalidInput as error:
        raise InvalidInput(error.what, 'Write rows like {"prompt": "…", "completion": "…"}, one a line.') from None
    if not examples:
        raise InvalidInput(f"{path} holds no examples.", "Write a few rows of prompt and completion into it.")
    return examples
