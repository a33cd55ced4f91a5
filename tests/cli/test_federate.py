"""`regraft federate`: rounds of clients whose data never meet, each a version with what they handed in as parents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import Interrupted, RegraftError
from infra.settings import get_settings
from registry import AdapterRegistry
from serving.loading import load
from tests.cli.conftest import WriteRecipe, run_here
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

    monkeypatch.setattr("flows.federate.train_recipe", fails)
    told = federate(recipe, "--set", "adapter=shared-less", "--no-evaluate")
    for made in told["rounds"]:
        assert made["failed"] == {"1": "Its disk is full."} and made["clients"].keys() == {"0", "2"}
    refused = run_here("federate", str(recipe), *SMALL, "--set", "adapter=shared-none", "--least", "3")
    assert refused.code == 1 and "2 of 3 clients" in refused.err and "Its disk is full." in refused.err
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
        patched.setattr("flows.federate.train_recipe", stops)
        assert run_here("federate", str(recipe), *SMALL, *arguments).code == 130
    assert len(AdapterRegistry().versions("shared-on")) == 1
    again: list[str] = []

    def counts(chosen: Any, *arguments: Any, **options: Any) -> Any:
        again.append(chosen.adapter)
        return train_recipe(chosen, *arguments, **options)

    monkeypatch.setattr("flows.federate.train_recipe", counts)
    told = federate(recipe, *arguments)
    assert again == ["shared-on-client-1", "shared-on-client-2"]
    assert [made["address"] for made in told["rounds"]] == ["shared-on@1", "shared-on@2"]
    assert len(AdapterRegistry().versions("shared-on-client-0")) == 2


def test_averaging_factors_says_how_far_off_it_is_and_a_rank_is_kept(recipe: Path) -> None:
    told = federate(recipe, "--set", "adapter=shared-mean", "--aggregation", "average", "--no-evaluate", "--rank", "3")
    assert all(made["deviation"] > 1e-3 for made in told["rounds"])
    modules = load(told["address"]).model.modules()
    assert {module.r["default"] for module in modules if hasattr(module, "r")} == {3}


def test_refusals(recipe: Path, write_recipe: WriteRecipe) -> None:
    ia3 = write_recipe("shared-ia3", method="ia3")
    for command, told in {
        (str(ia3),): "method is ia3",
        (str(recipe), "--clients", "99"): "40 examples cannot be parted among 99",
        (str(recipe), "--ranks", "4,x"): "whole numbers above zero",
        (str(recipe), "--skew", "0"): "skew",
        (str(recipe), "--aggregation", "sum"): "aggregation",
    }.items():
        refused = run_here("federate", *command)
        assert refused.code == 2 and told in " ".join(refused.err.split()), refused
