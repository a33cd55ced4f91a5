"""What the commands that leave work to `regraft worker` have in common."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cli.console import console, print_json

if TYPE_CHECKING:
    from prefect import Flow

    from infra.settings import Settings


def leave(
    flow: "Flow[..., Any]", name: str, parameters: Mapping[str, Any], settings: "Settings", *, as_json: bool
) -> None:
    """Queue one run of the flow, and say so."""
    from flows.work_pool import queue

    flow_run = queue(flow, name, parameters, settings)
    print_json({"flow_run": flow_run}) if as_json else tell_queued(flow_run)


def tell_queued(flow_run: str) -> None:
    """Say that a worker has something to do."""
    console.print(f"Queued as flow run [bold]{flow_run}[/]. [dim]A worker runs it: regraft worker[/]")
