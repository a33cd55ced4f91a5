"""`regraft tasks`: the built-in task generators."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.markup import escape

from cli.console import Json, console, print_json, show

app = typer.Typer(help="Built-in tasks: generated data with known answers, disjoint splits.", no_args_is_help=True)


class Split(StrEnum):
    """The parts that a task's items fall into."""

    train = "train"
    validation = "validation"
    test = "test"


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Every built-in task with its metric.

    Use one in a recipe with [bold]data: {task: NAME}[/].
    """
    from training.tasks.catalog import CATALOG, get_task

    tasks = [get_task(name) for name in sorted(CATALOG)]
    if as_json:
        print_json([{"name": task.name, "metric": task.metric, "description": task.description} for task in tasks])
        return
    rows = [(f"[bold]{task.name}[/]", task.metric, task.description) for task in tasks]
    show(("name", "metric", "~what is asked"), rows, "No tasks.")


@app.command("sample")
def sample(
    name: str,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many examples.")] = 3,
    split: Annotated[Split, typer.Option(help="Which part of the task's items.")] = Split.train,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Print some examples of a task.

    Example: [bold]regraft tasks sample object_counting -n 5 --split test --json[/]
    """
    from training.tasks.catalog import get_task

    examples = get_task(name).generate(split.value, count, seed)
    if as_json:
        print_json([{"prompt": e.prompt, "completion": e.completion, "choices": e.choices} for e in examples])
        return
    for example in examples:
        console.print(escape(example.prompt), soft_wrap=True)
        console.print(f"[green]→ {escape(example.completion)}[/]\n", soft_wrap=True)
