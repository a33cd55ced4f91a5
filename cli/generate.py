"""`regraft generate`."""

import sys
from typing import Annotated

import typer
from rich.markup import escape

from cli.console import Json, console, errors, print_json


def generate(
    address: Annotated[str, typer.Argument(help="NAME@VERSION, NAME@ALIAS, or NAME (its production version).")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or more prompts; none: one a line from stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    as_json: Json = False,
) -> None:
    """Load a version afresh, checked, and answer prompts (greedy).

    Example: [bold]regraft generate counting@production "I have two pears and a drum. How many things do I have?"[/]
    """
    from infra.errors import InvalidInput
    from serving.loading import load

    asked = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not asked:
        raise InvalidInput("There is no prompt.", f'E.g. regraft generate {address} "How many …?"')
    with errors.status(f"loading {escape(address)}"):
        model = load(address)
    answers = model.generate(asked, max_new_tokens=max_new_tokens)
    if as_json:
        print_json(
            [{"prompt": p, "answer": a, "version": model.version.address} for p, a in zip(asked, answers, strict=True)]
        )
        return
    for prompt, answer in zip(asked, answers, strict=True):
        if len(asked) > 1:
            console.print(f"[dim]{escape(prompt)}[/]", soft_wrap=True)
        console.print(escape(answer), soft_wrap=True)
