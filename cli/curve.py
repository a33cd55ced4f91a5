"""`regraft curve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.console import Json, console, measured, print_json, show

if TYPE_CHECKING:
    from flows.curves import Curve, LearningCurves


def curve(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE", help="One for each task, or NAME@VERSION.")],
    budgets: Annotated[
        str, typer.Option(help="Training examples of each task: numbers, shares and all.")
    ] = "10,1%,100,200,1000,all",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings on each budget, each on examples of its own.")] = 3,
    joint: Annotated[
        bool, typer.Option("--joint", help="Also train one adapter for all the tasks, on the same budget of each.")
    ] = False,
    base: Annotated[list[str] | None, typer.Option(help="Base model(s) to start from, not the recipes' own.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Of every training, for each task. Default: those of the recipe on all of its data."),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(min=0.01, help="Passes over the budget, in place of a fixed number of steps.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="NUMBER|NAME@V", help="What is to be reached. Default: the score of the largest budget."),
    ] = None,
    max_loss: Annotated[
        float, typer.Option(min=0, max=1, help="How much less than that default is enough: 0.05 is five points.")
    ] = 0.05,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of every recipe.")
    ] = None,
    as_json: Json = False,
) -> None:
    """How many labelled examples are enough? Train on growing, nested parts of a recipe's data and draw the curve.

    Nothing is registered; only numbers are kept. Ctrl-C keeps what is measured: the same command goes on, and more
    budgets, seeds or bases train only what is new.

    Examples:
      [bold]regraft curve recipes/counting.yaml[/]
      [bold]regraft curve recipes/counting.yaml --reference 0.7 --base smollm2-135m-instruct --base gemma3-270m[/]
      [bold]regraft curve recipes/counting.yaml logic.yaml --joint --set method=lora --budgets 10,50,all[/]
    """
    from cli.session import connect_flows, live_progress, resumable
    from cli.train import chosen_recipe, overrides
    from flows.curve_plan import plan_curves

    changes = overrides(set_ or [])
    chosen = tuple(chosen_recipe(place, changes) for place in recipes)
    bases = tuple(base or ())
    plan_curves(chosen, budgets, seeds, joint, bases, steps, epochs, reference, max_loss)
    connect_flows()  # what needs no server has come first
    from flows.learning_curve import learning_curve

    with live_progress(), resumable("The study"):
        found = learning_curve(
            chosen,
            budgets,
            seeds,
            joint,
            bases=bases,
            steps=steps,
            epochs=epochs,
            reference=reference,
            allowed_loss=max_loss,
        )
    print_json(found) if as_json else _tell(found)


def _tell(found: "LearningCurves") -> None:
    for each in found.curves:
        arm = "" if len({c.arm for c in found.curves}) == 1 else f", {each.arm}"
        console.print(f"[bold]{escape(each.task)}[/] on {each.base}{arm}  [dim]{each.metric}, {each.samples} items[/]")
        rows = [
            (
                f"[bold green]{p.budget}[/]" if p == each.enough else p.budget,
                f"{p.examples:,.0f}",
                measured(each.metric, p.value, p.low, p.high),
                "  ".join(measured(each.metric, value) for value in p.seeds),
            )
            for p in each.points
        ]
        show(
            (">budget", ">examples", ">score", "~seeds"),
            [*rows, ("bare", "0", measured(each.metric, each.bare), "")],
            "",
        )
        console.print(f"{statement(each)}  [dim]area {measured(each.metric, each.area)}[/]\n")
    for note in found.notes:
        console.print(f"[dim]{escape(note)}[/]")
    console.print(
        f"[dim]reference: {escape(found.reference)}; {found.trained} of {found.trainings} trainings were new[/]"
    )
    console.print(f"table and picture: {found.folder}", soft_wrap=True)


def statement(each: "Curve") -> str:
    """What a curve says about the number of examples, in a sentence."""
    reference, bare = measured(each.metric, each.reference), measured(each.metric, each.bare)
    if each.verdict == "nothing learnt":
        last = each.points[-1]
        return (
            f"[bold red]✗[/] nothing was learnt: {last.examples:,.0f} examples lead to "
            f"{measured(each.metric, last.value)}, and the bare base has {bare}. Train longer, or otherwise, first"
        )
    if each.verdict == "bare":
        return f"[bold green]✓[/] zero examples are enough: the bare base has {bare} and reaches {reference}"
    if each.enough is not None:
        whole = each.points[-1].examples
        share = f" ({each.enough.examples / whole:.0%} of the largest budget)" if each.enough.examples < whole else ""
        return f"[bold green]✓[/] {each.enough.examples:,.0f} examples{share} are enough to reach {reference}"
    best = (
        max(each.points, key=lambda p: p.low) if each.metric != "perplexity" else min(each.points, key=lambda p: p.high)
    )
    bound = measured(each.metric, best.low if each.metric != "perplexity" else best.high)
    return f"[bold red]✗[/] no budget surely reaches {reference}: the best bound is {bound}, at {best.budget}"
