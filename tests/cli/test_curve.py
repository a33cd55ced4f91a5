"""`regraft curve`: a tiny model trained on growing parts of its data; stopped, killed, gone on with, added to."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from flows.curve_plan import JOINT, StudiedTask, plan_curves, trainings
from flows.select_data import select_data
from flows.suites import default_suites, prepare
from infra.settings import get_settings
from registry import AdapterRegistry
from tests.cli.conftest import WriteRecipe, ended, run_here, started
from tests.cli.test_lifecycle import clean
from tests.tiny_models import own_seed, save_tiny_llama
from training.recipe import load_recipe

pytestmark = pytest.mark.services

TRAINING = {"steps": 3, "batch_size": 4, "learning_rate": 0.01, "max_length": 512}
SMALL = ("--budgets", "4,25%,all", "--seeds", "2")


@pytest.fixture(scope="module", autouse=True)
def servers(regraft_home: Path) -> None:
    get_settings.cache_clear()
    assert run_here("schedule", "list", "--json").code == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model that no other test registers."""
    return f"path:{save_tiny_llama(tmp_path_factory.mktemp('curved'), seed=own_seed(__name__))}"


@pytest.fixture(scope="module")
def recipe(write_recipe: WriteRecipe, base: str) -> Path:
    return write_recipe("curved", base=base, training=TRAINING)


def curve(*arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(clean(run_here("curve", *map(str, arguments), "--json")))
    return found


def numbers(found: dict[str, Any]) -> list[Any]:
    return [[each["bare"], *([p["budget"], p["seeds"]] for p in each["points"])] for each in found["curves"]]


def test_a_curve_is_measured_once_and_grows_with_what_is_asked(recipe: Path) -> None:
    first = curve(recipe, *SMALL)
    (only,) = first["curves"]
    assert (only["task"], only["arm"], only["metric"], only["samples"]) == ("curved", "one each", "multiple_choice", 24)
    assert [(p["budget"], p["examples"], len(p["seeds"])) for p in only["points"]] == [
        ("4", 4, 2), ("25%", 10, 2), ("all", 40, 2)
    ]  # fmt: skip
    assert all(p["value"] == pytest.approx(fmean(p["seeds"])) for p in only["points"])
    assert all(0 <= p["low"] <= p["value"] <= p["high"] <= 1 for p in only["points"])
    assert only["reference"] == pytest.approx(only["points"][-1]["value"] - 0.05)
    assert (first["trainings"], first["trained"]) == (6, 6)
    assert not AdapterRegistry().has_adapter("curved")

    again = curve(recipe, *SMALL)
    assert again["trained"] == 0 and numbers(again) == numbers(first)
    more = curve(recipe, "--budgets", "4,8,25%,all", "--seeds", "2", "--reference", "0.9")
    assert (more["trainings"], more["trained"]) == (8, 2)
    (grown,) = more["curves"]
    assert [p["seeds"] for p in grown["points"] if p["budget"] != "8"] == [p["seeds"] for p in only["points"]]

    folder = Path(more["folder"])
    rows = list(csv.DictReader((folder / "curve.csv").open()))
    assert len(rows) == 8 and {row["examples"] for row in rows} == {"4", "8", "10", "40"}
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []  # no checkpoints are left


def test_budgets_are_nested_and_every_training_has_as_many_steps_unless_epochs_are_asked_for(recipe: Path) -> None:
    chosen = load_recipe(recipe, {"training.steps": None})
    data = select_data(chosen)

    def planned(steps: int | None, epochs: float | None) -> list[Any]:
        plan = plan_curves([chosen], "4,25%,all", 2, False, (), steps, epochs, None, 0.05)
        record = AdapterRegistry().base_models()[0]
        suite = prepare(default_suites(chosen)[0], chosen)
        return list(trainings(plan, [StudiedTask(chosen, record, data.train, data.validation, suite)]))

    by_default = planned(None, None)
    for seed in (0, 1):
        small, middle, whole = (set(t.examples) for t in by_default if t.seed == seed)
        assert small < middle < whole == set(data.train)
    assert set(by_default[0].examples) != set(by_default[3].examples)
    assert {t.validation for t in by_default} == {data.validation}
    assert {t.recipe.training.steps for t in by_default} == {30}  # 3 epochs of 10 batches
    assert {t.recipe.seed for t in by_default} == {0, 1}
    assert {t.recipe.training.steps for t in planned(7, None)} == {7}
    assert {(t.recipe.training.steps, t.recipe.training.epochs) for t in planned(None, 2.0)} == {(None, 2.0)}


def test_a_task_that_is_smaller_than_a_budget_is_told_and_trained_once(recipe: Path) -> None:
    found = curve(recipe, "--budgets", "1000,all", "--seeds", "1", "--set", "adapter=curved-few")
    assert found["notes"] == ["curved-few has 40 examples: all of them count as 1000"]
    assert (found["trainings"], found["trained"]) == (2, 1)


def test_one_adapter_for_many_tasks_stands_beside_one_for_each(write_recipe: WriteRecipe, base: str) -> None:
    sections = {"base": base, "training": TRAINING}
    logic = write_recipe("curved-logic", **sections)
    data = {"task": "boolean_expressions", "sizes": {"train": 20, "validation": 4, "test": 24}}
    walk = write_recipe("curved-walk", data=data, seed=5, **sections)
    found = curve(logic, walk, "--joint", "--budgets", "4,all", "--seeds", "1", "--reference", "0.5")
    curves = {(c["arm"], c["task"]): c for c in found["curves"]}
    assert list(curves) == [
        (arm, task) for arm in ("one each", JOINT) for task in ("curved-logic", "curved-walk", "mean of 2 tasks")
    ]
    assert found["trained"] == 6
    for arm in ("one each", JOINT):
        parts, mean = [curves[arm, f"curved-{name}"] for name in ("logic", "walk")], curves[arm, "mean of 2 tasks"]
        assert [p["examples"] for p in mean["points"]] == [4, 30]
        for place, point in enumerate(mean["points"]):
            assert point["value"] == pytest.approx(fmean(part["points"][place]["value"] for part in parts))
    assert len({c["bare"] for c in found["curves"] if c["task"] == "curved-logic"}) == 1
    assert [c["samples"] for c in found["curves"]] == [24, 24, 48] * 2


def test_a_joint_adapter_learns_all_tasks_for_the_sum_of_their_steps_with_instructions_in_the_prompts(
    write_recipe: WriteRecipe, base: str
) -> None:
    paths = [write_recipe(f"curved-{task}", base=base, data={"task": task, "sizes": {"train": 9}}) for task in
             ("navigate", "boolean_expressions")]  # fmt: skip
    recipes = [load_recipe(path) for path in paths]
    plan = plan_curves(recipes, "2,all", 1, True, (), 5, None, None, 0.0)
    tasks = []
    for each in recipes:
        data = select_data(each)
        suite = prepare(default_suites(each)[0], each)
        record = AdapterRegistry().base_models()[0]
        tasks.append(StudiedTask(each, record, data.train, data.validation, suite).in_prompt)
    *_, joint = trainings(plan, tasks)
    assert (joint.arm, joint.sizes, joint.recipe.training.steps) == (JOINT, (9, 9), 10)
    assert set(joint.examples) == {*tasks[0].train, *tasks[1].train}
    assert joint.recipe.data.instruction_text == ""
    for each, task in zip(recipes, tasks, strict=True):
        for example in (*task.train, *task.suite.examples):
            assert example.prompt.startswith(f"{each.data.instruction_text}\n\n")


def test_a_reference_is_a_number_or_a_versions_own_score(recipe: Path) -> None:
    low = curve(recipe, *SMALL, "--reference", "0")
    assert (low["curves"][0]["verdict"], low["curves"][0]["enough"]) in (("bare", None), ("nothing learnt", None))
    refused = run_here("curve", str(recipe), *SMALL, "--reference", "70")
    assert refused.code == 2 and "write --reference 0.7" in " ".join(refused.err.split())
    trained = json.loads(clean(run_here("train", str(recipe), "--set", "adapter=curved-goal", "--json")))
    found = curve(recipe, *SMALL, "--reference", trained["address"])
    assert found["curves"][0]["reference"] == trained["evaluations"][0]["value"]
    assert found["reference"] == "curved-goal@1"
    measured = [each.metric for each in AdapterRegistry().evaluations("curved-goal@1")]
    assert len(measured) == len(set(measured))  # the same items: not measured again


def test_of_perplexity_less_is_better(recipe: Path) -> None:
    suite = ("--set", "evaluation=[{metric: perplexity, samples: 8}]", "--set", "adapter=curved-fluent")
    found = curve(recipe, "--budgets", "2,all", "--seeds", "1", *suite)
    (only,) = found["curves"]
    small, whole = only["points"]
    assert whole["low"] < whole["value"] < whole["high"] and only["bare"] > 1
    assert only["reference"] == pytest.approx(1.05 * whole["value"])
    judged = only["reference"] < only["bare"]
    within = [p["budget"] for p in (small, whole) if judged and p["high"] <= only["reference"]]
    assert (only["enough"] and only["enough"]["budget"]) == (within[0] if within else None)


def test_several_bases_start_where_they_are(recipe: Path, tmp_path: Path, base: str) -> None:
    other = f"path:{save_tiny_llama(tmp_path / 'curved-other', seed=own_seed(__name__) + 1)}"
    registered = json.loads(clean(run_here("base", "add", base, "--json")))["name"]
    found = curve(recipe, *SMALL, "--base", registered, "--base", other, "--seeds", "1")
    first, second = found["curves"]
    assert first["base"] == registered != second["base"] and first["reference"] == second["reference"]
    assert found["trained"] == 3  # the first base's are known


def wait_for(measured: Path, known: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not measured.is_file() or len(json.loads(measured.read_text())) < known:
        assert process.poll() is None, ended(process).err
        assert time.monotonic() < deadline, "nothing was measured"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_study_that_was_stopped_and_killed_goes_on_to_the_same_numbers(recipe: Path) -> None:
    asked = ("--budgets", "2,4,8,all", "--seeds", "1")
    whole = curve(recipe, *asked, "--set", "training.steps=6")
    chosen = load_recipe(recipe, {"training.steps": 6})
    folder = plan_curves([chosen], "all", 1, False, (), None, None, None, 0.05).workdir
    assert str(folder) == whole["folder"]
    measured = folder / "measured.json"
    measured.unlink()
    command = ("curve", str(recipe), *asked, "--set", "training.steps=6")

    process = started(*command)
    wait_for(measured, 1, process)
    os.killpg(process.pid, signal.SIGINT)
    stopped = ended(process)
    assert (stopped.code, stopped.out) == (130, ""), stopped.err
    assert "same command" in stopped.err
    after_stop = set(json.loads(measured.read_text()))

    process = started(*command)
    wait_for(measured, len(after_stop) + 1, process)
    os.killpg(process.pid, signal.SIGKILL)
    assert ended(process).code == -signal.SIGKILL
    after_kill = set(json.loads(measured.read_text()))
    assert after_stop < after_kill
    done = len([key for key in after_kill if len(key) == 16])
    assert done < 4

    on = curve(recipe, *asked, "--set", "training.steps=6")
    assert on["trained"] == 4 - done
    assert numbers(on) == numbers(whole)


def test_what_cannot_be_studied_is_refused_before_any_work(recipe: Path, write_recipe: WriteRecipe) -> None:
    other = write_recipe("curved-other", method="ia3")
    for arguments, code, told in (
        ((recipe, "--budgets", "10,eleven"), 2, "'eleven' is not a budget"),
        ((recipe, "--steps", "3", "--epochs", "1"), 2, "not both"),
        ((recipe, recipe), 2, "Two of the recipes are called curved"),
        ((recipe, "--joint"), 2, "there is one recipe"),
        ((recipe, other, "--joint"), 2, "their method differs"),
        ((recipe, "--reference", "nobody@3"), 3, "There is no adapter 'nobody'"),
        ((recipe, "--reference", "7 %"), 2, "cannot be a name"),
        ((recipe, "--reference", "nan"), 2, "no score"),
        ((recipe, "--set", "evaluation=[{shots: 2}]"), 2, "no suite on its own data without shots"),
    ):
        refused = run_here("curve", *map(str, arguments))
        assert refused.code == code and told in " ".join(refused.err.split()), refused.err
