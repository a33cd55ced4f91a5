"""`regraft evaluate` with suite files: texts, buckets, several versions at once, forgetting; and the gate."""

import json
from pathlib import Path
from typing import Any

import pytest

from infra.settings import get_settings
from registry import AdapterRegistry
from tests.cli.conftest import Told, WriteRecipe, run_here
from tests.tiny_models import own_seed, save_tiny_llama, save_tiny_masked
from training.data.prompting import PromptFormat
from training.evaluation.text_metrics import text_scores

pytestmark = pytest.mark.services

ADAPTER = "judged"
ROWS = [{"prompt": "note " * (1 + n % 8), "completion": f"note {n % 8} in short"} for n in range(16)]
SUMMARIES = """
defaults: {data: {file: notes.jsonl, instruction: Summarise.}}
suites:
  - {metric: rougeL, also: [bleu, token_f1], buckets: [40, 55], max_new_tokens: 4}
"""
GENERAL = """
defaults: {samples: 12, task: boolean_expressions}
suites: [{}, {name: fluency, metric: perplexity}]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("judged"), seed=own_seed(__name__))


@pytest.fixture(scope="module")
def trained(regraft_home: Path, write_recipe: WriteRecipe, base: Path) -> list[str]:
    """Three versions of one adapter; 1 and 2 are one and the same."""
    get_settings.cache_clear()
    assert run_here("base", "add", f"path:{base}", "--name", "judged-base").code == 0
    addresses = []
    for seed in (0, 0, 1):
        recipe = write_recipe(ADAPTER, base="judged-base", seed=seed)
        addresses.append(json.loads(run_here("train", str(recipe), "--no-evaluate", "--json").out)["address"])
    return addresses


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with suites/summaries.yaml, suites/general.yaml and the data of the first."""
    suites = tmp_path / "suites"
    suites.mkdir()
    (suites / "summaries.yaml").write_text(SUMMARIES)
    (suites / "general.yaml").write_text(GENERAL)
    (suites / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(result: Told) -> Any:
    lines = [
        line for line in result.err.splitlines() if not line.endswith("have more than 55 tokens and are left out.")
    ]
    assert (result.code, lines) == (0, [])
    return json.loads(result.out)


def test_a_suite_file_is_measured_whole_and_by_buckets_and_recorded(trained: list[str], project: Path) -> None:
    results = told(run_here("evaluate", trained[0], "--suite", "summaries", "--json"))
    titles = ["summaries/test", "summaries/test[0-40]", "summaries/test[40-55]"]
    assert [result["suite"] for result in results] == titles
    whole, short, long = results
    loaded = load_version(trained[0])
    form = PromptFormat(loaded.tokenizer, "Summarise.")
    lengths = [len(loaded.tokenizer(form.prompt(row["prompt"]), add_special_tokens=False)["input_ids"]) for row in ROWS]
    assert short["samples"] == sum(length <= 40 for length in lengths) > 0
    assert long["samples"] == sum(40 < length <= 55 for length in lengths) > 0
    assert whole["samples"] == short["samples"] + long["samples"] < len(ROWS)
    registry = AdapterRegistry()
    kept = {(e.suite, e.metric): e for e in reversed(registry.evaluations(trained[0]))}
    assert {key for key in kept if key[0] in titles} == {(t, m) for t in titles for m in ("rougeL", "bleu", "token_f1")}
    for metric in ("rougeL", "bleu", "token_f1"):
        parts = [kept[title, metric] for title in titles[1:]]
        assert sorted(kept[titles[0], metric].scores) == sorted(parts[0].scores + parts[1].scores)
    asked = [row for row, length in zip(ROWS, lengths, strict=True) if length <= 55]
    said = loaded.generate([row["prompt"] for row in asked], max_new_tokens=4)
    wanted = text_scores("token_f1", said, [[row["completion"]] for row in asked])
    assert sorted(kept["summaries/test", "token_f1"].scores) == pytest.approx(sorted(wanted.of_items))


def load_version(address: str) -> Any:
    from serving.loading import load

    return load(address)


def test_several_versions_are_compared_at_once_with_corrected_p_values(trained: list[str], project: Path) -> None:
    first, same, other = trained
    options = ("--suite", "summaries", "--suite", "general", "--against", same, "--against", other)
    found = told(run_here("evaluate", first, *options, "--json"))["comparisons"]
    suites = {
        "summaries/test": "paired sign flips",
        "summaries/test[0-40]": "paired sign flips",
        "summaries/test[40-55]": "paired sign flips",
        "general/boolean_expressions/test": "exact McNemar",
        "general/fluency": "paired sign flips",
    }
    assert {(each["suite"], each["test"]) for each in found if each["metric"] != "bleu"} == set(suites.items())
    assert {each["test"] for each in found if each["metric"] == "bleu"} == {"approximate randomization"}
    assert len(found) == 2 * (3 * 3 + 2)  # three metrics of three parts, and two suites; against each of two
    for each in found:
        assert each["p_value"] <= each["p_holm"] <= 1.0
        if each["against"] == same:
            assert (each["difference"], each["p_value"], each["only_first"]) == (0.0, 1.0, 0)
    recorded = len(AdapterRegistry().evaluations(same))
    shown = run_here("evaluate", first, *options, width=200)
    assert f"of {len(found)} tests (Holm)" in shown.out
    assert "summaries/test[0-40] bleu" in shown.out
    assert len(AdapterRegistry().evaluations(same)) == recorded  # what is recorded is not measured again


def test_forgetting_holds_a_version_against_its_bare_base(trained: list[str], project: Path) -> None:
    said = told(run_here("evaluate", trained[0], "--forgetting", "--json"))
    assert [(each["suite"], each["against"]) for each in said["comparisons"]] == [
        ("general/boolean_expressions/test", "judged-base"), ("general/fluency", "judged-base"),
    ]  # fmt: skip
    bare = {r["suite"]: r for r in told(run_here("evaluate", "judged-base", "--suite", "general", "--json"))}
    for mine, each in zip(said["results"], said["comparisons"], strict=True):
        assert mine["dataset_fingerprint"] == bare[mine["suite"]]["dataset_fingerprint"]
        assert each["difference"] == pytest.approx(mine["value"] - bare[mine["suite"]]["value"], rel=1e-4)
    lines = run_here("evaluate", trained[0], "--forgetting", width=200).out.splitlines()
    assert sum("against judged-base" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--suite", "genral"), 3, "There is no suite file 'genral'. Did you mean 'general'?"),
        (("--suite", "nowhere.yaml"), 3, "nowhere.yaml is not there"),
        (("--suite", "summaries", "--shots", "2"), 2, "--shots goes with --task"),
        (("--suite", "trained-on"), 2, "no prompt has at most 3 tokens"),
        (("--suite", "no-choices"), 2, "Example 1 is not multiple choice"),
        (("--suite", "shown"), 2, "needs solved examples that are not among its items"),
        (("--suite", "general", "--harness", "arc_easy"), 2, "--harness goes alone"),
        (("--against", "judged@99"), 3, "judged@99"),
        (("--against", "judged@3"), 2, "judged@3 is judged@3 itself"),
        (("--suite", "general/fluenci"), 3, "has no suite 'general/fluenci'. Did you mean 'general/fluency'?"),
        (("--suite", "../../etc/passwd"), 3, "A path has to end in .yaml"),
        (
            ("--suite", "general", "--suite", "elsewhere/general.yaml"),
            2,
            "Two of the suites are called general/fluency",
        ),
    ],
)
def test_what_cannot_be_measured_is_told(
    trained: list[str], project: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    for name, suite in {
        "trained-on": "buckets: [3]",
        "no-choices": "metric: multiple_choice",
        "shown": "shots: 1",
    }.items():
        (project / "suites" / f"{name}.yaml").write_text(f"suites: [{{data: {{file: notes.jsonl}}, {suite}}}]")
    (project / "elsewhere").mkdir()
    (project / "elsewhere" / "general.yaml").write_text("suites: [{task: navigate, name: fluency}]")
    before = len(AdapterRegistry().evaluations(trained[2]))
    result = run_here("evaluate", trained[2], *arguments)
    assert (result.code, result.out) == (code, "")
    assert said in " ".join(result.err.split()) and result.err.count("✗") == 1
    assert "Write ../" not in result.err
    assert len(AdapterRegistry().evaluations(trained[2])) == before


def test_one_suite_of_a_file_is_named_by_its_title_and_what_is_named_twice_is_measured_once(
    trained: list[str], project: Path
) -> None:
    (only,) = told(run_here("evaluate", trained[0], "--suite", "general/fluency", "--json"))
    assert (only["suite"], only["metric"]) == ("general/fluency", "perplexity")
    twice = ("--suite", "general", "--suite", "general", "--suite", "general/fluency")
    found = told(run_here("evaluate", trained[0], *twice, "--json"))
    assert [each["suite"] for each in found] == ["general/boolean_expressions/test", "general/fluency"]


def test_a_suite_that_fails_hides_nothing_of_what_the_others_measured(trained: list[str], project: Path) -> None:
    (project / "suites" / "mixed.yaml").write_text(
        "defaults: {samples: 8}\nsuites: [{name: first, task: boolean_expressions, seed: 1}, {name: odd, "
        "data: {file: notes.jsonl}, metric: multiple_choice}, {name: last, task: boolean_expressions}]"
    )
    result = run_here("evaluate", trained[0], "--suite", "mixed", "--against", trained[2], "--forgetting", "--json")
    assert result.code == 2 and result.err.count("✗") == 1
    assert "mixed/odd could not be measured: Example 1 is not multiple choice" in " ".join(result.err.split())
    said = json.loads(result.out)
    assert [each["suite"] for each in said["results"]] == ["mixed/first", "mixed/last"]
    assert [(each["suite"], each["against"]) for each in said["comparisons"]] == [
        ("mixed/first", trained[2]), ("mixed/last", trained[2]),
        ("mixed/first", "judged-base"), ("mixed/last", "judged-base"),
    ]  # fmt: skip
    bare = run_here("evaluate", "judged-base", "--suite", "mixed", width=200)
    assert bare.code == 2 and "mixed/last" in bare.out and "mixed/odd" not in bare.out


def test_a_bucket_that_holds_all_items_is_no_test_of_its_own(trained: list[str], project: Path) -> None:
    (project / "suites" / "short.yaml").write_text(
        "suites: [{data: {file: notes.jsonl}, metric: perplexity, buckets: [1000, 2000]}]"
    )
    said = told(run_here("evaluate", trained[0], "--suite", "short", "--against", trained[2], "--json"))
    assert [each["suite"] for each in said["results"]] == ["short/test", "short/test[0-1000]"]
    (only,) = said["comparisons"]
    assert (only["suite"], only["p_holm"]) == ("short/test", only["p_value"])


def test_a_gate_on_a_metric_that_the_suite_does_not_measure_is_refused_and_not_recorded(
    trained: list[str], project: Path
) -> None:
    policy = project / "policy.yaml"
    for suite, metric, said in (
        ("summaries/test[0-40]", "bertscore", "measures rougeL, bleu, token_f1. → Write also: [bertscore]"),
        ("general/fluency", "rougeL", "measures perplexity. → Name one of these"),
        ("general/boolean_expressions/test", "rougeL", "ece"),
    ):
        policy.write_text(f"suites: [{{suite: '{suite}', metric: {metric}}}]")
        refused = run_here("promote", trained[2], "--to", "unmeasured", "--policy", str(policy))
        assert (refused.code, refused.out) == (2, "")
        assert f"asks for {metric} of suite '{suite}'" in " ".join(refused.err.split())
        assert said in " ".join(refused.err.split())
    assert "unmeasured" not in run_here("adapters", "history", ADAPTER, "--json").out
    policy.write_text("suites: [{suite: general/boolean_expressions/test, metric: brier}]")
    told(run_here("promote", trained[2], "--to", "calibrated", "--policy", str(policy), "--json"))


def test_a_masked_language_model_is_not_asked_for_texts(project: Path, tmp_path: Path) -> None:
    masked = save_tiny_masked(tmp_path / "judged-masked", seed=own_seed(__name__))
    result = run_here("evaluate", f"path:{masked}", "--suite", "summaries")
    assert result.code == 2
    assert "judged by the perplexity of what is hidden; the suite asks for rougeL" in result.err


def test_forgetting_and_comparing_take_a_version(project: Path, base: Path) -> None:
    for option in ("--forgetting", "--against=judged@1"):
        result = run_here("evaluate", f"path:{base}", *option.split("="), "--task", "navigate")
        assert (result.code, result.out) == (2, "")


def test_a_policy_names_suite_files_their_suites_and_their_buckets(trained: list[str], project: Path) -> None:
    policy = project / "policy.yaml"
    policy.write_text(
        "defaults: {max_regression: 1.0}\nsuites:\n"
        "  - {suite: 'summaries/test[40-55]', metric: bleu}\n"
        "  - {suite: summaries, metric: rougeL, regression_significance: 0.05}\n"
        "  - {suite: general, max_regression: null}\n"
    )
    for address in trained[:2]:  # the second is held against the first
        told(run_here("promote", address, "--to", "bucketed", "--policy", str(policy), "--json"))
    checks = told(run_here("promote", trained[1], "--to", "bucketed", "--policy", str(policy), "--json"))["checks"]
    names = {check["name"].partition(":")[0] for check in checks}
    assert "summaries/test[40-55] bleu" in names and "summaries/test rougeL" in names
    assert {"general/boolean_expressions/test multiple_choice", "general/fluency perplexity"} <= names
    assert all(check["passed"] for check in checks)


@pytest.mark.parametrize(
    ("suite", "said"),
    [
        ("summaries/test[40-60]", "has no such bucket. → It has summaries/test[0-40], summaries/test[40-55]"),
        ("summeries/test", "Did you mean 'summaries'?"),
        ("summaries/tset", "Did you mean 'summaries/test'?"),
        ("navigate/tset", "Did you mean 'navigate/test'?"),
    ],
)  # fmt: skip
def test_a_policy_about_a_suite_that_is_none_is_refused(
    trained: list[str], project: Path, suite: str, said: str
) -> None:
    policy = project / "policy.yaml"
    policy.write_text(f"suites: [{{suite: '{suite}'}}]")
    result = run_here("promote", trained[0], "--to", "nowhere", "--policy", str(policy))
    assert (result.code, result.out) == (2, "")
    assert said in " ".join(result.err.split())


def test_a_recipe_trains_and_is_judged_by_a_suite_file(
    trained: list[str], project: Path, write_recipe: WriteRecipe
) -> None:
    recipe = write_recipe("by-name", base="judged-base", evaluation=["summaries", {"samples": 8}])
    version = told(run_here("train", str(recipe), "--json"))
    assert [each["suite"] for each in version["evaluations"]][:2] == ["summaries/test", "summaries/test[0-40]"]
    assert version["evaluations"][-1]["suite"] == "boolean_expressions/test"
    (project / "suites" / "summaries.yaml").unlink()  # the recipe holds what was asked
    again = told(run_here("evaluate", version["address"], "--json"))
    assert [each["value"] for each in again] == [each["value"] for each in version["evaluations"]]


def test_the_file_that_is_trained_on_is_no_suite(trained: list[str], project: Path, write_recipe: WriteRecipe) -> None:
    notes = project / "suites" / "notes.jsonl"
    data = {"file": str(notes), "fractions": {"validation": 0.0, "test": 0.0}}
    recipe = write_recipe("leaky", base="judged-base", data=data)
    assert run_here("train", str(recipe), "--no-evaluate").code == 0
    result = run_here("evaluate", "leaky@1", "--suite", "summaries")
    assert result.code == 2
    assert "would measure on notes.jsonl, which the recipe trains on" in result.err


def test_prefect_shows_a_reliability_diagram(trained: list[str], project: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    told(run_here("evaluate", trained[0], "--suite", "general", "--json"))
    wanted = f"{ADAPTER}-reliability-on-general-boolean-expressions-test"
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[wanted])))
    assert found and str(found[0].data).startswith("data:image/png;base64,")
