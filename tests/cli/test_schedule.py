"""Schedules from the command line, and a worker that runs one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.services import LocalServices
from infra.settings import get_settings
from registry import AdapterRegistry
from tests.cli.conftest import WriteRecipe, ended, run_here, started

pytestmark = pytest.mark.services


@pytest.fixture
def recipe(regraft_home: Path, write_recipe: WriteRecipe) -> Path:
    get_settings.cache_clear()
    return write_recipe("punctual", evaluation=[{"samples": 4, "max_new_tokens": 2}])


def listed(adapter: str) -> list[dict[str, Any]]:
    return [s for s in json.loads(run_here("schedule", "list", "--json").out) if s["adapter"] == adapter]


def test_a_schedule_is_made_listed_paused_resumed_and_removed(recipe: Path) -> None:
    made = run_here("schedule", "train", str(recipe), "--cron", "0 3 * * 1", "--timezone", "Europe/Berlin")
    assert (made.code, made.err) == (0, "")
    assert "punctual trains cron 0 3 * * 1 (Europe/Berlin). Next:" in made.out
    assert made.out.count(" 03:00 CE") == 3
    for width in (80, 120):
        line = next(
            line for line in run_here("schedule", "list", width=width).out.splitlines() if line.startswith("punctual")
        )
        assert " 03:00 CE" in line
        assert len(line) <= width
    assert "is paused" in run_here("schedule", "pause", "punctual").out
    assert listed("punctual")[0]["paused"] is True
    assert "is on; next run" in run_here("schedule", "resume", "punctual").out
    assert listed("punctual")[0]["owner"] == "tester"
    assert run_here("schedule", "remove", "punctual").code == 0
    assert listed("punctual") == []
    gone = run_here("schedule", "pause", "punctual")
    assert (gone.code, "'punctual' has no schedule." in gone.err) == (3, True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "either a cron line or an interval"),
        (("--cron", "every monday"), "Invalid cron string"),
        (("--cron", "0 3 * * 1", "--timezone", "Mars/Olympus"), "is not a time zone"),
        (("--interval", "soon"), "'soon' is not an interval."),
        (("--interval", "1h", "--cron", "0 3 * * 1"), "either a cron line or an interval"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_not_made(recipe: Path, options: tuple[str, ...], told: str) -> None:
    result = run_here("schedule", "train", str(recipe), *options)
    assert (result.code, result.out) == (2, "")
    assert told in result.err
    assert result.err.count("\n") == 2
    assert listed("punctual") == []


@pytest.mark.slow
def test_prefects_own_command_line_deploys_the_file_of_the_repository(regraft_home: Path) -> None:
    get_settings.cache_clear()
    environment = {**os.environ, "PREFECT_API_URL": LocalServices(get_settings()).prefect_api_url()}
    for command in ("work-pool create regraft --type process --overwrite", "deploy --all"):
        subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *command.split()],
            cwd=Path(__file__).parents[2],
            env={**environment, "PREFECT_HOME": str(regraft_home / "prefect")},
            check=True,
            capture_output=True,
        )
    (deployed,) = listed("counting")
    assert (deployed["when"], deployed["paused"]) == ("cron 0 3 * * 1 (UTC)", True)
    assert run_here("schedule", "remove", "counting").code == 0


@pytest.mark.slow
def test_a_worker_runs_what_was_queued_and_leaves(recipe: Path) -> None:
    watching = run_here("schedule", "train", str(recipe), "--when-dataset-changes", "--interval", "300d")
    assert "if the data changed" in watching.out
    for _ in range(2):  # more than it takes at a time
        assert "Queued as flow run" in run_here("schedule", "run-now", "punctual").out
    worked = ended(started("worker", "--once"))
    assert worked.code == 0, worked.err
    assert not any(noise in worked.out + worked.err for noise in ("Traceback", "Warning", "it/s"))
    assert (worked.out + worked.err).count("Flow run 'train punctual' - Finished in state Completed") == 2
    assert listed("punctual")[0]["last_result"] == "Completed"
    assert AdapterRegistry().get("punctual@1").state == "ready"
    run_here("schedule", "remove", "punctual")
