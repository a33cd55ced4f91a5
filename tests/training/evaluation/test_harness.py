"""lm-eval on our models; its multiple-choice accuracy and ours are each other's oracle."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig

from infra.errors import InvalidInput, NotFound
from tests.tiny_models import tiny_llama, tiny_tokenizer
from tests.training.evaluation.test_generation import adapted
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.evaluate import evaluate
from training.evaluation.harness import run_harness

pytest.importorskip("lm_eval", reason="needs regraft[harness]")

CHOICES = ("red", "a deep green", "blue", "no colour")
ITEMS = [Example(f"What colour is {n * 37} of {n}?", CHOICES[n % 4], CHOICES) for n in range(24)]


@pytest.fixture(scope="module")
def own_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task `colours` that asks as `PromptFormat` does, on items in a JSONL file."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": item.prompt, "label": item.choices.index(item.completion)} for item in ITEMS]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "label",
        "doc_to_choice": list(CHOICES),
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "colours.yaml").write_text(yaml.safe_dump(definition))
    return folder


def lora() -> Any:
    return adapted(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]))


@pytest.mark.parametrize("build", [tiny_llama, lora])
def test_the_harness_and_our_multiple_choice_agree_item_by_item(build: Any, own_task: Path) -> None:
    model, tokenizer = build(), tiny_tokenizer()
    theirs = run_harness(model, tokenizer, ["colours"], include_path=own_task)
    ours = evaluate(model, tokenizer, ITEMS, metric="multiple_choice", prompt_format=PromptFormat(tokenizer))
    assert list(theirs) == ["lm-eval/colours/acc"]
    found = theirs["lm-eval/colours/acc"]
    assert found.outcomes == ours.outcomes
    assert (found.value, found.low, found.high) == (ours.value, ours.low, ours.high)
    assert 0 < ours.value < 1


def test_limit_takes_the_first_items(own_task: Path) -> None:
    tokenizer = tiny_tokenizer()
    found = run_harness(tiny_llama(), tokenizer, ["colours"], include_path=own_task, limit=5)["lm-eval/colours/acc"]
    whole = evaluate(tiny_llama(), tokenizer, ITEMS, metric="multiple_choice", prompt_format=PromptFormat(tokenizer))
    assert found.samples == 5
    assert whole.outcomes is not None
    assert found.outcomes == whole.outcomes[:5]


def test_an_unknown_task_gets_a_suggestion() -> None:
    with pytest.raises(NotFound, match=r"no task 'arc_eesy'.*Did you mean 'arc_easy'"):
        run_harness(tiny_llama(), tiny_tokenizer(), ["arc_eesy"])


def test_no_task_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="No harness task"):
        run_harness(tiny_llama(), tiny_tokenizer(), [])


def test_a_missing_harness_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    with pytest.raises(NotFound) as error:
        run_harness(tiny_llama(), tiny_tokenizer(), ["arc_easy"])
    assert "regraft[harness]" in error.value.remedy
