"""`regraft evaluate` on programs: run by their tests, recorded, compared; and a study of a suite file's items."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.suites import prepare
from infra.settings import get_settings
from registry import AdapterRegistry
from serving.loading import load
from tests.cli.conftest import Told, WriteRecipe, run_here
from tests.tiny_models import own_seed, save_tiny_llama
from training.data.prompting import PromptFormat
from training.evaluation.code_generation import evaluate_code
from training.evaluation.code_metrics import pass_at_k
from training.evaluation.statistics import mcnemar
from training.evaluation.suite_files import suites_called

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's"),
]

TAUGHT = [{"prompt": f"{n}?", "completion": f"def f(): return {n}", "tests": f"assert f() == {n}"} for n in range(1, 5)]
NOT_TAUGHT = [{**TAUGHT[0], "completion": "def f(): return 0", "tests": "assert f() == 0"}]
NEARNESS = {  # of five programs, one of which has another digit than the reference
    "exact_program": 0.8, "abstracted_match": 1.0, "edit_similarity": 1 - 1 / 17 / 5, "parses": 1.0
}  # fmt: skip
SUITES = """
defaults: {data: {file: asked.jsonl, columns: {tests: tests}, instruction: Write it.}}
suites:
  - {metric: pass@1}
  - {metric: pass@1, also: [pass@3], programs: 3, temperature: 0.01, seed: 3}
"""


@pytest.fixture(scope="module")
def trained(regraft_home: Path, write_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two versions of one adapter: the first knows nothing, the second the programs by heart."""
    get_settings.cache_clear()
    folder = tmp_path_factory.mktemp("coder")
    base = save_tiny_llama(folder / "coder-base", seed=own_seed(__name__))
    (folder / "taught.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TAUGHT))
    data = {
        "file": str(folder / "taught.jsonl"),
        "columns": {"tests": "tests"},
        "instruction": "Write it.",
        "fractions": {"validation": 0.0, "test": 0.0},
    }
    addresses = []
    for steps in (1, 100):
        training = {"steps": steps, "batch_size": 8, "learning_rate": 0.01, "max_length": 128}
        recipe = write_recipe("coder", base=f"path:{base}", method={"name": "full"}, data=data, training=training)
        addresses.append(json.loads(run_here("train", str(recipe), "--no-evaluate", "--json").out)["address"])
    return addresses[0], addresses[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with suites/programs.yaml and its data."""
    suites = tmp_path / "suites"
    suites.mkdir()
    (suites / "programs.yaml").write_text(SUITES)
    broken = [TAUGHT[0], {**TAUGHT[1], "tests": "assert f("}]
    for name, rows in (("asked", [*TAUGHT, *NOT_TAUGHT]), ("broken", broken)):
        (suites / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(result: Told) -> Any:
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


def test_what_was_learnt_passes_and_is_recorded_with_its_nearness_beside(
    trained: tuple[str, str], project: Path
) -> None:
    greedy, several = told(run_here("evaluate", trained[1], "--suite", "programs", "--json"))
    assert (greedy["suite"], greedy["metric"], greedy["value"]) == ("programs/test", "pass@1", 0.8)
    assert {each["metric"]: each["value"] for each in greedy["beside"]} == pytest.approx(NEARNESS)
    assert (several["suite"], several["value"]) == ("programs/test-3programs", 0.8)
    assert [each["metric"] for each in several["beside"]] == ["pass@3", *NEARNESS]
    assert several["beside"][0]["value"] == 0.8
    kept = {(each.suite, each.metric): each for each in AdapterRegistry().evaluations(trained[1])}
    assert sorted(kept["programs/test", "pass@1"].outcomes) == [0] + [1] * 4
    assert sorted(kept["programs/test-3programs", "pass@3"].scores) == [0.0] + [1.0] * 4
    shown = run_here("adapters", "show", "coder", width=200).out
    assert "pass@1" in shown and "edit_similarity" not in shown


def test_two_versions_are_compared_item_by_item(trained: tuple[str, str], project: Path) -> None:
    new, old = trained[1], trained[0]
    found = told(run_here("evaluate", new, "--suite", "programs", "--against", old, "--json"))["comparisons"]
    tests = {(each["suite"], each["metric"]): each["test"] for each in found}
    assert len(found) == 3
    assert tests == {
        ("programs/test", "pass@1"): "exact McNemar",
        ("programs/test-3programs", "pass@1"): "paired sign flips",
        ("programs/test-3programs", "pass@3"): "paired sign flips",
    }
    assert all((each["difference"], each["only_first"], each["only_second"]) == (0.8, 4, 0) for each in found)
    assert {each["p_value"] for each in found if each["test"] == "exact McNemar"} == {mcnemar(4, 0)}
    unlearnt = told(run_here("evaluate", old, "--suite", "programs", "--forgetting", "--json"))["comparisons"]
    assert {(each["suite"], each["metric"]) for each in unlearnt} == set(tests)
    assert {each["difference"] for each in unlearnt} == {0.0}


def test_programs_are_sampled_as_the_suite_says(trained: tuple[str, str], project: Path) -> None:
    (project / "suites" / "hot.yaml").write_text(
        "suites: [{data: {file: asked.jsonl, columns: {tests: tests}}, metric: pass@2, programs: 4, temperature: 1.3, "
        "seed: 5, max_new_tokens: 30}]"
    )
    (result,) = told(run_here("evaluate", trained[1], "--suite", "hot", "--json"))
    coder, drawn = load(trained[1]), prepare(suites_called("hot")[0], None)
    apart = evaluate_code(
        coder.model,
        coder.tokenizer,
        drawn.examples,
        prompt_format=PromptFormat(coder.tokenizer, drawn.instruction),
        samples=4,
        at=(2,),
        temperature=1.3,
        max_new_tokens=30,
        seed=5,
    )
    assert result["value"] == pytest.approx(apart.pass_at[2])
    kept = AdapterRegistry().evaluations(trained[1])
    (recorded,) = [each.scores for each in kept if (each.suite, each.metric) == ("hot/test-4programs", "pass@2")]
    assert recorded == pytest.approx([pass_at_k(4, item.correct, 2) for item in apart.items])
    assert any(0 < score < 1 for score in recorded), "as hot as that it is not always right"


def test_the_tests_of_the_built_in_task_are_run(trained: tuple[str, str], project: Path) -> None:
    (project / "suites" / "short.yaml").write_text(
        "suites: [{task: python_functions, samples: 2, max_new_tokens: 8}]"
    )  # a tiny model's positions are few
    (result,) = told(run_here("evaluate", trained[1], "--suite", "short", "--json"))
    assert (result["suite"], result["metric"], result["value"]) == ("short/python_functions/test", "pass@1", 0.0)


@pytest.mark.parametrize(
    ("suite", "said"),
    [
        ("{data: {file: asked.jsonl}, metric: pass@1}", "has no tests, so its programs cannot be judged"),
        (
            "{data: {file: broken.jsonl, columns: {tests: tests}}, metric: pass@1}",
            "1 of 2 items have tests that",
        ),
        ("{data: {file: asked.jsonl}, programs: 3}", "wants 3 programs an item, but measures exact_match"),
        ("{data: {file: asked.jsonl}, metric: pass@9, programs: 3}", "pass@9 cannot be told from 3 programs"),
    ],
)
def test_what_cannot_be_judged_is_told(trained: tuple[str, str], project: Path, suite: str, said: str) -> None:
    (project / "suites" / "odd.yaml").write_text(f"suites: [{suite}]")
    result = run_here("evaluate", trained[1], "--suite", "odd", width=200)
    assert (result.code, result.out) == (2, "")
    assert said in " ".join(result.err.split())


def test_a_study_takes_its_items_from_a_suite_file_each_once(
    trained: tuple[str, str], project: Path, tmp_path: Path
) -> None:
    arguments = ("study", "create", "study", trained[1], "--suite", "programs", "--reference", "--max-new-tokens", "24")
    made = told(run_here(*arguments, "--json"))
    assert (made["arms"], made["items"]) == ([trained[1], "reference"], len(TAUGHT))
    assert made["alike"] == len(TAUGHT) - 1  # of the prompt that is there twice the row which was not taught is asked
    both = run_here(*arguments, "--task", "navigate")
    assert both.code == 2 and "one source of items" in " ".join(both.err.split())
    unknown = run_here("study", "create", "other", trained[1], "--suite", "programms", "--reference")
    assert unknown.code == 3 and "Did you mean 'programs'?" in " ".join(unknown.err.split())
    assert not (project / "other").exists()
