"""`regraft compress`: the smallest form within the allowed loss becomes a version that loads as any other."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from flows.compress_adapter import WALK, WALK_OF_LORAS
from infra.settings import get_settings
from registry import AdapterRegistry
from serving.loading import load
from tests.cli.conftest import WriteRecipe, run_here
from tests.cli.test_lifecycle import clean
from training.base_models import load_base
from training.methods.contract import TENSORS_FILE

pytestmark = pytest.mark.services

NOTHING = "compeft:density=0.0001"  # keeps no number of so few
PERPLEXITY = [{"metric": "perplexity", "samples": 24}]
TRAINING = {"steps": 40, "batch_size": 8, "learning_rate": 0.01, "max_length": 512}


@pytest.fixture(scope="module")
def source(regraft_home: Path, write_recipe: WriteRecipe) -> str:
    """A version that has learnt something, so that there is something to lose."""
    get_settings.cache_clear()
    recipe = write_recipe("pressed", evaluation=PERPLEXITY, training=TRAINING)
    address: str = json.loads(clean(run_here("train", str(recipe), "--no-kit", "--json")))["address"]
    return address


def logits(address: str) -> torch.Tensor:
    loaded = load(address)
    with torch.no_grad():
        found: torch.Tensor = loaded.model(input_ids=torch.arange(3, 40)[None]).logits
    return found


def compress(*arguments: str, code: int = 0) -> dict[str, Any]:
    told = run_here("compress", *arguments, "--json")
    assert told.code == code, told.err
    found: dict[str, Any] = json.loads(told.out)
    return found


def test_the_smallest_form_within_the_allowed_loss_is_registered_with_its_parent(source: str) -> None:
    found = compress(
        source,
        "--codec",
        "groups:bits=8",
        "--codec",
        "groups:bits=4",
        "--codec",
        NOTHING,
        "--max-loss",
        "0.2",
    )
    sizes = {form["steps"]: form["size_bytes"] for form in found["forms"]}
    passed = [form["steps"] for form in found["forms"] if form["passed"]]
    assert f"{NOTHING},alpha=0.5" not in passed and found["steps"] == min(passed, key=lambda line: sizes[line])
    assert found["size_bytes"] < found["source_bytes"]
    version = AdapterRegistry().get(found["address"])
    (edge,) = AdapterRegistry().lineage(version.address).edges
    assert (edge.parent, edge.relation, edge.details["steps"]) == (source, "compressed_from", found["steps"])
    assert (
        version.method == "lora" and version.trainable_parameters == AdapterRegistry().get(source).trainable_parameters
    )
    (suite,) = found["measured"]
    assert suite["child"]["value"] == AdapterRegistry().evaluations(version.address)[0].value


@pytest.mark.slow
def test_the_default_walk_goes_over_all_its_forms(source: str) -> None:
    found = compress(source, "--max-loss", "0.05")
    tried = [form["steps"].partition(",alpha=")[0] for form in found["forms"]]
    assert sorted(tried) == sorted([*WALK, *WALK_OF_LORAS])
    assert found["steps"] == min((f for f in found["forms"] if f["passed"]), key=lambda f: f["size_bytes"])["steps"]
    front = [form["values"][0] for form in found["forms"] if form["on_front"]]  # of perplexity, smallest file first
    assert front == sorted(front, reverse=True)


def test_a_compressed_version_answers_almost_as_before(source: str) -> None:
    found = compress(source, "--codec", "groups:bits=8", "--max-loss", "1")
    torch.testing.assert_close(logits(found["address"]), logits(source), atol=0.05, rtol=0.05)
    assert not torch.equal(logits(found["address"]), logits(source))


def test_stock_peft_refuses_the_files_and_reads_the_export(source: str, tmp_path: Path) -> None:
    found = compress(source, "--codec", "codebook:bits=4", "--max-loss", "1")
    base = load_base(load(source).version.base.reference, cache=get_settings().base_models).model
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(base, AdapterRegistry().materialise(found["address"]))
    clean(run_here("export", found["address"], str(tmp_path / "plain")))
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "plain").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=torch.arange(3, 40)[None]).logits, logits(found["address"]))


def test_a_lower_rank_comes_first_where_that_is_asked_for(source: str) -> None:
    found = compress(source, "--codec", "low_rank:rank=2+groups:bits=8", "--max-loss", "1")
    ranks = {len(t) for name, t in load(found["address"]).adapted.tensors().items() if "lora_A" in name}
    assert ranks == {2}


def test_where_no_form_is_good_enough_nothing_is_registered(source: str) -> None:
    name = source.partition("@")[0]
    before = len(AdapterRegistry().versions(name))
    found = compress(source, "--codec", NOTHING, "--max-loss", "0", code=7)
    assert found["address"] is None and found["passed"] is None
    assert len(AdapterRegistry().versions(name)) == before
    told = run_here("compress", source, "--codec", NOTHING, "--max-loss", "0")
    assert told.code == 7 and "no form is within the allowed loss; nothing was registered" in " ".join(told.out.split())


def test_what_would_be_no_smaller_is_not_registered(source: str) -> None:
    small = compress(source, "--codec", "groups:bits=4", "--max-loss", "1")["address"]
    name = source.partition("@")[0]
    before = len(AdapterRegistry().versions(name))
    for line in ("groups:bits=4", "groups:bits=8"):  # the same once more, and a larger one
        found = compress(small, "--codec", line, "--max-loss", "1", code=7)
        (form,) = found["forms"]
        assert form["passed"] and form["size_bytes"] >= found["source_bytes"]
        assert found["address"] is None and found["size_bytes"] is None
    told = run_here("compress", small, "--codec", "groups:bits=8", "--max-loss", "1")
    assert told.code == 7 and "nothing to gain" in told.out and "✓" not in told.out
    assert len(AdapterRegistry().versions(name)) == before


def test_sizes_are_of_the_files_of_tensors(source: str) -> None:
    found = compress(source, "--codec", "groups:bits=8", "--max-loss", "1")
    sizes = [
        (AdapterRegistry().materialise(address) / TENSORS_FILE).stat().st_size for address in (source, found["address"])
    ]
    assert (
        sizes
        == [found["source_bytes"], found["size_bytes"]]
        == [found["source_bytes"], found["forms"][0]["size_bytes"]]
    )


@pytest.mark.parametrize("stopped_in", ["cli.session.connect_flows", "flows.compress_adapter.stored_adapter"])
def test_ctrl_c_says_that_the_same_command_goes_on(
    stopped_in: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped_in, stops)
    stopped = run_here("compress", source)
    assert stopped.code == 130 and "The compression was stopped; what is done is kept." in stopped.err


def test_ctrl_c_while_it_is_measured_says_what_is_registered(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.compress_adapter.measured", stops)
    stopped = run_here("compress", source, "--codec", "groups:bits=8", "--max-loss", "1", "--as", "pressed-halted")
    assert stopped.code == 130 and "Stopped after pressed-halted@1 was registered." in stopped.err


@pytest.mark.parametrize("method", ["ia3", "full", "composable-sft", "hydra", "dora"])
def test_every_kind_of_adapter_can_be_compressed(method: str, write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(f"pressed-{method}", method=method)
    address = json.loads(clean(run_here("train", str(recipe), "--no-kit", "--no-evaluate", "--json")))["address"]
    for line in ("compeft:density=1,alpha=1", "groups:bits=8"):
        found = compress(address, "--codec", line, "--max-loss", "1", "--samples", "8", "--as", f"small-{method}")
        assert logits(found["address"]).isfinite().all()
    torch.testing.assert_close(logits(found["address"]), logits(address), atol=0.1, rtol=0.1)


def test_a_rank_is_cut_of_plain_loras_alone(write_recipe: WriteRecipe) -> None:
    for method in ("paca", "dora"):
        recipe = write_recipe(f"uncut-{method}", method=method)
        address = json.loads(clean(run_here("train", str(recipe), "--no-kit", "--no-evaluate", "--json")))["address"]
        refused = run_here("compress", address, "--codec", "groups:bits=4", "--codec", "low_rank:rank=1+groups:bits=8")
        told = " ".join(refused.err.split())
        assert refused.code == 2 and f"{address} is no plain LoRA" in told and "--codec groups:bits=8" in told
        assert not AdapterRegistry().evaluations(address)


def test_refusals_come_before_any_work(source: str) -> None:
    for codec, told in {
        "grups:bits=4": "Did you mean 'groups'",
        "groups:bits=3": "give 2, 4 or 8",
        "compeft:density=2": "Forms: compeft:density=0.1",
        "compeft:density=0": "greater than 0",
        "nope": "codebook:bits=2",
        "low_rank:rank=4": "makes no bytes",
    }.items():
        refused = run_here("compress", source, "--codec", codec)
        assert refused.code == 2 and told in refused.err
    assert run_here("compress", "pressed@99").code == 3
