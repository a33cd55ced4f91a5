"""`regraft up`, `down`, `status` and `doctor`: the servers and the machine."""

import typer
from rich.markup import escape

from cli.console import Json, ago, console, errors, print_json, show


def up(as_json: Json = False) -> None:
    """Start the local Prefect and MLflow servers, or find them running, and print their addresses.

    Commands start what they need by themselves; this is for looking at the two UIs.
    """
    from infra.services import LocalServices
    from infra.settings import get_settings

    with errors.status("starting Prefect and MLflow (about 10 s the first time)"):
        services = LocalServices(get_settings()).up()
    if as_json:
        print_json(services)
        return
    for service in services:
        console.print(f"[bold]{service.name:<9}[/]{service.url}")


def down() -> None:
    """Stop the local servers. Nothing is lost; the next command that needs one starts it again."""
    from infra.services import LocalServices
    from infra.settings import get_settings

    with errors.status("stopping"):
        stopped = LocalServices(get_settings()).down()
    console.print(f"Stopped: {', '.join(stopped)}." if stopped else "Nothing was running.")


def status(as_json: Json = False) -> None:
    """What runs where."""
    from infra.services import LocalServices
    from infra.settings import get_settings

    settings = get_settings()
    services = LocalServices(settings).status()
    if as_json:
        print_json({"home": settings.home, "services": services})
        return
    colour = {"running": "green", "starting": "yellow", "unreachable": "red"}
    rows = [
        (
            f"[bold]{s.name}[/]",
            f"[{colour.get(s.state, 'dim')}]{s.state}[/]",
            s.url or "–",
            "remote" if s.remote else f"pid {s.pid}" if s.pid else "–",
            ago(s.started_at) if s.started_at else "–",
        )
        for s in services
    ]
    show(("service", "state", "~address", "process", "started"), rows, "")
    console.print(f"[dim]home {escape(str(settings.home))}[/]", soft_wrap=True)


def doctor(as_json: Json = False) -> None:
    """Check Python, torch, disk, settings, servers and database, and say what to do about each finding.

    Exit code 1 where there is a problem.
    """
    from infra.machine import Finding, machine_findings
    from infra.settings import get_settings
    from registry.schema import revision_finding

    settings = get_settings()
    with errors.status("looking"):
        findings: list[Finding] = [*machine_findings(settings), revision_finding(settings)]
    if as_json:
        print_json(findings)
    else:
        signs = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "problem": "[red]✗[/]"}
        for finding in findings:
            console.print(
                f"{signs[finding.level]} [bold]{finding.subject}[/]  {escape(finding.message)}", soft_wrap=True
            )
            if finding.remedy:
                console.print(f"    [dim]→ {escape(finding.remedy)}[/]", soft_wrap=True)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)
