"""`regraft merge`: versions of one base become one, all of them its parents; what does not fit together is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infra.settings import get_settings
from registry import AdapterRegistry
from serving.loading import load
from tests.cli.conftest import WriteRecipe, run_here
from tests.cli.test_lifecycle import clean
from tests.tiny_models import own_seed, save_tiny_gemma, save_tiny_llama
from training.adapter_files import attach_stored
from training.base_models import load_base

pytestmark = pytest.mark.services
PERPLEXITY = [{"metric": "perplexity"}]


@pytest.fixture(scope="module")
def versions(regraft_home: Path, write_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three versions on one Llama, of two adapters and two ranks."""
    get_settings.cache_clear()
    bases = tmp_path_factory.mktemp("bases")
    llama = save_tiny_llama(bases / "llama", seed=own_seed(__name__))
    clean(run_here("base", "add", f"path:{llama}", "--name", "merge-llama"))
    found = []
    for name, seed, rank in (("merge-a", 0, 4), ("merge-a", 1, 4), ("merge-b", 2, 2)):
        recipe = write_recipe(name, base="merge-llama", seed=seed, method={"name": "lora", "rank": rank})
        found.append(
            json.loads(clean(run_here("train", str(recipe), "--no-kit", "--no-evaluate", "--json")))["address"]
        )
    return found


def update(address: str) -> dict[str, torch.Tensor]:
    """ΔW of every layer, by stock peft's own reckoning."""
    adapted = load(address).adapted
    changes = {}
    for name, module in adapted.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            changes[name] = module.get_delta_weight(module.active_adapters[0]).detach()
    return changes


def test_linear_adds_the_updates_exactly_and_has_all_as_parents(versions: list[str]) -> None:
    a, _, b = versions
    told = json.loads(clean(run_here("merge", a, b, "--as", "both", "--weight", "0.5", "--weight", "-2", "--json")))
    merged, of_a, of_b = update(told["address"]), update(a), update(b)
    assert merged.keys() == of_a.keys() == of_b.keys()
    for place, change in merged.items():
        torch.testing.assert_close(change, 0.5 * of_a[place] - 2 * of_b[place], atol=1e-6, rtol=1e-4)
    edges = {edge.parent: edge for edge in AdapterRegistry().lineage(told["address"]).edges}
    assert edges.keys() == {a, b} and {edge.relation for edge in edges.values()} == {"merged_from"}
    assert [edges[address].details["coefficient"] for address in (a, b)] == [0.5, -2]
    (suite,) = told["measured"]
    assert (
        len(suite["parents"]) == 2
        and AdapterRegistry().evaluations(told["address"])[0].value == suite["child"]["value"]
    )


def test_the_export_of_a_merged_version_loads_in_stock_peft(versions: list[str], tmp_path: Path) -> None:
    import peft

    a, _, b = versions
    told = json.loads(clean(run_here("merge", a, b, "--as", "both", "--no-evaluate", "--json")))
    clean(run_here("export", told["address"], str(tmp_path / "merged")))
    loaded = load(told["address"])
    base = load_base(loaded.version.base.reference, cache=get_settings().base_models)
    stock = peft.PeftModel.from_pretrained(base.model, tmp_path / "merged").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids).logits, loaded.model(input_ids=ids).logits)


def test_a_lower_rank_says_what_it_loses(versions: list[str]) -> None:
    a, other, _ = versions
    told = json.loads(clean(run_here("merge", a, other, "--rank", "3", "--no-evaluate", "--json")))
    assert told["address"].startswith("merge-a@") and told["deviation"] > 0
    directory = AdapterRegistry().materialise(told["address"])
    ranks = {len(t) for name, t in load_file(directory / "adapter_model.safetensors").items() if "lora_A" in name}
    assert ranks == {3}
    assert "% off" in clean(run_here("merge", a, other, "--rank", "3", "--no-evaluate"))


def test_a_greedy_soup_is_no_worse_on_what_chose_it(versions: list[str]) -> None:
    told = json.loads(clean(run_here("merge", *versions, "--as", "soup", "--greedy", "--json")))
    taken = [each["score"] for each in told["tasted"] if each["taken"]]
    assert len(told["tasted"]) == 5  # three alone, two means
    assert taken[-1] >= max(each["score"] for each in told["tasted"] if len(each["ingredients"]) == 1)
    parents = {edge.parent for edge in AdapterRegistry().lineage(told["address"]).edges}
    assert set(told["of"]) <= parents


@pytest.fixture(scope="module")
def of_files(versions: list[str], write_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three versions on that Llama, trained on files: two of one adapter whose file has changed between them."""
    found = []
    for name, told in (("merge-f", "a"), ("merge-f", "b"), ("merge-h", "c")):
        file = tmp_path_factory.mktemp("data") / "rows.jsonl"
        rows = [{"prompt": f"{told} {number}", "completion": told} for number in range(60)]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        recipe = write_recipe(name, base="merge-llama", data={"file": str(file)}, evaluation=PERPLEXITY)
        trained = json.loads(clean(run_here("train", str(recipe), "--no-kit", "--json")))
        found.append(trained["address"])
    return found


def test_each_is_measured_on_the_data_of_every_one_in_whatever_order(of_files: list[str]) -> None:
    for addresses in (of_files, of_files[::-1]):
        told = json.loads(clean(run_here("merge", *addresses, "--as", "files", "--json")))
        later = of_files[1] if addresses == of_files else of_files[0]
        suites = {each["suite"] for each in told["measured"]}
        assert suites == {"merge-f/test", "merge-h/test", f"merge-f/test ({later})"}
        assert all(len(each["parents"]) == 3 for each in told["measured"])
        fingerprints = {e.dataset_fingerprint for e in AdapterRegistry().evaluations(told["address"])}
        assert len(fingerprints) == 3


def test_the_same_data_are_measured_once_and_what_is_gone_is_told_before_any_work(
    of_files: list[str], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "d {number}", "completion": "d"}}\n' for number in range(60)))
    both = [*PERPLEXITY, {"metric": "exact_match", "max_new_tokens": 2}]
    same = [
        json.loads(clean(run_here("train", str(recipe), "--no-kit", "--no-evaluate", "--json")))["address"]
        for recipe in (
            write_recipe("merge-i", base="merge-llama", seed=seed, data={"file": str(file)}, evaluation=both)
            for seed in (0, 1)
        )
    ]
    told = json.loads(clean(run_here("merge", *same, "--json")))
    assert [(each["suite"], each["metric"]) for each in told["measured"]] == [
        ("merge-i/test", "perplexity"),
        ("merge-i/test", "exact_match"),
    ]
    file.unlink()
    before = len(AdapterRegistry().versions("merge-i"))
    refused = run_here("merge", of_files[0], same[0], "--as", "merge-i")
    assert refused.code == 3 and f"{same[0]} was to be measured on its own data" in " ".join(refused.err.split())
    assert "--task NAME" in refused.err and len(AdapterRegistry().versions("merge-i")) == before


def test_a_greedy_soup_is_chosen_by_the_data_of_every_one_in_whatever_order(of_files: list[str]) -> None:
    scores = []
    for addresses in (of_files, of_files[::-1]):
        told = json.loads(clean(run_here("merge", *addresses, "--as", "soup", "--greedy", "--no-evaluate", "--json")))
        scores.append({each["ingredients"][0]: each["score"] for each in told["tasted"][:3]})
    assert scores[0] == pytest.approx(scores[1]) and scores[0].keys() == set(of_files)
    assert len(set(scores[0].values())) == 3, "of perplexity no two are equal"


@pytest.mark.parametrize(
    ("stopped_in", "told"),
    [
        ("cli.session.connect_flows", "The merge was stopped; nothing was registered."),
        ("flows.merge_adapters.stored_adapter", "The merge was stopped; nothing was registered."),
        ("flows.merge_adapters.measured", "Stopped after halted@1 was registered."),
    ],
)
def test_ctrl_c_says_what_there_is(
    stopped_in: str, told: str, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped_in, stops)
    stopped = run_here("merge", *versions, "--as", "halted")
    assert stopped.code == 130 and told in stopped.err
    assert AdapterRegistry().has_adapter("halted") == ("halted@1" in told)


def test_a_merged_version_attaches_as_any_other_and_cannot_be_trained_by_its_recipe(versions: list[str]) -> None:
    told = json.loads(clean(run_here("merge", *versions, "--as", "all", "--method", "ties", "--no-evaluate", "--json")))
    loaded = load(told["address"])
    directory = AdapterRegistry().materialise(told["address"])
    base = load_base(loaded.version.base.reference, cache=get_settings().base_models)
    again = attach_stored(base.model, directory, base_identity=base.identity.sha256)
    assert all(torch.equal(t, loaded.adapted.tensors()[name]) for name, t in again.tensors().items())
    refused = run_here("train", told["address"])
    assert refused.code == 2 and "without a training that could be repeated" in refused.err


def test_refusals_come_before_any_work_and_register_nothing(
    versions: list[str], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    a, other, b = versions
    gemma = save_tiny_gemma(tmp_path / "gemma", seed=own_seed(__name__))
    clean(run_here("base", "add", f"path:{gemma}", "--name", "merge-gemma"))
    recipe = write_recipe("merge-g", base="merge-gemma", training={"steps": 1, "batch_size": 1, "max_length": 512})
    gemma = json.loads(clean(run_here("train", str(recipe), "--no-kit", "--no-evaluate", "--json")))["address"]
    before = {summary.name: len(AdapterRegistry().versions(summary.name)) for summary in AdapterRegistry().adapters()}
    refusals = {
        ("merge", a, gemma, "--as", "x"): "regraft migrate",
        ("merge", a): "two versions or more",
        ("merge", a, a): "given twice",
        ("merge", a, b): "--as NAME",
        ("merge", a, "merge-a@99"): "merge-a@99",
        ("merge", a, other, "--method", "tis"): "ties",
        ("merge", a, other, "--weight", "1"): "1 weights are given for 2",
        ("merge", a, other, "--set", "densty=1", "--method", "ties"): "density",
        ("merge", a, other, "--set", "density=2", "--method", "ties"): "See: regraft methods merging",
        ("merge", a, other, "--weight", "nan", "--weight", "1"): "weights",
        ("merge", a, other, "--method", "ties", "--greedy"): "soup",
        ("merge", a, other, "--greedy", "--weight", "1", "--weight", "2"): "uniform",
        ("merge", a, other, "--promote", "production", "--no-evaluate"): "not measured",
        ("merge", a, other, b, "--as", "x", "--method", "slerp", "--no-evaluate"): "two adapters",
        ("merge", a, other, "--as", "../x"): "../x",
    }
    for command, told in refusals.items():
        refused = run_here(*command)
        assert refused.code not in (0, 70), command
        assert told in " ".join(refused.err.split()), (command, refused.err)
    after = {summary.name: len(AdapterRegistry().versions(summary.name)) for summary in AdapterRegistry().adapters()}
    assert after == before
