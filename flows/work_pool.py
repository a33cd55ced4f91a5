"""The Prefect work pool whose runs `regraft worker` executes.

A deployment points at an importable flow on a process work pool, so that the worker needs no code storage, and carries
what the flow is to be told, so that Prefect's UI can show it and run it again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectAlreadyExists
from prefect.types.entrypoint import EntrypointType
from pydantic_core import to_jsonable_python

from infra.settings import Settings

POOL = "regraft"


def deploy(
    flow: Flow[..., Any],
    name: str,
    parameters: Mapping[str, Any],
    settings: Settings,
    *,
    description: str,
    tags: Sequence[str] = (),
    schedules: Sequence[CronSchedule | IntervalSchedule] = (),
    **variables: str,
) -> UUID:
    """Create a deployment of the flow on the pool, or replace the one of that name.

    Args:
        flow: a module's own.
        name: of the deployment.
        parameters: of the flow; models and dataclasses become plain.
        settings: whose home the runs work in.
        description: for Prefect's UI.
        tags: of the deployment.
        schedules: when it runs by itself.
        variables: further job variables of the pool.
    """
    ensure_pool()
    deployment = RunnerDeployment.from_flow(
        flow,
        name=name,
        description=description,
        schedules=list(schedules),
        parameters=to_jsonable_python(parameters, exclude_none=True),
        tags=list(tags),
        work_pool_name=POOL,
        entrypoint_type=EntrypointType.MODULE_PATH,
        job_variables={"env": {"REGRAFT_HOME": str(settings.home)}, **variables},
    )
    identity = deployment.apply()
    assert isinstance(identity, UUID)  # a coroutine only where an event loop runs
    return identity


def queue(flow: Flow[..., Any], name: str, parameters: Mapping[str, Any], settings: Settings) -> str:
    """Leave one run of the flow to a worker; returns the flow run's name.

    It runs in the folder that it was queued in, whose policies decide about promotions.
    """
    told, folder = f"Queued by {settings.actor}.", str(Path.cwd())
    deployment = deploy(flow, name, parameters, settings, description=told, working_dir=folder)
    with prefect_client() as client:
        return client.create_flow_run_from_deployment(deployment).name


def ensure_pool() -> None:
    """Create the work pool, where it is not there yet."""
    with prefect_client() as client, suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", description="Regraft's flows"))


@contextmanager
def prefect_client() -> Iterator[SyncPrefectClient]:
    """For the server that the settings name."""
    with get_client(sync_client=True) as client:
        yield client
