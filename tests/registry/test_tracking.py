from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.errors import ServiceUnavailable
from infra.settings import Settings
from registry.tracking import Tracking, artifact_source


@pytest.fixture
def tracking(settings: Settings) -> Tracking:
    return Tracking(settings)


def record(tracking: Tracking, uid: str, adapter: str = "counting") -> int:
    return tracking.ensure_version(adapter, uid, source=artifact_source("a" * 64), run_id=None, tags={"regraft.x": "y"})


def test_a_run_belongs_to_its_adapters_experiment(tracking: Tracking, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "table.md").write_text("| a |")
    params = {f"p{index}": index for index in range(250)} | {"long": "x" * 10_000}
    run_id = tracking.start_run("counting", name="first", tags={"regraft.method": "lora"}, params=params)
    for step in (1, 2):
        tracking.log_metrics(run_id, {f"m{index}": step / (index + 1) for index in range(1200)}, step)
    tracking.log_artifacts(run_id, tmp_path / "report")
    tracking.finish(run_id)
    client = tracking._client
    run = client.get_run(run_id)
    assert client.get_experiment(run.info.experiment_id).name == "regraft/counting"
    assert (run.info.status, run.info.run_name, run.data.tags["regraft.method"]) == ("FINISHED", "first", "lora")
    assert len(run.data.params) == 251 and run.data.params["p249"] == "249"
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "m1")] == [(1, 0.5), (2, 1.0)]
    assert len(run.data.metrics) == 1200
    assert [file.path for file in client.list_artifacts(run_id)] == ["table.md"]


def test_a_deleted_experiment_comes_back_with_the_next_run(tracking: Tracking) -> None:
    run_id = tracking.start_run("counting", tags={}, params={})
    experiment = tracking._client.get_run(run_id).info.experiment_id
    tracking._client.delete_experiment(experiment)
    assert tracking._client.get_run(tracking.start_run("counting", tags={}, params={})).info.experiment_id == experiment


def test_first_runs_of_an_adapter_at_once_share_its_experiment(settings: Settings) -> None:
    def start(_: int) -> str:
        return Tracking(settings).start_run("counting", tags={}, params={})

    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(start, range(4)))
    client = Tracking(settings)._client
    assert len({client.get_run(run).info.experiment_id for run in runs}) == 1


def test_a_version_is_recorded_once_per_uid(tracking: Tracking) -> None:
    first, second = record(tracking, "u1"), record(tracking, "u2")
    assert (first, second) == (1, 2)
    assert record(tracking, "u1") == first
    assert tracking.versions("counting") == {"u1": 1, "u2": 2}
    assert tracking.delete_version("counting", "u1")
    assert not tracking.delete_version("counting", "u1")
    assert tracking.versions("counting") == {"u2": 2}


def test_versions_that_others_made_are_not_ours(tracking: Tracking) -> None:
    record(tracking, "u1")
    tracking._client.create_model_version("counting", source="s3://x/y")
    assert tracking.versions("counting") == {"u1": 1}


def test_aliases_are_read_back_as_they_were_set(tracking: Tracking) -> None:
    assert tracking.aliases("counting") == {}
    record(tracking, "u1")
    tracking.set_alias("counting", "production", 1)
    assert tracking.aliases("counting") == {"production": 1}
    tracking.delete_alias("counting", "production")
    assert tracking.aliases("counting") == {}


def test_an_mlflow_that_is_not_there_is_named_without_its_password(settings: Settings) -> None:
    away = Settings(home=settings.home, mlflow_tracking_uri="http://ada:hunter2@127.0.0.1:9")
    with pytest.raises(ServiceUnavailable) as refused:
        Tracking(away).aliases("counting")
    assert "127.0.0.1:9" in str(refused.value) and "hunter2" not in str(refused.value)


def test_a_run_that_ended_goes_on_and_one_that_is_gone_does_not(tracking: Tracking) -> None:
    run_id = tracking.start_run("counting", tags={}, params={})
    tracking.finish(run_id, "KILLED")
    tracking.set_tags(run_id, {"regraft.flow_run": "second"})
    assert tracking.tags(run_id)["regraft.flow_run"] == "second"
    assert tracking.reopen(run_id)
    assert tracking._client.get_run(run_id).info.status == "RUNNING"
    tracking._client.delete_run(run_id)
    assert not tracking.reopen(run_id)
    assert not tracking.reopen("0" * 32)
