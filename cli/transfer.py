"""`regraft export` and `regraft import`: adapters in and out, in the PEFT layout."""

from pathlib import Path
from typing import Annotated

import typer

from cli.console import Json, console, print_json
from infra.errors import InvalidInput, NotMergeable


def export(
    address: Annotated[str, typer.Argument(help="NAME@VERSION or NAME@ALIAS.")],
    directory: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    as_lora: Annotated[
        bool, typer.Option("--as-lora", help="As a plain LoRA, for tools that do not know the method; loads the base.")
    ] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="Folded into its base: a plain model, for tools that know no adapters.")
    ] = False,
) -> None:
    """Write a version as a PEFT folder, which peft, vLLM and others load as it is. Every byte is checked on the way.

    Examples:
      [bold]regraft export counting@production ./counting[/]
      [bold]regraft export counting@7 ./counting --as-lora[/]  (whatever is of low rank: paca, vera, hydra, …)
      [bold]regraft export counting@7 ./counting-model --merged[/]
    """
    from registry import AdapterRegistry

    if as_lora and merged:
        raise InvalidInput("--as-lora and --merged are two different things to write.", "Give one of them.")
    if as_lora or merged:
        from serving.loading import load
        from training.merged_model import write_merged_model
        from training.methods.plain_lora import write_plain_lora

        loaded = load(address)
        try:
            if merged:
                write_merged_model(loaded.adapted, loaded.tokenizer, directory)
            else:
                write_plain_lora(loaded.adapted, directory)
        except (InvalidInput, NotMergeable) as error:  # which know the adapter by its name on the model
            here = f"{loaded.version.address} ({loaded.version.method})"
            raise type(error)(error.what.replace(f"Adapter '{loaded.adapted.name}'", here), error.remedy) from None
    else:
        AdapterRegistry().export(address, directory)
    console.print(f"[bold]{address}[/] is in {directory}")


def import_(
    directory: Annotated[Path, typer.Argument(help="A folder with adapter_config.json, adapter_model.safetensors.")],
    name: Annotated[str, typer.Argument(help="The adapter that it becomes a version of.")],
    base: Annotated[str, typer.Option(help="The base model it was trained on: a registered name or a reference.")],
    task: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    as_json: Json = False,
) -> None:
    """Register an adapter that was trained elsewhere. The files are distrusted until checked; pickles are refused.

    Example: [bold]regraft import ./counting counting --base smollm2-135m-instruct[/]
    """
    from flows.import_adapter import import_adapter

    version = import_adapter(directory, name, base, task)
    if as_json:
        print_json(version)
        return
    console.print(f"[bold green]✓[/] [bold]{version.address}[/]  {version.method} on {version.base.name}")
