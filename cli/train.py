"""`regraft train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import Json, console, measured, print_json, show, size

if TYPE_CHECKING:
    from flows.evaluate_adapter import SuiteResult
    from flows.train_adapter import TrainedVersion
    from training.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe (YAML), or NAME@VERSION to train by a stored one again.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training.steps=10.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore the checkpoint of an interrupted run.")] = False,
    evaluate: Annotated[bool, typer.Option(help="Measure the new version on the recipe's suites.")] = True,
    kit: Annotated[
        bool, typer.Option(help="Keep a migration kit, so that it can move to another base without its data.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Train an adapter by a recipe and register it as the adapter's next version.

    Ctrl-C stops after the current step and keeps a checkpoint: the same command goes on from there.

    Examples:
      [bold]regraft train recipes/counting.yaml[/]
      [bold]regraft train recipes/counting.yaml --set method.rank=16 --set training.steps=200[/]
      [bold]regraft train recipes/counting.yaml --no-kit[/]  (nothing of the data is kept)
      [bold]regraft train counting@3[/]  (the stored recipe again: the same tensors, bit for bit)
    """
    chosen = chosen_recipe(recipe, overrides(set_ or []) | ({} if kit else {"migration_kit": False}))

    from cli.session import connect_flows, live_progress
    from registry.addresses import adapter_name

    adapter_name(chosen.adapter)  # before a server is asked for
    connect_flows()
    from flows.train_adapter import train_adapter

    with live_progress():
        trained = train_adapter(chosen, fresh=fresh, evaluate=evaluate)
    if as_json:
        print_json(trained)
        return
    _tell(trained)


def chosen_recipe(place: Path, changes: dict[str, Any]) -> "Recipe":
    """The recipe in a file, or that of a version; with changes by dotted key."""
    if "@" in place.name and not place.exists():
        from flows.train_adapter import stored_recipe

        return stored_recipe(str(place), changes)
    from training.recipe import load_recipe

    return load_recipe(place, changes)


def _tell(trained: "TrainedVersion") -> None:
    console.print(
        f"[bold green]✓[/] [bold]{trained.address}[/]  {trained.method} on {trained.base}, {trained.steps} steps, "
        f"final loss {trained.final_loss:.3f}, {trained.seconds:.0f} s"
    )
    console.print(
        f"  [dim]{trained.trainable_parameters:,} parameters ({trained.trainable_share:.2%}), "
        f"{size(trained.size_bytes)}, sha256 {trained.artifact_sha256[:12]}…[/]"
    )
    if trained.migration_kit is not None:
        accuracy = trained.migration_kit["discriminator"]
        told = "no discriminator" if accuracy is None else f"discriminator {accuracy:.0%} balanced accuracy"
        console.print(f"  [dim]migration kit: {trained.migration_kit['seeds']} seeds, {told}[/]")
    tell_results(trained.evaluations)
    console.print(f"[dim]next: regraft promote {trained.address} --to production[/]")


def tell_results(results: "list[SuiteResult]") -> None:
    """A table of suite results."""
    if results:
        rows = [
            (r.suite, r.metric, measured(r.metric, r.value, r.low, r.high), str(r.samples))
            for result in results
            for r in (result, *result.beside)
        ]
        show(("~suite", "metric", ">value", ">samples"), rows, "")


def overrides(pairs: list[str]) -> dict[str, Any]:
    """What `--set KEY=VALUE` sets, by dotted key; values are YAML."""
    import yaml

    from infra.errors import InvalidInput

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InvalidInput(f"--set {pair}: a key, '=' and a value are wanted.", "E.g. --set training.steps=10")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InvalidInput(f"--set {pair}: the value is not valid YAML.") from None
    return found
