"""One adapter through the command line: trained once, then listed, judged, promoted, used, exported, damaged."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.settings import get_settings
from registry import AdapterRegistry
from tests.cli.conftest import Told, WriteRecipe, run_here
from tests.tiny_models import own_seed, save_tiny_llama

pytestmark = pytest.mark.services

_LENIENT = "suites: [{suite: boolean_expressions/test, minimum: 0.0, max_regression: 1.0}]\n"
_STRICT = "suites: [{suite: boolean_expressions/test, minimum: 0.99}]\n"
ADAPTER = "walked"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that no other test registers under a name of its own."""
    return save_tiny_llama(tmp_path_factory.mktemp("walked"), seed=own_seed(__name__))


@pytest.fixture(scope="module")
def recipe(write_recipe: WriteRecipe, base: Path) -> Path:
    return write_recipe(ADAPTER, base=f"path:{base}")


@pytest.fixture(scope="module")
def trained(regraft_home: Path, recipe: Path, base: Path) -> dict[str, Any]:
    """What `regraft train --json` printed; the base model is registered as `walked-base`."""
    get_settings.cache_clear()
    assert run_here("base", "add", f"path:{base}", "--name", "walked-base").code == 0
    result = run_here("train", str(recipe), "--json")
    assert (result.code, result.err) == (0, "")
    version: dict[str, Any] = json.loads(result.out)
    return version


@pytest.fixture
def policy(tmp_path: Path) -> dict[str, str]:
    for name, text in (("lenient", _LENIENT), ("strict", _STRICT)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return {name: str(tmp_path / f"{name}.yaml") for name in ("lenient", "strict")}


@pytest.fixture
def exported(trained: dict[str, Any], tmp_path: Path) -> Path:
    assert run_here("export", trained["address"], str(tmp_path / "peft")).code == 0
    return tmp_path / "peft"


def clean(result: Told) -> str:
    """The output of a command that succeeded and said nothing on standard error."""
    assert (result.code, result.err) == (0, "")
    return result.out


def test_training_tells_what_was_made(trained: dict[str, Any]) -> None:
    assert trained["address"] == f"{ADAPTER}@1"
    assert trained["steps"] == 4
    assert [e["samples"] for e in trained["evaluations"]] == [24]
    assert AdapterRegistry().get(f"{ADAPTER}@1").artifact_sha256 == trained["artifact_sha256"]


@pytest.mark.parametrize("width", [80, 120])
def test_what_is_listed_is_readable_on_a_narrow_terminal(trained: dict[str, Any], width: int) -> None:
    listing = clean(run_here("adapters", "list", width=width))
    line = next(line for line in listing.splitlines() if line.startswith(f"{ADAPTER} "))
    assert "walked-base" in line
    assert " lora " in line
    shown = clean(run_here("adapters", "show", ADAPTER, width=width))
    assert "Truth [of expressions]" in shown
    versions, numbers = (line for line in shown.splitlines() if line.startswith("@1"))
    assert "walked-base" in versions
    value = 100 * trained["evaluations"][0]["value"]
    assert f"{value:.1f} %" in numbers
    assert "boolean_expressions/test" in numbers
    for out in (listing, shown, clean(run_here("base", "list", width=width))):
        assert max(map(len, out.splitlines())) <= width


def test_one_version_shows_its_hash_and_its_run_whole(trained: dict[str, Any]) -> None:
    shown = clean(run_here("adapters", "show", f"{ADAPTER}@1"))
    assert trained["artifact_sha256"] in shown
    assert trained["mlflow_run_id"] in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ("adapters", "list"),
        ("adapters", "show", ADAPTER),
        ("adapters", "show", f"{ADAPTER}@1"),
        ("adapters", "history", ADAPTER),
        ("base", "list"),
        ("lineage", f"{ADAPTER}@1"),
        ("methods", "list"),
        ("methods", "show", "lora"),
        ("tasks", "list"),
        ("tasks", "sample", "navigate"),
        ("schedule", "list"),
        ("status",),
        ("generate", ADAPTER, "not ( True ) is", "--max-new-tokens", "2"),
    ],
    ids=" ".join,
)
def test_json_on_standard_output_is_json_and_nothing_else(trained: dict[str, Any], arguments: tuple[str, ...]) -> None:
    assert json.loads(clean(run_here(*arguments, "--json"))) is not None


def test_a_methods_options_are_shown_with_what_they_may_be() -> None:
    options = json.loads(clean(run_here("methods", "show", "s2ft", "--json")))["options"]
    assert options["choose"]["values"] == "smallest, largest"
    assert options["output"]["values"] == "≥ 0, ≤ 1"
    assert options["calibration_batches"]["values"] == "integer ≥ 1"
    shown = clean(run_here("methods", "show", "s2ft"))
    assert "by some options" in shown
    shown = clean(run_here("methods", "show", "llm-adapters"))
    assert "number or learned" in " ".join(shown.split())
    assert "null" in shown and "None" not in shown and "()" not in shown


def test_a_family_that_is_none_leads_to_those_that_are() -> None:
    refused = run_here("methods", "list", "--family", "aditive")
    assert refused.code == 3
    assert "Families: additive, full fine-tuning, reparameterised, selective." in " ".join(refused.err.split())
    assert "parameters: on 100 columns" in " ".join(clean(run_here("methods", "list")).split())
    assert "parameters: on 100" not in clean(run_here("methods", "list", width=120))


def test_searching_narrows_the_listing(trained: dict[str, Any]) -> None:
    def names(*options: str) -> list[str]:
        return [found["name"] for found in json.loads(clean(run_here("adapters", "list", "--json", *options)))]

    assert ADAPTER in names("--search", "TRUTH", "--task", "boolean_expressions", "--base", "walked-base")
    assert ADAPTER not in names("--search", "no such thing")
    assert ADAPTER not in names("--task", "navigate")
    assert "None of them fits." in clean(run_here("adapters", "list", "--base", "nobody"))


def test_the_lineage_is_drawn_in_three_ways(trained: dict[str, Any]) -> None:
    assert f"{ADAPTER}@1  lora on walked-base" in clean(run_here("lineage", f"{ADAPTER}@1"))
    assert clean(run_here("lineage", f"{ADAPTER}@1", "--format", "mermaid")).startswith("graph TD")
    assert json.loads(clean(run_here("lineage", f"{ADAPTER}@1", "-f", "json")))["subject"] == f"{ADAPTER}@1"


def test_the_stored_recipe_trains_the_same_tensors_and_may_be_overridden(trained: dict[str, Any]) -> None:
    again = json.loads(clean(run_here("train", f"{ADAPTER}@1", "--no-evaluate", "--json")))
    registry = AdapterRegistry()
    first, second = (
        (registry.materialise(address) / "adapter_model.safetensors").read_bytes()
        for address in (f"{ADAPTER}@1", again["address"])
    )
    assert first == second
    told = clean(run_here("train", f"{ADAPTER}@1", "--no-evaluate", "--set", "training.steps=2"))
    assert "2 steps" in told
    assert "next: regraft promote walked@" in told


def test_promotion_by_the_gate_by_force_and_back(trained: dict[str, Any], policy: dict[str, str]) -> None:
    def history() -> list[dict[str, Any]]:
        return json.loads(run_here("adapters", "history", ADAPTER, "--json").out)  # type: ignore[no-any-return]

    other = json.loads(run_here("train", f"{ADAPTER}@1", "--no-evaluate", "--set", "seed=3", "--json").out)["address"]
    assert run_here("promote", f"{ADAPTER}@1", "--policy", policy["lenient"]).code == 0
    again = clean(run_here("promote", f"{ADAPTER}@1", "--policy", policy["lenient"]))
    assert f"confirmed  production was and is {ADAPTER}@1" in again

    refused = run_here("promote", other, "--policy", policy["strict"])
    assert (refused.code, refused.err) == (7, "")
    assert "✗" in refused.out
    assert f"production stays with {ADAPTER}@1" in refused.out
    refused_json = run_here("promote", other, "--policy", policy["strict"], "--json")
    assert refused_json.code == 7
    assert json.loads(refused_json.out)["moved"] is False
    assert AdapterRegistry().get(f"{ADAPTER}@production").number == 1

    before = len(history())
    unexplained = run_here("promote", other, "--force", "--policy", policy["strict"])
    assert (unexplained.code, len(history())) == (2, before)
    assert unexplained.err.count("\n") == 2  # what, and what to do: no log of Prefect's, no traceback
    forced = run_here("promote", other, "--force", "--reason", "agreed [with Ada]", "--policy", policy["strict"])
    assert f"forced  production: {ADAPTER}@1 → {other}" in clean(forced)
    assert "agreed [with Ada]" in clean(run_here("adapters", "history", ADAPTER, width=120))

    assert f"production: {other} → {ADAPTER}@1" in clean(run_here("rollback", ADAPTER, "--reason", "worse"))
    assert [line["decision"] for line in history()[:2]] == ["rolled_back", "forced"]
    assert history()[0]["reason"] == "worse"


def test_versions_and_bases_are_measured_on_tasks_with_shots(trained: dict[str, Any]) -> None:
    options = ("--task", "boolean_expressions", "--shots", "1", "--samples", "8", "--json")
    (found,) = json.loads(clean(run_here("evaluate", f"{ADAPTER}@1", *options)))
    assert (found["suite"], found["samples"]) == ("boolean_expressions/test-1shot", 8)
    (bare,) = json.loads(clean(run_here("evaluate", "walked-base", *options)))
    assert bare["subject"] == "walked-base"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("evaluate", "nobody"), 3, "'nobody' is neither an adapter nor a base model."),
        (("evaluate", "walked-base"), 2, "say on which task"),
        (("evaluate", "walked-base", "--task", "navigat"), 3, "Did you mean 'navigate'?"),
        (("evaluate", f"{ADAPTER}@99"), 3, f"There is no version {ADAPTER}@99."),
        (("promote", f"{ADAPTER}@99"), 3, f"There is no version {ADAPTER}@99."),
        (("promote", f"{ADAPTER}@1", "--to", "v3"), 2, "cannot be an alias"),
        (("promote", f"{ADAPTER}@1", "--policy", "nowhere.yaml"), 3, "nowhere.yaml is not there."),
        (("generate", f"{ADAPTER}@prodution", "hello"), 3, f"There is no version {ADAPTER}@prodution."),
        (("adapters", "show", "walkd"), 3, "Did you mean walked?"),
        (("rollback", ADAPTER, "--alias", "challenger"), 3, "challenger"),
    ],
)
def test_an_error_within_a_flow_is_told_once(
    trained: dict[str, Any], arguments: tuple[str, ...], code: int, told: str
) -> None:
    result = run_here(*arguments)
    assert (result.code, result.out) == (code, "")
    assert told in result.err
    assert result.err.count("\n") <= 2


@pytest.mark.parametrize(
    ("sections", "code", "told"),
    [
        ({"adapter": "Bad Name"}, 2, "'Bad Name' cannot be a name."),
        ({"adapter": "../climbs"}, 2, "'../climbs' cannot be a name."),
        ({"base": "path:nowhere"}, 3, "nowhere is not there"),
        ({"base": "walked-bse"}, 3, "Did you mean walked-base?"),
        ({"data": {"file": "nowhere.jsonl"}}, 3, "nowhere.jsonl is not there."),
        ({"data": {"file": "empty-row.jsonl"}}, 2, "empty-row.jsonl line 2: completion is empty."),
        ({"training": {"steps": 1, "max_length": 5}}, 2, "training.max_length allows 5"),
        (
            {"data": {"file": "long-row.jsonl", "fractions": {"validation": 0.0, "test": 0.0}}},
            2,
            "long-row.jsonl line 1 is 3,009 tokens long",
        ),
    ],
)
def test_a_training_that_cannot_succeed_registers_nothing(
    trained: dict[str, Any], write_recipe: WriteRecipe, sections: dict[str, Any], code: int, told: str
) -> None:
    recipe = write_recipe(**{"adapter": "doomed", **sections})
    (recipe.parent / "empty-row.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": " "}\n'
    )
    (recipe.parent / "long-row.jsonl").write_text(json.dumps({"prompt": "a" * 3000, "completion": "b"}) + "\n")
    result = run_here("train", str(recipe))
    assert (result.code, result.out) == (code, "")
    assert told in result.err
    assert result.err.count("\n") == 2
    assert run_here("adapters", "show", "doomed").code == 3
    assert not AdapterRegistry().has_adapter("doomed")


def test_empty_rows_that_are_skipped_are_mentioned(trained: dict[str, Any], write_recipe: WriteRecipe) -> None:
    data = {"file": "rows.jsonl", "on_empty": "skip", "fractions": {"validation": 0.0, "test": 0.2}}
    recipe = write_recipe("skipping", data=data)
    rows = [{"prompt": f"say {n}", "completion": str(n) if n != 3 else ""} for n in range(20)]
    (recipe.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_here("train", str(recipe), "--no-evaluate")
    assert result.code == 0
    assert result.err == "! Skipped 1 empty rows, the first at rows.jsonl line 4\n"


def test_what_is_exported_loads_in_peft_and_imports_again(trained: dict[str, Any], exported: Path, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from serving.loading import load

    bare = AutoModelForCausalLM.from_pretrained(base)
    theirs, ours = PeftModel.from_pretrained(bare, str(exported)).eval(), load(trained["address"]).model
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)

    assert "✓ brought@1  lora on walked-base" in clean(
        run_here("import", str(exported), "brought", "--base", "walked-base", "--task", "boolean_expressions")
    )
    assert AdapterRegistry().get("brought@1").artifact_sha256 == trained["artifact_sha256"]


def test_an_import_without_its_details_knows_its_method(base: Path, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe("sparse", base=f"path:{base}", method={"name": "s2ft", "output": 0.25, "down": 0.2})
    address = json.loads(clean(run_here("train", str(recipe), "--json", "--no-evaluate")))["address"]
    clean(run_here("export", address, str(tmp_path / "sparse")))
    (tmp_path / "sparse" / "regraft.json").unlink()
    told = clean(run_here("import", str(tmp_path / "sparse"), "sparse-again", "--base", "walked-base"))
    assert "s2ft on walked-base" in told


def test_a_merged_export_is_a_plain_model_that_says_the_same(trained: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from serving.loading import load

    assert run_here("export", trained["address"], str(tmp_path / "merged"), "--merged").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("not True is", return_tensors="pt")["input_ids"]
    loaded = load(trained["address"])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, loaded.model(ids).logits)
    both = run_here("export", trained["address"], str(tmp_path / "both"), "--merged", "--as-lora")
    assert both.code == 2 and "two different things" in both.err


def test_export_writes_into_no_folder_that_holds_something(trained: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = run_here("export", trained["address"], str(tmp_path))
    assert result.code not in (0, 70)
    assert result.err.count("✗") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_import_that_must_not_be_trusted_is_refused(
    trained: dict[str, Any], base: Path, exported: Path, tmp_path: Path
) -> None:
    weights = exported / "adapter_model.safetensors"
    whole = weights.read_bytes()

    def refused(*options: str) -> Told:
        result = run_here("import", str(exported), "smuggled", *(options or ("--base", "walked-base")))
        assert result.out == ""
        assert result.err.count("✗") == 1
        assert not AdapterRegistry().has_adapter("smuggled")
        return result

    weights.write_bytes(whole[:-10])
    truncated = refused()
    assert (truncated.code, "adapter_model.safetensors" in truncated.err) == (5, True)

    flipped = bytearray(whole)
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    assert refused().code == 5

    weights.write_bytes(whole)
    (exported / "extra.bin").write_bytes(pickle.dumps({"weight": [1, 2]}))
    pickled = refused()
    assert (pickled.code, "is a pickle" in pickled.err) == (5, True)
    (exported / "extra.bin").unlink()

    other = save_tiny_llama(tmp_path / "other", seed=own_seed(__name__) + 1)
    elsewhere = refused("--base", f"path:{other}")
    assert elsewhere.code == 6
    assert f"was trained on path:{base} (identity " in elsewhere.err
    assert "it cannot be registered for other (identity " in elsewhere.err

    assert run_here("import", str(exported), "../smuggled", "--base", "walked-base").code == 2

    details = (exported / "regraft.json").read_bytes()
    (exported / "regraft.json").write_text("{}")
    damaged = refused()
    assert (damaged.code, "regraft.json cannot be read: method: Field required" in damaged.err) == (5, True)
    (exported / "regraft.json").write_bytes(details)

    (exported / "regraft.json").unlink()  # as stock peft writes it: nothing but the tensors tells the base
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights)
    diverged = refused()
    assert (diverged.code, "has NaN or infinity in it" in diverged.err) == (5, True)
    deeper = save_tiny_llama(tmp_path / "deeper", layers=3)
    misfit = refused("--base", f"path:{deeper}")
    assert (misfit.code, "is registered as walked-base; deeper is another model" in misfit.err) == (6, True)
    config = json.loads((exported / "adapter_config.json").read_text())
    (exported / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    misfit = refused("--base", f"path:{deeper}")
    assert (misfit.code, "is missing" in misfit.err, "Was it trained on this base?" in misfit.err) == (5, True, True)


def test_prompts_come_as_arguments_or_one_a_line_from_a_pipe(trained: dict[str, Any]) -> None:
    options = ("--max-new-tokens", "2", "--json")
    one = json.loads(clean(run_here("generate", f"{ADAPTER}@1", "not ( True ) is", *options)))
    piped = json.loads(clean(run_here("generate", f"{ADAPTER}@1", *options, stdin="not ( True ) is\n\nTrue is\n")))
    assert [answer["prompt"] for answer in piped] == ["not ( True ) is", "True is"]
    assert piped[0] == one[0]


def test_a_version_whose_bytes_changed_is_not_loaded_and_is_mended_from_a_copy(
    trained: dict[str, Any], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    clean(run_here("train", str(write_recipe("fragile", seed=9)), "--no-evaluate"))
    settings, version = get_settings(), AdapterRegistry().get("fragile@1")
    backup = tmp_path / "backup"
    shutil.copytree(settings.artifacts, backup)
    manifest = json.loads((backup / "manifests" / f"{version.artifact_sha256}.json").read_text())
    (weights,) = (f["sha256"] for f in manifest["files"] if f["path"] == "adapter_model.safetensors")
    (stored,) = Path(settings.artifacts).rglob(weights)
    damaged = bytearray(stored.read_bytes())
    damaged[-1] ^= 1
    stored.chmod(0o644)
    stored.write_bytes(damaged)
    shutil.rmtree(settings.home / "adapters", ignore_errors=True)

    result = run_here("generate", "fragile@1", "True is")
    assert (result.code, result.out) == (5, "")
    assert "fragile@1 fails its checksum" in result.err
    assert "regraft fsck --repair" in result.err
    found = run_here("fsck", "--json")
    assert found.code == 1
    assert any("fragile@1" in json.dumps(finding) for finding in json.loads(found.out))
    mended = run_here("fsck", "--repair", "--from", str(backup))
    assert (mended.code, mended.err) == (0, "")
    assert "mended" in mended.out
    assert clean(run_here("fsck")) == "Everything agrees.\n"
    assert run_here("generate", "fragile@1", "True is", "--max-new-tokens", "1").code == 0


def test_a_base_model_that_is_known_keeps_its_name(trained: dict[str, Any], base: Path) -> None:
    result = run_here("base", "add", f"path:{base}", "--name", "another")
    assert result.code == 0
    assert "known already as walked-base" in result.err
    assert "another" not in clean(run_here("base", "list"))


def test_a_deprecated_base_model_names_whom_it_strands_and_is_warned_of(
    trained: dict[str, Any], write_recipe: WriteRecipe, base: Path, tmp_path: Path
) -> None:
    successor = save_tiny_llama(tmp_path / "successor", seed=own_seed(__name__) + 2)
    clean(run_here("base", "add", f"path:{successor}", "--name", "successor"))
    stranded = clean(run_here("base", "deprecate", "walked-base", "--successor", "successor"))
    assert f"{ADAPTER}@1" in stranded
    assert "Successor: successor" in stranded
    assert "successor" in clean(run_here("base", "list", width=160)).split("walked-base")[1].splitlines()[0]
    warned = run_here("train", str(write_recipe("latecomer", base=f"path:{base}")), "--no-evaluate")
    assert (warned.code, "! walked-base is deprecated; its successor is successor." in warned.err) == (0, True)
