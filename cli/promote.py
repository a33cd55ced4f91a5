"""`regraft promote` and `regraft rollback`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.console import Json, console, print_json, show

if TYPE_CHECKING:
    from flows.promote_adapter import Promotion


def promote(
    address: Annotated[str, typer.Argument(help="NAME@VERSION or NAME@ALIAS.")],
    to: Annotated[str, typer.Option("--to", metavar="ALIAS", help="The alias to move.")] = "production",
    policy: Annotated[
        Path | None,
        typer.Option(
            help="A policy (YAML). Default: policies/NAME.yaml, policies/default.yaml, else the built-in one."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Move the alias even if the gate refuses.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why; --force needs it. Goes to the audit log.")] = None,
    as_json: Json = False,
) -> None:
    """Put a version behind an alias, if its policy allows it.

    Evaluates what is missing, decides line by line, records who, what, why and the numbers, moves the alias.

    Examples:
      [bold]regraft promote counting@7 --to production[/]
      [bold]regraft promote counting@7 --to production --force --reason "hotfix, agreed with Ada"[/]
    """
    from cli.session import connect_flows, live_progress
    from registry import AdapterRegistry
    from registry.addresses import alias_name
    from registry.gate import require_reason
    from registry.policy import Policy

    require_reason(force, reason)  # what needs no server comes first
    chosen = Policy.load(policy) if policy else None
    AdapterRegistry().get(address)
    alias_name(to)
    connect_flows()
    from flows.promote_adapter import promote_adapter

    with live_progress():
        promotion = promote_adapter(address, alias=to, policy=chosen, force=force, reason=reason)
    if as_json:
        print_json(promotion)
    else:
        tell_verdict(promotion)
    if not promotion.moved:
        raise typer.Exit(7)


def tell_verdict(promotion: "Promotion") -> None:
    """The policy line by line, then what changed."""
    rows = [
        ("[green]✓[/]" if c.passed else "[red]✗[/]", c.name, c.required, c.measured, f"[dim]{escape(c.detail)}[/]")
        for c in promotion.checks
    ]
    show(("", "~check", "wanted", "measured", "~"), rows, "The policy asks for nothing.")
    if promotion.moved and promotion.from_address == promotion.to_address:
        console.print(f"[bold green]confirmed[/]  {promotion.alias} was and is [bold]{promotion.to_address}[/]")
    elif promotion.moved:
        console.print(
            f"[bold green]{promotion.decision}[/]  {promotion.alias}: "
            f"{promotion.from_address or 'none'} → [bold]{promotion.to_address}[/]"
        )
    else:
        console.print(
            f"[bold red]refused[/]  {promotion.alias} stays with {promotion.from_address or 'nobody'}. "
            f"[dim]Recorded: regraft adapters history {promotion.adapter}[/]"
        )


def rollback(
    name: Annotated[str, typer.Argument(help="The adapter.")],
    alias: Annotated[str, typer.Option(help="The alias to move back.")] = "production",
    reason: Annotated[str | None, typer.Option(help="Why. Goes to the audit log.")] = None,
    as_json: Json = False,
) -> None:
    """Give an alias back to its previous holder.

    Example: [bold]regraft rollback counting --reason "wrong answers since Tuesday"[/]
    """
    from infra.settings import get_settings
    from registry import AdapterRegistry

    record = AdapterRegistry().rollback(name, alias, actor=get_settings().actor, reason=reason)
    if as_json:
        print_json(record)
        return
    console.print(f"{alias}: {record.from_address} → [bold]{record.to_address}[/]  [dim]rolled back[/]")
