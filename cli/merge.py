"""`regraft merge`."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.console import Json, console, measured, print_json, show, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flows.merge_adapters import Merging


def merge(
    addresses: Annotated[list[str], typer.Argument(metavar="NAME@V NAME@V…", help="Two versions or more of one base.")],
    name: Annotated[
        str | None,
        typer.Option("--as", help="The adapter that it becomes a version of. Default: theirs, if it is one."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="linear, sum, ties, dare, slerp, ema or factors: regraft methods merging tells more.")
    ] = "linear",
    weight: Annotated[
        list[float] | None, typer.Option(help="One for each version, in their order; a negative one takes it away.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of LoRAs: cut the result to this rank; what that loses is told.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the method, e.g. density=0.3, t=0.25.")
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Greedy soup: keep only the versions that help, by validation items.")
    ] = False,
    task: Annotated[list[str] | None, typer.Option(help="Built-in task(s) to measure on, not the recipes'.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Items of each of those tasks.")] = None,
    evaluate: Annotated[bool, typer.Option(help="Measure the result and what it is made of.")] = True,
    promote: Annotated[
        str | None, typer.Option(metavar="ALIAS", help="Move this alias, if the policy allows the new version.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make one adapter of several of the same base model, without any training.

    A LoRA's updates are added exactly, as one LoRA of the ranks' sum; --rank cuts it down again. What stands on another
    base model has to migrate first.

    Examples:
      [bold]regraft merge counting@3 counting@5 counting@6 --greedy[/]
      [bold]regraft merge counting@3 logic@2 --as both --weight 0.6 --weight 0.4 --rank 16[/]
      [bold]regraft merge counting@3 logic@2 --as both --method ties --set density=0.3[/]
      [bold]regraft merge chatty@4 rude@1 --as polite --weight 1 --weight -0.5[/]  (forget what rude@1 learnt)
    """
    from cli.session import connect_flows, live_progress, whole
    from cli.train import overrides
    from infra.errors import InvalidInput

    if samples and not task:
        raise InvalidInput("--samples says how many items of a --task.", "Name the task, too.")
    options = overrides(set_ or [])
    if weight:
        options["weights"] = weight
    if rank is not None:
        options["rank"] = rank
    joined = name or _common_name(addresses)
    with whole("The merge", "nothing was registered"):
        from flows.merge_adapters import merge_adapters, plan_merge
        from flows.suites import suites_for

        suites = suites_for(task, 0, samples)
        versions, _ = plan_merge(addresses, joined, method, options, greedy, suites, evaluate, promote)
        connect_flows()  # what needs no server has come first
        with live_progress():
            merging = merge_adapters(
                tuple(version.address for version in versions),
                joined,
                method,
                options,
                greedy=greedy,
                suites=suites,
                evaluate=evaluate,
                promote_to=promote,
            )
    if as_json:
        print_json(merging)
    else:
        _tell(merging)
    if merging.promotion and not merging.promotion.moved:
        raise typer.Exit(7)


def _common_name(addresses: list[str]) -> str:
    from infra.errors import InvalidInput

    names = {address.partition("@")[0] for address in addresses}
    if len(names) > 1:
        raise InvalidInput(
            f"The versions are of several adapters ({', '.join(sorted(names))}).",
            "Say what the result is called: --as NAME",
        )
    return names.pop()


def _tell(merging: "Merging") -> None:
    lost = f", {merging.deviation:.1%} off the exact one" if merging.deviation > 1e-6 else ""
    console.print(
        f"[bold green]✓[/] [bold]{merging.address}[/]  {merging.method} on {merging.base}, {merging.merged_by} of "
        f"{' + '.join(merging.of)}{lost}; {merging.parameters:,} parameters, {size(merging.size_bytes)}"
    )
    if merging.tasted:
        rows = [
            ("[green]✓[/]" if each.taken else "[red]✗[/]", escape(" + ".join(each.ingredients)), f"{each.score:.3f}")
            for each in merging.tasted
        ]
        show(("", "~soup of", ">on validation"), rows, "")
    if merging.measured:
        show(("version", *(f">{each.suite}" for each in merging.measured)), list(_numbers(merging)), "")
    if merging.promotion is not None:
        from cli.promote import tell_verdict

        tell_verdict(merging.promotion)
    else:
        console.print(f"[dim]next: regraft promote {merging.address} --to production[/]")


def _numbers(merging: "Merging") -> "Iterator[tuple[str, ...]]":
    """A row for each version that it is made of, then its own."""
    for place, address in enumerate(merging.of):
        numbers = ((each.metric, each.parents[place]) for each in merging.measured)
        yield address, *(measured(metric, n.value, n.low, n.high) for metric, n in numbers)
    own = ((each.metric, each.child) for each in merging.measured)
    yield f"[bold]{merging.address}[/]", *(measured(metric, n.value, n.low, n.high) for metric, n in own)
