"""Flow runs whose process was killed: Prefect goes on taking them for running until somebody says otherwise."""

from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.telling import tell_prefect


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
