"""`regraft federate --runner flower`: clients in processes of their own; what comes out is the same."""

import json
import os
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.settings import get_settings
from registry import AdapterRegistry
from tests.cli.conftest import TRAINING, WriteRecipe, ended, run_here, started
from tests.cli.test_lifecycle import clean

installed = pytest.mark.skipif(find_spec("flwr") is None, reason="pip install 'regraft[flower]'")
pytestmark = pytest.mark.services

SMALL = ("--clients", "3", "--rounds", "2", "--ranks", "4,2,1", "--no-evaluate", "--json")


@pytest.fixture(scope="module")
def recipe(regraft_home: Path, write_recipe: WriteRecipe) -> Path:
    get_settings.cache_clear()
    return write_recipe("flower")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of other threads are other sums."""
    monkeypatch.setenv("REGRAFT_THREADS", "1")
    get_settings.cache_clear()


def federate(recipe: Path, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(clean(run_here("federate", str(recipe), *SMALL, *arguments)))
    return found


def contents(told: dict[str, Any]) -> list[bytes]:
    """The tensors of every version that a federation made."""
    addresses = [address for made in told["rounds"] for address in (made["address"], *made["clients"].values())]
    registry = AdapterRegistry()
    return [(registry.materialise(address) / "adapter_model.safetensors").read_bytes() for address in addresses]


@installed
@pytest.mark.parametrize("how", ["stack", "average"])
def test_it_makes_what_this_process_makes_bit_for_bit(recipe: Path, how: str) -> None:
    here = federate(recipe, "--set", f"adapter={how}-here", "--aggregation", how)
    there = federate(recipe, "--set", f"adapter={how}-there", "--aggregation", how, "--runner", "flower")
    assert len(contents(here)) == 8 and contents(here) == contents(there)
    assert not list(get_settings().runs.glob("federate-*"))


@installed
def test_a_client_that_fails_is_left_out_and_told(recipe: Path) -> None:
    arguments = ("--ranks", "4,999,1", "--rounds", "1")
    here = federate(recipe, *arguments, "--set", "adapter=failing-here")
    there = federate(recipe, *arguments, "--set", "adapter=failing-there", "--runner", "flower")
    (made,) = there["rounds"]
    assert made["clients"].keys() == {"0", "2"} and "rank 999" in made["failed"]["1"]
    assert made["failed"] == here["rounds"][0]["failed"] and contents(here) == contents(there)
    refused = run_here("federate", str(recipe), *SMALL, "--ranks", "999", "--runner", "flower")
    assert refused.code == 1 and "0 of 3 clients" in refused.err and "rank 999" in refused.err


LONG = {**TRAINING, "steps": 400, "checkpoint_every": 20}


def at_work(runs: Path, adapter: str, client: int) -> Path:
    """The federation's folder, once a client of its first round has written a checkpoint."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for workdir in runs.glob(f"federate-{adapter}-*"):
            if list(workdir.glob(f"round-1-client-{client}/training/checkpoints/step-*")):
                return workdir
        time.sleep(0.05)
    raise AssertionError("no checkpoint")


def workers(parent: int) -> list[psutil.Process]:
    """Ray's processes that train."""
    found = psutil.Process(parent).children(recursive=True)
    return [each for each in found if "ray::ClientApp" in " ".join(each.cmdline())]


@installed
@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_one_that_was_stopped_goes_on_anywhere_and_nobody_trains_twice(
    write_recipe: WriteRecipe, stop: signal.Signals
) -> None:
    name = f"stopped-{stop.name.lower()}"
    recipe, home = write_recipe(name, training=LONG), get_settings().home
    settings = {"REGRAFT_HOME": str(home), "REGRAFT_RAY": "local:1", "REGRAFT_THREADS": "1"}
    command = ("federate", str(recipe), *SMALL, "--rounds", "1")
    process = started(*command, "--runner", "flower", **settings)
    first = at_work(home / "runs", name, 0)
    while not (first / "round-1-client-0" / "adapter").is_dir():
        assert process.poll() is None
        time.sleep(0.05)
    at_work(home / "runs", name, 1)
    born = workers(process.pid)
    assert born
    os.kill(process.pid, stop)
    assert ended(process).code == (130 if stop is signal.SIGINT else -stop)
    _, alive = psutil.wait_procs(born, timeout=60)
    assert not alive, "no client trains on without its federation"
    assert list((first / "round-1-client-1" / "training" / "checkpoints").glob("step-*"))
    assert not (first / "round-1-client-2").exists()
    process = started(*command, **settings)  # here, this time: what is done is done
    again = ended(process)
    assert again.code == 0, again.err
    whole = federate(recipe, "--rounds", "1", "--set", f"adapter={name}-whole")
    assert contents(json.loads(again.out)) == contents(whole)
    assert len(AdapterRegistry().versions(f"{name}-client-0")) == 1


@installed
@pytest.mark.slow
def test_a_client_whose_process_dies_is_asked_again(write_recipe: WriteRecipe) -> None:
    recipe, home = write_recipe("dying", training=LONG), get_settings().home
    settings = {"REGRAFT_HOME": str(home), "REGRAFT_RAY": "local:1", "REGRAFT_THREADS": "1"}
    command = ("federate", str(recipe), *SMALL, "--rounds", "1")
    process = started(*command, "--runner", "flower", **settings)
    at_work(home / "runs", "dying", 1)
    (worker,) = workers(process.pid)
    worker.kill()
    told = ended(process)
    assert told.code == 0, told.err
    (made,) = json.loads(told.out)["rounds"]
    assert made["failed"] == {} and len(made["clients"]) == 3
    whole = federate(recipe, "--rounds", "1", "--set", "adapter=dying-whole")
    assert contents(json.loads(told.out)) == contents(whole)


def test_where_flower_is_not_installed_it_says_what_to_do(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    monkeypatch.delitem(sys.modules, "training.federation.flower", raising=False)
    refused = run_here("federate", str(recipe), *SMALL, "--set", "adapter=flowerless", "--runner", "flower")
    assert refused.code == 2 and "not installed" in refused.err and "regraft[flower]" in refused.err
    assert not list(get_settings().runs.glob("federate-flowerless-*"))
