"""Schedules against a running Prefect server; tests/cli has the worker that executes them."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from infra.errors import InvalidInput, NotFound
from infra.settings import Settings
from training.recipe import Recipe

pytestmark = pytest.mark.services

Content = Callable[..., dict[str, Any]]


@pytest.fixture
def recipe(connected: Settings, recipe_content: Content) -> Recipe:
    return Recipe.model_validate(recipe_content("timed", evaluation=[{"samples": 4, "max_new_tokens": 2}]))


def test_a_cron_schedule_names_its_next_runs_in_its_own_zone(connected: Settings, recipe: Recipe) -> None:
    from flows.schedules import Trigger, create

    made = create(recipe, Trigger(cron="0 3 * * 1", timezone="Europe/Berlin"), connected)
    assert made.owner == "tester"
    assert len(made.next_runs) == 3
    for run in made.next_runs:
        local = run.astimezone(ZoneInfo("Europe/Berlin"))
        assert (local.weekday(), local.hour, local.minute) == (0, 3, 0)
        assert run > datetime.now(UTC)
    assert made.next_runs[1].replace(tzinfo=None) - made.next_runs[0].replace(tzinfo=None) == timedelta(weeks=1)


def test_scheduling_again_replaces_pausing_and_removing_work(connected: Settings, recipe: Recipe) -> None:
    from flows.schedules import Trigger, create, listing, pause, remove, resume

    create(recipe, Trigger(cron="0 3 * * 1"), connected)
    create(recipe, Trigger(interval=timedelta(hours=6)), connected, only_when_data_changes=True)
    (found,) = [schedule for schedule in listing() if schedule.adapter == "timed"]
    assert found.when == "every 6 h"
    assert found.only_when_data_changes
    assert pause("timed").paused
    assert not resume("timed").paused
    remove("timed")
    assert "timed" not in [schedule.adapter for schedule in listing()]
    with pytest.raises(NotFound, match="timed"):
        pause("timed")


@pytest.mark.parametrize(
    ("trigger", "told"),
    [
        ({"cron": "every monday"}, "schedule is not usable"),
        ({"cron": "0 3 * * 1", "timezone": "Mars/Olympus"}, "not a time zone"),
        ({}, "either a cron line or an interval"),
        ({"cron": "0 3 * * 1", "interval": timedelta(hours=1)}, "either a cron line or an interval"),
    ],
)
def test_a_bad_trigger_is_refused_before_anything_is_made(
    connected: Settings, recipe: Recipe, trigger: dict[str, Any], told: str
) -> None:
    from flows.schedules import Trigger, create, listing

    before = listing()
    with pytest.raises(InvalidInput, match=told):
        create(recipe, Trigger(**trigger), connected)
    assert listing() == before
