"""`regraft federate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cli.console import Json, console, measured, print_json, show

if TYPE_CHECKING:
    from flows.federate import Federation


def federate(
    recipe: Annotated[Path, typer.Argument(help="The recipe (YAML): data, base, how long a client trains in a round.")],
    clients: Annotated[int | None, typer.Option(min=2, help="How many the training data are parted among.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How often they train and hand in.")] = None,
    ranks: Annotated[str | None, typer.Option(metavar="R,R,…", help="Of their LoRAs, in turn: 64,32,16,8,4.")] = None,
    skew: Annotated[
        float | None, typer.Option(help="How unlike their data are: 0.1 very, 100 hardly. Default: 0.5.")
    ] = None,
    aggregation: Annotated[
        str | None, typer.Option(help="stack: the exact mean (FLoRA). average: of padded factors, to compare with.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Cut the global adapter to this rank after a round.")] = None,
    least: Annotated[int | None, typer.Option(min=1, help="Clients that must come through a round.")] = None,
    runner: Annotated[
        str | None,
        typer.Option(help="process: clients train here, one after the other. flower: as nodes of Flower (flwr)."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe.")
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="Measure the global adapter after each round.")] = True,
    as_json: Json = False,
) -> None:
    """Train one adapter on data that stay apart: clients train LoRAs of their own ranks, a server adds them up exactly.

    The recipe's training data are parted among clients that are unlike. In each round every client trains for
    training.steps on top of the global adapter; the sum of what they hand in, by their shares of the examples, is the
    next one. Without options: 10 clients of ranks 64, 32, 16, 16, 8, 8, 4, 4, 4, 4, three rounds.

    Each round's global adapter is a version; what the clients handed in, NAME-client-K, are its parents. A client that
    fails is left out of its round, and told. Ctrl-C keeps what is done: the same command goes on from there.

    Examples:
      [bold]regraft federate recipes/shared-counting.yaml[/]
      [bold]regraft federate recipes/counting.yaml --set adapter=shared --clients 4 --ranks 16,8,4,4[/]
      [bold]regraft federate recipes/counting.yaml --set adapter=shared --rounds 5 --skew 0.1 --rank 32[/]
      [bold]regraft federate recipes/counting.yaml --set adapter=shared --runner flower[/]  (a process for each client)
    """
    from cli.session import connect_flows, live_progress, resumable
    from cli.train import overrides
    from infra.documents import parse
    from infra.errors import InvalidInput
    from training.federation.options import FederationOptions
    from training.recipe import load_recipe

    said: dict[str, Any] = {
        "clients": clients, "rounds": rounds, "skew": skew, "aggregation": aggregation, "rank": rank, "least": least,
        "runner": runner,
    }  # fmt: skip
    if ranks is not None:
        if not all(each.strip().isdecimal() and int(each) > 0 for each in ranks.split(",")):
            raise InvalidInput(f"--ranks {ranks}: whole numbers above zero are wanted.", "E.g. --ranks 16,8,4,4")
        said["ranks"] = [int(each) for each in ranks.split(",")]
    said = {key: value for key, value in said.items() if value is not None}
    options = parse(FederationOptions, said, "federate", remedy="See: regraft federate --help")
    chosen = load_recipe(recipe, overrides(set_ or []))
    with resumable("The federation"):
        connect_flows()
        from flows.federate import federate as run

        with live_progress():
            federation = run(chosen, options, evaluate=evaluate)
    print_json(federation) if as_json else _tell(federation)


def _tell(federation: "Federation") -> None:
    suites = [each.suite for each in next(iter(federation.measured.values()), [])]
    rows = [
        (
            made.address,
            f"{len(made.clients)} of {len(made.clients) + len(made.failed)}",
            f"{made.deviation:.1%}",
            *(
                measured(each.metric, each.child.value, each.child.low, each.child.high)
                for each in federation.measured.get(made.address, [])
            ),
        )
        for made in federation.rounds
    ]
    show(("after each round", ">clients", ">off the mean", *(f">{suite}" for suite in suites)), rows, "")
    for made in federation.rounds:
        for client, what in made.failed.items():
            console.print(f"[yellow]left out of {made.address}:[/] client {client}: {escape(what)}")
    console.print(
        f"[bold green]✓[/] [bold]{federation.address}[/]  on {federation.base}, of clients with "
        f"{', '.join(map(str, federation.examples))} examples, in {federation.seconds:.0f} s"
    )
    console.print(f"[dim]next: regraft promote {federation.address} --to production[/]")
