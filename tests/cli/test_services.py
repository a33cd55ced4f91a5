"""`regraft up`, `status`, `doctor` and `down` on a home of their own."""

import json
from pathlib import Path

import httpx
import pytest

from tests.cli.conftest import run_here


@pytest.mark.services
def test_servers_are_started_shown_and_stopped(home: Path) -> None:
    try:
        up = run_here("up", "--json")
        assert (up.code, up.err) == (0, "")
        urls = {service["name"]: service["url"] for service in json.loads(up.out)}
        assert httpx.get(f"{urls['prefect']}/api/health").json() is True
        assert httpx.get(f"{urls['mlflow']}/health").status_code == 200
        shown = run_here("status").out
        assert shown.count("running") == 2
        assert urls["mlflow"] in shown
    finally:
        down = run_here("down")
    assert down.out == "Stopped: prefect, mlflow.\n"
    assert run_here("status").out.count("stopped") == 2
    assert run_here("down").out == "Nothing was running.\n"


def test_status_starts_nothing(home: Path) -> None:
    assert run_here("status").out.count("stopped") == 2
    assert not home.exists()


def test_doctor_looks_at_everything_and_its_exit_code_says_whether_there_is_a_problem(home: Path) -> None:
    result = run_here("doctor", "--json")
    findings = json.loads(result.out)
    subjects = {finding["subject"] for finding in findings}
    assert {"registry database"} < subjects
    assert result.code == int(any(finding["level"] == "problem" for finding in findings))
    assert all(finding["remedy"] for finding in findings if finding["level"] == "problem")
    told = run_here("doctor").out
    assert all(subject in told for subject in subjects)
