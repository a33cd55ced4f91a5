"""`regraft demo`: one real adapter through its whole life, told in nine lines."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cli.console import console, percent, show, size
from cli.session import connect_flows, live_progress

if TYPE_CHECKING:
    from flows.evaluate_adapter import SuiteResult
    from flows.promote_adapter import Promotion
    from flows.train_adapter import TrainedVersion
    from training.recipe import Recipe

_POLICY = {
    "suites": [{"suite": "object_counting/test", "minimum": 0.60, "minimum_samples": 200, "max_regression": 0.01}]
}
_SHOTS = {0: "zero-shot", 3: "3-shot"}
_HASTY_STEPS = 3
_NEEDED_POINTS = 15.0


def demo(
    migrate: Annotated[
        bool, typer.Option("--migrate", help="Instead: move an adapter to Gemma without its data (16 minutes).")
    ] = False,
) -> None:
    """Train, judge, register, promote and use one real adapter (SmolLM2-135M, CPU, under 8 minutes on 2 cores).

    It learns to count objects, which the bare model cannot, and a bad version is refused at the gate. Run it again and
    there is one more version of the same adapter.
    """
    if migrate:
        from cli.demo_migration import demo_migration

        demo_migration()
        return
    began = time.monotonic()
    console.print("[bold]Regraft[/]  one adapter, from data to production\n")
    connect_flows()
    from training.recipe import load_recipe

    recipe = load_recipe(demo_recipe(), {"migration_kit": False})  # which would take as long as all the rest
    with live_progress():
        _meet_base_and_data(recipe)
        bare = _measure_bare_model(recipe)
        trained = _train(recipe)
        points = _compare(trained.evaluations[0], bare)
        promotion = _promote(trained)
        if promotion.moved:
            _use(recipe)
        bad, refused = _try_a_bad_one(recipe)
    _sum_up(bare, [(trained, promotion), (bad, refused)])
    _point_at_the_services()
    console.print(f"[dim]{minutes(time.monotonic() - began)}   next: regraft adapters show {recipe.adapter}[/]")
    if points < _NEEDED_POINTS or not promotion.moved or refused.moved:
        raise typer.Exit(1)


def demo_recipe() -> Path:
    """recipes/counting.yaml of the repository, or the copy that an installed wheel carries."""
    packaged = Path(__file__).parent / "recipes" / "counting.yaml"
    return packaged if packaged.is_file() else Path(__file__).parent.parent / "recipes" / "counting.yaml"


def _meet_base_and_data(recipe: "Recipe") -> None:
    from flows.base_models import find_base
    from flows.select_data import select_data

    base, _ = find_base(recipe.base)
    line(1, "base model", f"{base.name}  ({base.parameters / 1e6:.1f} M)  identity {base.identity_sha256[:12]}…")
    selected = select_data(recipe)
    sizes = recipe.data.sizes
    line(
        2,
        "data",
        f"{recipe.data.name}  {sizes.train:,} train / {sizes.validation} validation / {sizes.test} test, disjoint",
    )
    line(
        None,
        "",
        f"{len(selected.train)} selected to train on",
    )


def _measure_bare_model(recipe: "Recipe") -> "list[SuiteResult]":
    from flows.evaluate_adapter import evaluate_base
    from training.evaluation.suite import Suite

    suites = tuple(Suite(task=recipe.data.task, samples=recipe.evaluation[0].samples, shots=shots) for shots in _SHOTS)
    results = evaluate_base(recipe.base, suites)
    line(3, "before", "   ".join(f"{name} {_shown(r)}" for name, r in zip(_SHOTS.values(), results, strict=True)))
    return results


def _train(recipe: "Recipe") -> "TrainedVersion":
    from flows.train_adapter import train_adapter

    trained = train_adapter(recipe)
    line(
        4,
        "train",
        f"{trained.method} r={recipe.method.options['rank']}, {trained.trainable_share:.2%} of parameters, "
        f"{trained.steps} steps, loss {trained.final_loss:.2f}, {minutes(trained.seconds)}",
    )
    return trained


def _compare(after: "SuiteResult", bare: "list[SuiteResult]") -> float:
    """Says by how many points the adapted model beats the better of the bare ones, on the same items."""
    from training.evaluation.statistics import paired_test

    best = max(bare, key=lambda result: result.value)
    points = 100 * (after.value - best.value)
    assert after.outcomes is not None and best.outcomes is not None, "exact match has outcomes"
    assert after.dataset_fingerprint == best.dataset_fingerprint, "both were shown the same items"
    p = paired_test(after.outcomes, best.outcomes).p_value
    significance = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    line(5, "after", f"{_shown(after)}   [bold]{points:+.1f} points[/] over the better   {significance}")
    return points


def _promote(trained: "TrainedVersion") -> "Promotion":
    from flows.promote_adapter import promote_adapter
    from registry.policy import Policy

    run = f"MLflow run {(trained.mlflow_run_id or '–')[:8]}…"
    line(
        6,
        "register",
        f"[bold]{trained.address}[/]  {size(trained.size_bytes)}  sha256 {trained.artifact_sha256[:12]}…  {run}",
    )
    promotion = promote_adapter(trained.address, policy=Policy.model_validate(_POLICY))
    line(7, "gate", _verdict(promotion))
    return promotion


def _use(recipe: "Recipe") -> None:
    """Loads the alias afresh and asks it three test questions that no evaluation has drawn."""
    from serving.loading import load
    from training.tasks.catalog import get_task

    assert recipe.data.task is not None
    model = load(f"{recipe.adapter}@production")
    items = get_task(recipe.data.task).generate("test", 3, seed=2026)
    answers = model.generate([item.prompt for item in items], max_new_tokens=8)
    for place, (item, answer) in enumerate(zip(items, answers, strict=True)):
        correction = "" if answer == item.completion else f"  [dim](right: {item.completion})[/]"
        said = f"“{escape(item.prompt)}” → [bold]{escape(answer)}[/]{correction}"
        line(8 if place == 0 else None, "use" if place == 0 else "", said)


def _try_a_bad_one(recipe: "Recipe") -> "tuple[TrainedVersion, Promotion]":
    from flows.promote_adapter import promote_adapter
    from flows.train_adapter import train_adapter
    from registry.policy import Policy

    training = recipe.training.model_copy(update={"steps": _HASTY_STEPS})
    bad = train_adapter(recipe.model_copy(update={"training": training}))
    refused = promote_adapter(bad.address, policy=Policy.model_validate(_POLICY))
    line(9, "a bad one", f"{bad.address} (trained {_HASTY_STEPS} steps) → {_verdict(refused)}")
    return bad, refused


def _sum_up(bare: "list[SuiteResult]", versions: "list[tuple[TrainedVersion, Promotion]]") -> None:
    rows = [(f"bare, {name}", _shown(result), "") for name, result in zip(_SHOTS.values(), bare, strict=True)]
    rows += [
        (version.address, _shown(version.evaluations[0]), "in production" if promotion.moved else "refused")
        for version, promotion in versions
    ]
    console.print()
    show(("model", "accuracy", ""), rows, "")


def _point_at_the_services() -> None:
    from infra.services import LocalServices
    from infra.settings import get_settings

    addresses = {service.name: service.url for service in LocalServices(get_settings()).up()}
    console.print(f"\nMLflow  {addresses['mlflow']}   Prefect  {addresses['prefect']}")


def _verdict(promotion: "Promotion") -> str:
    checks = "   ".join(
        f"{check.required} {'[green]✓[/]' if check.passed else '[red]✗[/]'} ({check.measured})"
        for check in promotion.checks
    )
    outcome = "[bold green]promoted[/]" if promotion.moved else "[bold red]refused[/]"
    return f"{promotion.alias}: {checks} → {outcome}"


def _shown(result: "SuiteResult") -> str:
    return percent(result.value, result.low, result.high)


def line(number: int | None, title: str, text: str) -> None:
    """Print a line of the story."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=2, justify="right", style="dim")
    grid.add_column(width=11, style="bold")
    grid.add_column()
    grid.add_row(str(number or ""), title, text)
    console.print(grid)


def minutes(seconds: float) -> str:
    """M:SS."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
