"""Schedules: Prefect deployments of the training flow, one per adapter, each with its whole recipe."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count, islice
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterTags,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from pydantic import BaseModel, ValidationError

from flows.train_adapter import train_adapter
from flows.work_pool import POOL, deploy, prefect_client
from infra.documents import did_you_mean
from infra.errors import InvalidInput, NotFound
from infra.settings import Settings
from registry.addresses import adapter_name
from training.recipe import Recipe

TAG = "regraft-schedule"
_OWNER = "owner:"
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


class Schedule(BaseModel):
    """One adapter's training schedule, as `regraft schedule list` shows it."""

    adapter: str
    when: str
    only_when_data_changes: bool
    paused: bool
    owner: str
    next_runs: list[datetime]
    last_result: str | None
    last_run: datetime | None


class Trigger(BaseModel):
    """When to train: a cron line in a time zone, or an interval."""

    cron: str | None = None
    interval: timedelta | None = None
    timezone: str | None = None

    def schedule(self) -> CronSchedule | IntervalSchedule:
        """The trigger as Prefect's schedule.

        Raises:
            InvalidInput: not exactly one of cron and interval, a bad cron line, or an unknown time zone.
        """
        if (self.cron is None) == (self.interval is None):
            raise InvalidInput("A schedule needs either a cron line or an interval.", 'E.g. --cron "0 3 * * 1"')
        if self.timezone is not None:
            try:
                ZoneInfo(self.timezone)
            except (ZoneInfoNotFoundError, ValueError):
                raise InvalidInput(f"'{self.timezone}' is not a time zone.", "E.g. Europe/Berlin or UTC.") from None
        try:
            if self.cron is not None:
                return CronSchedule(cron=self.cron, timezone=self.timezone)
            assert self.interval is not None
            return IntervalSchedule(interval=self.interval, timezone=self.timezone)
        except (ValidationError, ValueError) as error:
            detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            detail = detail.removeprefix("Value error, ")
            raise InvalidInput(
                f"The schedule is not usable: {detail}.", 'Cron is "minute hour day month weekday".'
            ) from None


def create(recipe: Recipe, trigger: Trigger, settings: Settings, only_when_data_changes: bool = False) -> Schedule:
    """Create the schedule of the recipe's adapter, or replace the one that is there.

    Raises:
        InvalidInput: the adapter cannot be called that, or the trigger is none.
    """
    adapter_name(recipe.adapter)
    schedule = trigger.schedule()
    deploy(
        train_adapter,
        recipe.adapter,
        {"recipe": recipe.as_stored(), "only_if_data_changed": only_when_data_changes},
        settings,
        description=recipe.description or f"Trains {recipe.adapter} on {recipe.base}.",
        tags=[TAG, _OWNER + settings.actor],
        schedules=[schedule],
    )
    with prefect_client() as client:
        return _describe(client, _find(client, recipe.adapter))


def listing() -> list[Schedule]:
    """Every schedule, by adapter."""
    with prefect_client() as client:
        return [_describe(client, deployment) for deployment in _all(client)]


def pause(adapter: str) -> Schedule:
    """Stop a schedule from starting runs; what already runs goes on."""
    with prefect_client() as client:
        client.pause_deployment(_find(client, adapter).id)
        return _describe(client, _find(client, adapter))


def resume(adapter: str) -> Schedule:
    """Let a paused schedule start runs again."""
    with prefect_client() as client:
        client.resume_deployment(_find(client, adapter).id)
        return _describe(client, _find(client, adapter))


def run_now(adapter: str) -> str:
    """Queue one run at once, beside the schedule. Returns the name of the flow run."""
    with prefect_client() as client:
        return client.create_flow_run_from_deployment(_find(client, adapter).id).name


def due() -> int:
    """How many runs wait for a worker whose time has come."""
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
    come = FlowRunFilterExpectedStartTime(before_=datetime.now(UTC))
    with prefect_client() as client:
        return client.count_flow_runs(
            flow_run_filter=FlowRunFilter(state=state, expected_start_time=come),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
        )


def remove(adapter: str) -> None:
    """Delete a schedule; its past runs stay in Prefect."""
    with prefect_client() as client:
        client.delete_deployment(_find(client, adapter).id)


def _all(client: SyncPrefectClient) -> list[DeploymentResponse]:
    tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    return sorted(client.read_deployments(deployment_filter=tagged, limit=200), key=lambda found: found.name)


def _find(client: SyncPrefectClient, adapter: str) -> DeploymentResponse:
    try:
        return client.read_deployment_by_name(f"{train_adapter.name}/{adapter}")
    except ObjectNotFound:
        known = [deployment.name for deployment in _all(client)]
        hint = did_you_mean(adapter, known) if known else "There are no schedules yet."
        raise NotFound(f"'{adapter}' has no schedule. {hint}", "See: regraft schedule list") from None


def _describe(client: SyncPrefectClient, deployment: DeploymentResponse) -> Schedule:
    own = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]))
    past = own.model_copy(
        update={"state": FlowRunFilterState(type=FlowRunFilterStateType(not_any_=[StateType.SCHEDULED]))}
    )
    last = client.read_flow_runs(flow_run_filter=past, sort=FlowRunSort.START_TIME_DESC, limit=1)
    schedules = [item.schedule for item in deployment.schedules]
    return Schedule(
        adapter=deployment.name,
        when="; ".join(_when(schedule) for schedule in schedules),
        only_when_data_changes=bool((deployment.parameters or {}).get("only_if_data_changed")),
        paused=deployment.paused or not any(item.active for item in deployment.schedules),
        owner=next((t.removeprefix(_OWNER) for t in deployment.tags if t.startswith(_OWNER)), "–"),
        next_runs=_next_runs(schedules),
        last_result=last[0].state_name if last else None,
        last_run=last[0].start_time if last else None,
    )


def _when(schedule: Any) -> str:
    if isinstance(schedule, CronSchedule):
        return f"cron {schedule.cron}" + (f" ({schedule.timezone})" if schedule.timezone else "")
    seconds = int(schedule.interval.total_seconds())
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds % size == 0))
    return f"every {seconds // size} {unit}"


def _next_runs(schedules: list[Any], wanted: int = 3) -> list[datetime]:
    """The next run times, in the schedule's own zone; computed here, so that they are known at once."""
    now = datetime.now(UTC)
    runs = (run for schedule in schedules for run in islice(_runs_after(schedule, now), wanted))
    return sorted(runs)[:wanted]


def _runs_after(schedule: CronSchedule | IntervalSchedule, now: datetime) -> Iterator[datetime]:
    zone = ZoneInfo(schedule.timezone) if schedule.timezone else UTC
    if isinstance(schedule, CronSchedule):
        yield from CronSim(schedule.cron, now.astimezone(zone))
        return
    anchor = datetime.fromtimestamp(schedule.anchor_date.timestamp(), UTC)  # Prefect's may be one of pendulum's
    elapsed = (now - anchor) // schedule.interval
    for number in count(elapsed + 1):
        yield (anchor + number * schedule.interval).astimezone(zone)
