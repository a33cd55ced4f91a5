"""`regraft compress`."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.console import Json, console, measured, print_json, show, size

if TYPE_CHECKING:
    from flows.compress_adapter import Compression


def compress(
    address: Annotated[str, typer.Argument(help="NAME@VERSION or NAME@ALIAS.")],
    codec: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STEPS",
            help="A form to try; may be given more than once. compeft:density=0.1, groups:bits=4, codebook:bits=1, or "
            "a LoRA cut first: low_rank:rank=4+groups:bits=8. Default: a dozen, from 2 to 50 times smaller.",
        ),
    ] = None,
    max_loss: Annotated[
        float, typer.Option(min=0, max=1, help="Accuracy that may be lost: 0.01 is one point. Of perplexity, a share.")
    ] = 0.01,
    samples: Annotated[int, typer.Option(min=1, help="Validation items by which the form is chosen.")] = 200,
    task: Annotated[list[str] | None, typer.Option(help="Built-in task(s) to measure on, not the recipe's.")] = None,
    name: Annotated[str | None, typer.Option("--as", help="The adapter that it joins. Default: its own.")] = None,
    promote: Annotated[
        str | None, typer.Option(metavar="ALIAS", help="Move this alias, if the result passes and policy allows.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Store a version in as few bytes as its accuracy allows; the result is a version like any other.

    Every form is tried on validation items, the smallest within --max-loss is registered and measured on the version's
    own suites. Loading, serving and migrating it need nothing else. Ctrl-C keeps what is measured. Exit code 7: no form
    within the allowed loss is smaller than the version is, or the one that was chosen is not within it on the suites.

    Examples:
      [bold]regraft compress counting@production[/]
      [bold]regraft compress counting@3 --codec compeft:density=0.05 --codec codebook:bits=1 --max-loss 0.02[/]
      [bold]regraft compress counting@3 --codec low_rank:energy=0.95+groups:bits=4 --promote production[/]
    """
    from cli.session import connect_flows, live_progress, resumable

    with resumable("The compression"):
        from flows.compress_adapter import compress_adapter, plan_compression
        from flows.suites import suites_for

        walk, suites = tuple(codec or ()), suites_for(task, 0, None)
        plan = plan_compression(address, walk, max_loss, suites, name, promote)
        connect_flows()  # what needs no server has come first
        with live_progress():
            compression = compress_adapter(
                plan.source.address,
                walk,
                allowed_loss=max_loss,
                suites=suites,
                samples=samples,
                name=name,
                promote_to=promote,
            )
    if as_json:
        print_json(compression)
    else:
        _tell(compression)
    if not compression.passed or (compression.promotion and not compression.promotion.moved):
        raise typer.Exit(7)


def _tell(compression: "Compression") -> None:
    rows = [
        (
            ("[green]✓[/]" if form.size_bytes < compression.source_bytes else "–") if form.passed else "[red]✗[/]",
            f"[bold]{escape(form.steps)}[/]" if form.on_front else escape(form.steps),
            size(form.size_bytes),
            f"{compression.source_bytes / form.size_bytes:.1f} ×",
            *(f"{value:.3f}" for value in form.values),
        )
        for form in compression.forms
    ]
    before = ("", "as it is", size(compression.source_bytes), "", *(f"{value:.3f}" for value in compression.before))
    show(("", "~form", ">tensors", ">smaller", *(f">{suite}" for suite in compression.suites)), [*rows, before], "")
    console.print(
        f"[dim]smaller: than as it is (its numbers in bfloat16: {size(compression.dense_bytes)}); "
        "bold: nothing smaller is better[/]"
    )
    if compression.address is None:
        if any(form.passed for form in compression.forms):
            console.print(
                f"[bold]nothing to gain[/]: no form within the allowed loss is smaller than {compression.source} is; "
                "nothing was registered."
            )
        else:
            console.print("[bold red]no form[/] is within the allowed loss; nothing was registered.")
        return
    console.print(
        f"[bold green]✓[/] [bold]{compression.address}[/]  {escape(compression.steps or '')} of "
        f"[bold]{compression.source}[/], {size(compression.size_bytes or 0)} of tensors instead of "
        f"{size(compression.source_bytes)}"
    )
    numbers = [
        (
            each.suite,
            *(measured(each.metric, n.value, n.low, n.high) for n in (*each.parents, each.child)),
            str(each.samples),
        )
        for each in compression.measured
    ]
    show(("~suite", f">{compression.source}", f">{compression.address}", ">samples"), numbers, "")
    if not compression.passed:
        console.print("[bold red]not within the allowed loss[/] on the suites; registered all the same.")
    elif compression.promotion is not None:
        from cli.promote import tell_verdict

        tell_verdict(compression.promotion)
    else:
        console.print(f"[dim]next: regraft promote {compression.address} --to production[/]")
