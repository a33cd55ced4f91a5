"""Trainings that are stopped, killed, or started twice, as processes of their own."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

from infra.mlflow_client import mlflow_client
from infra.services import LocalServices
from infra.settings import get_settings
from registry import AdapterRegistry
from tests.cli.conftest import TRAINING, WriteRecipe, ended, run_here, started
from training.checkpoints import checkpoints_directory
from training.recipe import load_recipe

pytestmark = pytest.mark.services

LONG = {**TRAINING, "steps": 300, "checkpoint_every": 20}


@pytest.fixture(scope="module", autouse=True)
def servers(regraft_home: Path) -> None:
    """The local Prefect server is up, so that starting a training takes no longer than it must."""
    get_settings.cache_clear()
    assert run_here("schedule", "list", "--json").code == 0


@pytest.fixture(scope="module")
def uninterrupted(servers: None, write_recipe: WriteRecipe) -> bytes:
    """The tensors that the long training comes to when it is left in peace."""
    return tensors(trained(write_recipe("whole", training=LONG))["address"])


def wait_for_checkpoint(recipe: Path, process: "subprocess.Popen[str]") -> Path:
    """The working directory of the training, once it holds a checkpoint."""
    chosen = load_recipe(recipe)
    workdir = get_settings().runs / f"{chosen.adapter}-{chosen.digest}"
    deadline = time.monotonic() + 120
    while not list(checkpoints_directory(workdir).glob("step-*")):
        assert process.poll() is None, ended(process).err
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.05)
    return workdir


def tensors(address: str) -> bytes:
    return (AdapterRegistry().materialise(address) / "adapter_model.safetensors").read_bytes()


def trained(recipe: Path) -> dict[str, Any]:
    result = run_here("train", str(recipe), "--no-evaluate", "--json")
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)  # type: ignore[no-any-return]


def runs_of(adapter: str) -> list[str]:
    client = mlflow_client(get_settings())
    experiment = client.get_experiment_by_name(f"regraft/{adapter}")
    return [run.info.status for run in client.search_runs([experiment.experiment_id])]


def flow_states(adapter: str) -> list[str]:
    """Of the trainings of an adapter, as Prefect has them."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[f"train {adapter}"])))
    return sorted(run.state.type.value for run in runs if run.state)


def task_states(adapter: str) -> list[str]:
    with get_client(sync_client=True) as client:
        name = FlowRunFilterName(any_=[f"train {adapter}"])
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(name=name))
    return [task.state.type.value for task in tasks if task.state]


def test_ctrl_c_registers_nothing_and_the_same_command_goes_on_to_the_same_tensors(
    write_recipe: WriteRecipe, uninterrupted: bytes
) -> None:
    recipe = write_recipe("stopped", training=LONG)
    process = started("train", str(recipe), "--no-evaluate")
    wait_for_checkpoint(recipe, process)
    os.killpg(process.pid, signal.SIGSTOP)  # held in the middle of its work, however quick the machine

    twice = run_here("train", str(recipe), "--no-evaluate")
    assert twice.code == 4
    assert f"Another run (process {process.pid}) is at work" in twice.err
    assert twice.err.count("\n") == 2
    beside = trained(write_recipe("stopped", training={**TRAINING, "steps": 1}))  # another recipe of the same adapter
    assert beside["address"] == "stopped@1"

    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    stopped = ended(process)
    assert (stopped.code, stopped.out) == (130, "")
    assert "The training was stopped after step" in stopped.err
    assert "Run the same command again: it goes on after step" in stopped.err
    assert stopped.err.count("\n") == 2
    assert [version.number for version in AdapterRegistry().versions("stopped")] == [1]
    assert sorted(runs_of("stopped")) == ["FINISHED", "KILLED"]
    assert flow_states("stopped") == ["CANCELLED", "COMPLETED", "FAILED"]  # the one that came second failed

    resumed = ended(started("train", str(recipe), "--no-evaluate", "--json"))
    assert (resumed.code, resumed.err) == (0, "")
    assert json.loads(resumed.out)["address"] == "stopped@2"
    assert "KILLED" not in runs_of("stopped")
    assert tensors("stopped@2") == uninterrupted


def test_a_training_that_was_killed_goes_on_to_the_same_tensors(
    write_recipe: WriteRecipe, uninterrupted: bytes
) -> None:
    recipe = write_recipe("killed", training=LONG)
    process = started("train", str(recipe), "--no-evaluate")
    workdir = wait_for_checkpoint(recipe, process)
    os.killpg(process.pid, signal.SIGKILL)
    assert ended(process).code == -signal.SIGKILL
    assert not AdapterRegistry().has_adapter("killed")
    assert flow_states("killed") == ["RUNNING"]
    assert list(checkpoints_directory(workdir).glob("step-*"))

    resumed = trained(recipe)
    assert resumed["address"] == "killed@1"
    assert not list(checkpoints_directory(workdir).glob("step-*"))
    assert tensors("killed@1") == uninterrupted
    assert run_here("fsck", "--quick").code == 0
    assert flow_states("killed") == ["COMPLETED", "CRASHED"]  # no run is left that seems to be at work
    assert set(task_states("killed")) == {"COMPLETED", "CRASHED"}


@pytest.mark.slow
def test_a_prefect_server_that_dies_is_brought_back_and_costs_nothing(
    write_recipe: WriteRecipe, uninterrupted: bytes
) -> None:
    recipe = write_recipe("bereft", training=LONG)
    process = started("train", str(recipe), "--json")
    wait_for_checkpoint(recipe, process)
    os.killpg(process.pid, signal.SIGSTOP)
    server = LocalServices(get_settings()).prefect()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGCONT)

    through = ended(process)
    assert (through.code, through.err) == (0, "")
    assert json.loads(through.out)["evaluations"]
    assert tensors("bereft@1") == uninterrupted
    assert flow_states("bereft") == ["COMPLETED"]
