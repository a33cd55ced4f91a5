"""`regraft kit`: what a version's migration to another base model will need."""

from typing import Annotated

import typer
from rich.markup import escape

from cli.console import Json, console, facts, print_json, show, size

app = typer.Typer(
    help="Migration kits: what is kept of a version's data, so that it can move to another base model without them.",
    no_args_is_help=True,
)


@app.command("build")
def build(
    address: Annotated[str, typer.Argument(help="NAME@VERSION or NAME@ALIAS, trained here, its data still at hand.")],
    seeds: Annotated[int | None, typer.Option(min=1, help="Examples that are kept for ever; 5 unless told.")] = None,
    redact: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="From text to text; what is kept goes through it.")
    ] = None,
    discriminator: Annotated[
        bool | None,
        typer.Option(
            "--discriminator/--no-discriminator",
            help="Train a small adapter that tells real inputs from written ones; yes unless told.",
        ),
    ] = None,
    inputs: Annotated[
        int | None, typer.Option(min=2, help="Most real, and most written, inputs that it is shown; 250 unless told.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task's name in words. Default: the recipe's.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Although the version has a kit.")] = False,
    as_json: Json = False,
) -> None:
    """Choose seed examples and train a discriminator, and keep both with the version.

    Seeds are rows of the data, word for word: look at them (regraft kit show), or give --redact. The discriminator was
    trained on the data and may tell something of them, as the adapter itself may. What is not said here is as the
    version's recipe says under migration_kit.

    Examples:
      [bold]regraft kit build counting@3[/]
      [bold]regraft kit build counting@3 --redact mycompany.privacy:scrub --seeds 10[/]
    """
    from cli.session import connect_flows, live_progress, resumable
    from registry import AdapterRegistry

    AdapterRegistry().get(address)  # before anything heavy is imported
    from flows.migration_kit import build_migration_kit, buildable
    from training.migration.kit import redaction
    from training.migration.options import KitOptions

    registry = AdapterRegistry()
    recipe = buildable(registry.get(address), registry, again)
    said = {"seeds": seeds, "redact": redact, "inputs": inputs, "filtered": discriminator}
    options = (recipe.migration_kit or KitOptions()).model_copy(
        update={option: value for option, value in said.items() if value is not None}
    )
    redaction(options.redact)
    connect_flows()  # what needs no server has come first
    with live_progress(), resumable("The kit"):
        record = build_migration_kit(address, options, task, again)
    if as_json:
        print_json(record)
        return
    told = record.details
    console.print(f"[bold green]✓[/] migration kit of [bold]{record.address}[/]  {size(record.size_bytes)}")
    judged = "none" if told["discriminator"] is None else _accuracy(told["discriminator"], told["judged_on"])
    facts((("seeds", str(told["seeds"])), ("of rows", f"{told['rows']:,}"), ("discriminator", judged)))


@app.command("show")
def show_(address: Annotated[str, typer.Argument(help="NAME@VERSION or NAME@ALIAS.")], as_json: Json = False) -> None:
    """What a version's kit holds; its seeds word for word."""
    from infra.errors import NotFound
    from registry import AdapterRegistry

    version = AdapterRegistry().get(address)
    from flows.migration_kit import kit_of

    found = kit_of(version.address)
    if found is None:
        raise NotFound(f"{version.address} has no migration kit.", f"Build one: regraft kit build {version.address}")
    record, kit, _ = found
    if as_json:
        print_json({"attachment": record, "kit": kit})
        return
    judged = kit.discriminator
    facts(
        (
            ("kit of", f"[bold]{record.address}[/]  on {version.base.name}"),
            ("kept", f"{record.created_at:%Y-%m-%d %H:%M} UTC, {size(record.size_bytes)}"),
            ("task", escape(kit.task)),
            ("rows there were", f"{kit.rows:,}"),
            ("discriminator", "none" if judged is None else _accuracy(judged.balanced_accuracy, judged.samples)),
            ("sha256", record.artifact_sha256),
        )
    )
    console.print()
    rows = [(escape(seed.prompt), escape(seed.completion)) for seed in kit.seeds]
    show(("~seed", "~answer"), rows, "No seeds.")


def _accuracy(balanced: float, samples: int) -> str:
    from training.migration.discriminator import better_than_chance

    told = f"{balanced:.1%} balanced accuracy on {samples} held-out inputs of each kind (chance is 50 %)"
    if better_than_chance(balanced, samples):
        return told
    return f"{told}; [yellow]no better than chance, so a migration does not choose by it[/]"
