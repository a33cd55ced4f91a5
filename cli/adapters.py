"""`regraft adapters`: what the registry holds."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cli.console import Json, ago, console, facts, measured, print_json, show, size

if TYPE_CHECKING:
    from registry import AdapterRegistry
    from registry.records import EvaluationRecord, VersionRecord

app = typer.Typer(help="Adapters, their versions, and who decided what.", no_args_is_help=True)


@app.command("list")
def list_(
    text: Annotated[str | None, typer.Option("--search", help="Part of a name, task or description.")] = None,
    task: Annotated[str | None, typer.Option(help="Only adapters for this task.")] = None,
    base: Annotated[str | None, typer.Option(help="Only adapters whose newest version is on this base model.")] = None,
    as_json: Json = False,
) -> None:
    """Every adapter, one line each.

    Example: [bold]regraft adapters list --base smollm2-135m[/]
    """
    from registry import AdapterRegistry

    everything = AdapterRegistry().adapters()
    found = [
        a
        for a in everything
        if (not text or text.lower() in f"{a.name} {a.task} {a.description}".lower())
        and (not task or a.task == task)
        and (not base or a.base == base)
    ]
    if as_json:
        print_json(found)
        return
    rows = [
        (
            f"[bold]{a.name}[/]",
            escape(a.task or "–"),
            str(a.versions),
            a.base,
            a.method,
            size(a.size_bytes),
            "\n".join(f"{alias} @{number}" for alias, number in a.aliases.items()) or "–",
            ago(a.updated_at),
        )
        for a in found
    ]
    nothing = "None of them fits." if everything else "No adapters. Train one: regraft train recipes/counting.yaml"
    columns = ("adapter", "+~task", ">versions", "base", "method", "+>size", "aliases", "updated")
    show(columns, rows, nothing)


@app.command("show")
def show_(
    name: Annotated[str, typer.Argument(help="An adapter, or one version of it: NAME@VERSION.")], as_json: Json = False
) -> None:
    """An adapter's versions, newest first: base, method, size, where they come from, measured numbers, aliases."""
    from registry import AdapterRegistry

    registry = AdapterRegistry()
    versions = [registry.get(name)] if "@" in name else registry.versions(name)
    evaluations = {v.address: registry.evaluations(v.address) for v in versions}
    if as_json:
        print_json(
            [
                {"version": v, "evaluations": evaluations[v.address], "attachments": registry.attachments(v.address)}
                for v in versions
            ]
        )
        return
    if not versions:
        console.print(f"[dim]{name} has no version yet.[/]")
        return
    newest = versions[0]
    console.print(f"[bold]{newest.adapter}[/]  [dim]{escape(newest.description or newest.task or '')}[/]\n")
    if "@" in name:
        _tell_version(registry, newest)
    else:
        _tell_versions(registry, versions)
    if numbers := [row for v in versions for row in _measured(v, evaluations[v.address])]:
        console.print()
        show(("", "~measured on", ">", "interval", ">samples"), numbers, "")


@app.command("history")
def history(name: str, as_json: Json = False) -> None:
    """The audit log: every promotion, refusal, forced move and rollback, with numbers and reasons."""
    from registry import AdapterRegistry

    log = AdapterRegistry().history(name)
    if as_json:
        print_json(log)
        return
    colours = {"promoted": "green", "refused": "red"}
    rows = [
        (
            p.at.strftime("%Y-%m-%d %H:%M"),
            p.alias,
            f"[{colours.get(p.decision, 'yellow')}]{p.decision}[/]",
            f"{_number(p.from_address)} → {_number(p.to_address)}",
            escape(p.actor),
            escape(p.reason or _failed_checks(p.report) or "–"),
        )
        for p in log
    ]
    columns = ("when (UTC)", "alias", "decision", "move", "~who", "~why")
    show(columns, rows, f"Nothing was decided about {name} yet.")


def _failed_checks(report: "Mapping[str, Any]") -> str:
    """What a verdict asked for and did not get, with the numbers."""
    failed = [check for check in report.get("checks", ()) if not check["passed"]]
    return "; ".join(f"{check['name']} {check['required']}: {check['measured']}" for check in failed)


def _tell_versions(registry: "AdapterRegistry", versions: "list[VersionRecord]") -> None:
    rows = [
        (
            f"[bold]@{v.number}[/]" + ("" if v.state == "ready" else f" [red]{v.state}[/]"),
            v.base.name,
            v.method,
            f"{v.trainable_parameters:,}",
            size(v.size_bytes),
            _origin(registry, v),
            "\n".join(v.aliases) or "–",
            ago(v.created_at),
        )
        for v in versions
    ]
    columns = ("", "base", "method", "+>parameters", ">size", "~made from", "aliases", "made")
    show(columns, rows, "")


def _tell_version(registry: "AdapterRegistry", version: "VersionRecord") -> None:
    pairs = [
        ("version", f"[bold]{version.address}[/]  {', '.join(version.aliases)}"),
        ("state", str(version.state)),
        ("base", f"{version.base.name}  (identity {version.base.identity_sha256[:12]}…)"),
        ("method", f"{version.method}, {version.trainable_parameters:,} parameters"),
        ("made from", _origin(registry, version)),
        ("made", f"{version.created_at:%Y-%m-%d %H:%M} UTC"),
        ("size", size(version.size_bytes)),
        ("sha256", version.artifact_sha256),
        ("MLflow run", version.mlflow_run_id or "–"),
    ]
    pairs += [
        (kept.relation.replace("_", " "), f"{kept.created_at:%Y-%m-%d %H:%M} UTC, {size(kept.size_bytes)}")
        for kept in registry.attachments(version.address)
    ]
    if version.failure:
        pairs.append(("failure", f"[red]{escape(version.failure)}[/]"))
    facts(pairs)


def _origin(registry: "AdapterRegistry", version: "VersionRecord") -> str:
    """What a version comes from: the versions in its lineage, and the data it was trained on."""
    edges = [edge for edge in registry.lineage(version.address).edges if edge.child == version.address]
    parents = [f"{edge.parent} ({edge.relation})" for edge in edges]
    data = [version.dataset.name] if version.dataset else []
    unknown = "its recipe's data" if "data" in version.recipe else "imported files"
    return escape(", ".join([*parents, *data]) or unknown)


def _measured(version: "VersionRecord", evaluations: "list[EvaluationRecord]") -> list[tuple[str, ...]]:
    """The newest number of each suite and metric; what comes beside is left to `regraft evaluate` and --json."""
    from registry.policy import BESIDE

    newest = {(e.suite, e.metric): e for e in sorted(evaluations, key=lambda e: e.at) if e.metric not in BESIDE}
    rows: list[tuple[str, ...]] = []
    for (suite, metric), e in sorted(newest.items()):
        value, _, interval = measured(metric, e.value, e.low, e.high).partition(" [")
        title = suite if metric == "exact_match" else f"{suite}  [dim]{metric}[/]"
        rows.append((f"[bold]@{version.number}[/]", title, value, f"[{interval}" if interval else "–", str(e.samples)))
    return rows


def _number(address: str | None) -> str:
    return f"@{address.rpartition('@')[2]}" if address else "none"
