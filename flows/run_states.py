"""Ends of flow runs that Prefect cannot see for itself: a process that was killed, a stop that was asked for."""

from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed

from flows.telling import tell_prefect
from infra.errors import Interrupted


def mark_crashed(flow_run_id: str, reason: str) -> None:
    """End a flow run that is known to be dead, with its tasks and the runs it was called from; ended ones stay so.

    Args:
        flow_run_id: a run that another Prefect server recorded is nothing to this one.
        reason: shown beside the state.
    """

    def mark() -> None:
        with get_client(sync_client=True) as client:
            run_id: UUID | None = UUID(flow_run_id)
            while run_id is not None:
                run_id = _end(client, run_id, Crashed(message=reason))

    tell_prefect(f"that flow run {flow_run_id} is gone", mark)


def cancel_if_interrupted(flow: Any, flow_run: Any, state: State) -> None:
    """An `on_failure` hook of flows: who pressed Ctrl-C has cancelled the run, it has not failed."""
    del flow
    if not isinstance(state.data, Interrupted) and f"{Interrupted.__name__}:" not in (state.message or ""):
        return

    def mark() -> None:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.id, Cancelled(message=state.message), force=True)

    tell_prefect(f"that flow run {flow_run.name} was stopped on purpose", mark)


def _end(client: SyncPrefectClient, run_id: UUID, crashed: State) -> UUID | None:
    """Ends one run; returns the id of the one that it was called from."""
    try:
        run = client.read_flow_run(run_id)
    except ObjectNotFound:
        return None
    within = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))
    for task in within:
        if task.state is None or not task.state.is_final():
            client.set_task_run_state(task.id, crashed, force=True)
    if run.state is None or not run.state.is_final():
        client.set_flow_run_state(run_id, crashed, force=True)
    return client.read_task_run(run.parent_task_run_id).flow_run_id if run.parent_task_run_id else None
