"""`regraft federate`: rounds of clients whose data never meet, each a version with what they handed in as parents."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.derived import register_made
from infra.errors import Interrupted, RegraftError
from infra.settings import get_settings
from registry import AdapterRegistry
from serving.loading import load
from tests.cli.conftest import TRAINING, WriteRecipe, ended, run_here, started
from tests.cli.test_lifecycle import clean
from tests.cli.test_merge import update
from training.trainer import train_recipe

pytestmark = pytest.mark.services

SMALL = ("--clients", "3", "--rounds", "2", "--ranks", "4,2,1", "--json")


@pytest.fixture(scope="module")
def recipe(regraft_home: Path, write_recipe: WriteRecipe) -> Path:
    get_settings.cache_clear()
    return write_recipe("shared")


def federate(recipe: Path, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(clean(run_here("federate", str(recipe), *SMALL, *arguments)))
    return found


def test_each_round_is_the_exact_mean_of_what_was_handed_in(recipe: Path) -> None:
    told = federate(recipe)
    registry = AdapterRegistry()
    assert sum(told["examples"]) == 40 and len(told["rounds"]) == 2
    before: dict[str, torch.Tensor] | None = None
    for made in told["rounds"]:
        edges = [edge for edge in registry.lineage(made["address"]).edges if edge.child == made["address"]]
        shares = {edge.parent: edge.details["share"] for edge in edges if edge.relation == "federated_from"}
        assert shares.keys() == set(made["clients"].values()) and sum(shares.values()) == pytest.approx(1)
        whole = update(made["address"])
        handed_in = {address: update(address) for address in shares}
        for place, change in whole.items():
            mean = sum(share * handed_in[address][place] for address, share in shares.items())
            torch.testing.assert_close(change, mean, atol=1e-6, rtol=1e-4)
        assert before is None or any(not torch.equal(before[place], change) for place, change in whole.items())
        before = whole
    modules = load(told["address"]).model.modules()
    assert {module.r["default"] for module in modules if hasattr(module, "r")} == {14}, "4 + 2 + 1, twice"
    assert told["measured"].keys() == {made["address"] for made in told["rounds"]}
    assert not list(get_settings().runs.glob("federate-*"))
    assert registry.fsck() == []
    for client, examples in enumerate(told["examples"]):
        trained_on = [version.dataset for version in registry.versions(f"shared-client-{client}")]
        assert all(data and (data.name, data.rows) == ("boolean_expressions", examples) for data in trained_on)
        shown = clean(run_here("adapters", "show", f"shared-client-{client}", width=200))
        assert "boolean_expressions" in shown and "imported files" not in shown


def test_a_client_trains_on_the_base_with_the_global_adapter_in_it(recipe: Path) -> None:
    """What it hands in is measured from there: its version is the global adapter and its own update."""
    told = federate(recipe, "--set", "adapter=shared-two", "--no-evaluate")
    first, second = told["rounds"]
    for address in second["clients"].values():
        (edge,) = [edge for edge in AdapterRegistry().lineage(address).edges if edge.child == address]
        assert (edge.parent, edge.relation) == (first["address"], "trained_from")


def test_a_client_that_fails_is_left_out_and_told(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(chosen: Any, *arguments: Any, **options: Any) -> Any:
        if chosen.adapter.endswith("client-1"):
            raise RegraftError("Its disk is full.")
        return train_recipe(chosen, *arguments, **options)

    monkeypatch.setattr("training.federation.client.train_recipe", fails)
    told = federate(recipe, "--set", "adapter=shared-less", "--no-evaluate")
    for made in told["rounds"]:
        assert made["failed"] == {"1": "Its disk is full."} and made["clients"].keys() == {"0", "2"}
    refused = run_here("federate", str(recipe), *SMALL, "--set", "adapter=shared-none", "--least", "3")
    assert refused.code == 1 and "2 of 3 clients came through round 1" in " ".join(refused.err.split())
    assert "client 1: Its disk is full." in " ".join(refused.err.split())
    assert not AdapterRegistry().has_adapter("shared-none")


def test_one_that_was_stopped_goes_on_and_nobody_trains_twice(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, int]] = []

    def stops(chosen: Any, *arguments: Any, **options: Any) -> Any:
        if len(trained) == 4:
            raise Interrupted("Stopped.", "Again.")
        trained.append((chosen.adapter, chosen.seed))
        return train_recipe(chosen, *arguments, **options)

    arguments = ("--set", "adapter=shared-on", "--no-evaluate")
    with monkeypatch.context() as patched:
        patched.setattr("training.federation.client.train_recipe", stops)
        assert run_here("federate", str(recipe), *SMALL, *arguments).code == 130
    assert len(AdapterRegistry().versions("shared-on")) == 1
    again: list[str] = []

    def counts(chosen: Any, *arguments: Any, **options: Any) -> Any:
        again.append(chosen.adapter)
        return train_recipe(chosen, *arguments, **options)

    monkeypatch.setattr("training.federation.client.train_recipe", counts)
    told = federate(recipe, *arguments)
    assert again == ["shared-on-client-1", "shared-on-client-2"]
    assert [made["address"] for made in told["rounds"]] == ["shared-on@1", "shared-on@2"]
    assert len(AdapterRegistry().versions("shared-on-client-0")) == 2


def test_whatever_goes_wrong_with_a_client_stops_nobody_else_and_all_is_too_many(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {"client-0", "client-1"}

    def fails(chosen: Any, *arguments: Any, **options: Any) -> Any:
        if chosen.adapter[-8:] in failing:
            raise ValueError("bad luck")
        return train_recipe(chosen, *arguments, **options)

    monkeypatch.setattr("training.federation.client.train_recipe", fails)
    told = federate(recipe, "--set", "adapter=shared-luck", "--no-evaluate")
    for made in told["rounds"]:
        assert made["failed"] == {str(client): "ValueError: bad luck" for client in (0, 1)}
        assert made["clients"].keys() == {"2"}
    failing.add("client-2")
    refused = run_here("federate", str(recipe), *SMALL, "--set", "adapter=shared-nobody")
    assert refused.code == 1 and "0 of 3 clients came through round 1" in refused.err
    failing.clear()
    told = federate(recipe, "--set", "adapter=shared-nobody", "--no-evaluate")
    assert [made["failed"] for made in told["rounds"]] == [{}, {}], "what was mended is tried again"


@pytest.mark.slow
def test_a_stop_between_making_a_version_and_noting_it_makes_no_second_one(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill there would."""
    arguments = ("--set", "adapter=shared-gap", "--no-evaluate")
    for name in ("shared-gap-client-1", "shared-gap"):

        def stops(made: str, *arguments: Any, name: str = name) -> Any:
            version = register_made(made, *arguments)
            if made == name:
                raise Interrupted("Stopped.", "Again.")
            return version

        with monkeypatch.context() as patched:
            patched.setattr("flows.federate.register_made", stops)
            assert run_here("federate", str(recipe), *SMALL, *arguments).code == 130
        assert len(AdapterRegistry().versions(name)) == 1
    told = federate(recipe, *arguments)
    for name in ("shared-gap", *(f"shared-gap-client-{client}" for client in range(3))):
        assert [version.number for version in AdapterRegistry().versions(name)] in ([1, 2], [2, 1])
    assert told["rounds"][0]["clients"]["1"] == "shared-gap-client-1@1"
    told = federate(recipe, *arguments)
    assert told["address"] == "shared-gap@4", "a federation that is over is not gone on with"


@pytest.mark.slow
def test_one_that_was_killed_goes_on(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe("shared-killed", training={**TRAINING, "steps": 100, "checkpoint_every": 10})
    command = ("federate", str(recipe), *SMALL, "--rounds", "1", "--no-evaluate")
    process = started(*command, REGRAFT_HOME=str(get_settings().home))
    runs, deadline = get_settings().runs, time.monotonic() + 200
    while not list(runs.glob("federate-shared-killed-*/round-1-client-1/training/checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    assert ended(process).code == -signal.SIGKILL
    (done,) = runs.glob("federate-shared-killed-*/round-*/adapter")
    assert done.parent.name == "round-1-client-0"
    told = json.loads(clean(run_here(*command)))
    whole = federate(recipe, "--rounds", "1", "--no-evaluate", "--set", "adapter=shared-unkilled")
    made, unbroken = ({**each["rounds"][0]["clients"], "all": each["address"]} for each in (told, whole))
    for client, address in made.items():
        for place, change in update(address).items():
            assert torch.equal(change, update(unbroken[client])[place])
    assert not list(runs.glob("federate-shared-killed-*"))


def test_averaging_factors_says_how_far_off_it_is_and_a_rank_is_kept(recipe: Path) -> None:
    told = federate(recipe, "--set", "adapter=shared-mean", "--aggregation", "average", "--no-evaluate", "--rank", "3")
    assert all(made["deviation"] > 1e-3 for made in told["rounds"])
    modules = load(told["address"]).model.modules()
    assert {module.r["default"] for module in modules if hasattr(module, "r")} == {3}


def test_ctrl_c_before_anything_is_done_says_the_same(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.session.connect_flows", stops)
    stopped = run_here("federate", str(recipe), *SMALL)
    assert stopped.code == 130 and "The federation was stopped; what is done is kept." in stopped.err


def test_refusals(recipe: Path, write_recipe: WriteRecipe) -> None:
    ia3 = write_recipe("shared-ia3", method="ia3")
    for command, told in {
        (str(ia3),): "method is ia3",
        (str(recipe), "--set", "training.processes=2"): "a client trains in one process",
        (str(recipe), "--set", f"adapter={'a' * 60}"): "cannot be a name",
        (str(recipe), "--clients", "0"): "clients",
        (
            str(recipe),
            "--clients",
            "2",
            "--ranks",
            "4,2,1",
        ): "3 ranks are given for 2 clients: give one for each at most → See: regraft federate --help",
        (str(recipe), "--clients", "3"): "A client's rank is 64; the largest that any of the layers can take is 32. → "
        "Give lower ones, e.g. --ranks 32,32,16",
        (str(recipe), "--least", "11"): "least is 11, but there are 10 clients",
        (str(recipe), "--runner", "ray"): "runner: give 'process' or 'flower'",
        (str(recipe), "--clients", "99"): "40 examples cannot be parted among 99",
        (str(recipe), "--ranks", "4,x"): "whole numbers above zero",
        (str(recipe), "--skew", "0"): "skew",
        (str(recipe), "--skew", "-1"): "skew",
        (str(recipe), "--skew", "nan"): "skew",
        (str(recipe), "--aggregation", "sum"): "aggregation",
    }.items():
        refused = run_here("federate", *command)
        assert refused.code == 2 and told in " ".join(refused.err.split()), refused
