"""What every built-in task promises."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import InvalidInput, NotFound
from training.data.example import Example, fingerprint
from training.data.splits import SPLITS
from training.tasks.catalog import CATALOG, get_task
from training.tasks.task import Task, canonical_content

each_task = pytest.mark.parametrize("name", CATALOG)

# The first 20 training items under seed 0. A change here changes every adapter that is trained on the task, and is a
# change of the task: other Python versions and machines must agree on these.
FINGERPRINTS = {
    "boolean_expressions": "60ef33200ee19bda06e9d284258d5835fc6b12da841b7781f5fd33725a29a094",
    "date_understanding": "a4501dd81e60f9731db51a9717ec90af1d551047de5c73ab0e6061064fdf4fe3",
    "dyck_languages": "10050e9d7744d16f73f7bfb4b2dc3489c65cfc17b3e9b4cfc6fb8df4a7f6f4e7",
    "formal_fallacies": "6125a23749a3b5a5583eb6fb91f18768dede6d046dff14a8cc4574a55921438e",
    "logical_deduction": "47a2397ff2cbbe9447c36e5ead512549a9cd227247b4d9189f121161dc7bcba9",
    "multistep_arithmetic": "e1348ff6464c2aec017e2635f7048ebf672e1d0c6d1b299342cad3a053f82fac",
    "navigate": "18a84208d155a5df9bcb03da3dba35b39dcdc18c8b1a669cf709cb1f3d53e09f",
    "object_counting": "3acc589b47e48c932ea7a3e84d6f15806caa95c3e160fc05d72de1fee2a92fb5",
    "python_functions": "239ffc14d9afb41f88e9f268dec644421aa077ce5ea597926808f0de43860b1d",
    "temporal_sequences": "cbedaaeee5876ec37eaf05c3b3295e7080e89ec78fc0636d926eed9cf395738b",
    "tracking_shuffled_objects": "0dc91b1c5d0907b6ec531b5766d947755f10177bb0058e0ea055be9ced81aede",
    "web_of_lies": "3578ce88a04f5a1af0d3cdb2d93e02e37d37641231f4418b8a8d33cea1df96c6",
    "word_sorting": "4f84c1c2ab4ba92576f7d4bdee7cedede93060a9da6121863dbe74a9fbeb359e",
}


def test_the_catalogue_holds_at_least_twelve_tasks():
    assert len(set(CATALOG)) >= 12
    assert [get_task(name).name for name in CATALOG] == list(CATALOG)


def test_an_unknown_task_brings_the_nearest_name():
    with pytest.raises(NotFound, match=r"Did you mean 'object_counting'\?"):
        get_task("objects_counting")


@each_task
def test_a_task_describes_itself(name):
    task = get_task(name)
    assert task.description.endswith(".") and "\n" not in task.description
    assert task.instruction.endswith(".")
    assert task.max_completion_tokens > 0


@each_task
def test_splits_share_no_question_whatever_the_seeds(name):
    task = get_task(name)
    contents = {
        split: {canonical_content(item) for seed in range(3) for item in task.generate(split, 150, seed)}
        for split in SPLITS
    }
    prompts = {split: {item.prompt for item in task.generate(split, 150, 0)} for split in SPLITS}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not contents[one] & contents[other]
        assert not prompts[one] & prompts[other]


@each_task
def test_items_are_distinct_and_another_seed_gives_others(name):
    task = get_task(name)
    items = task.generate("train", 300, seed=5)
    assert len({item.prompt for item in items}) == 300
    assert items != task.generate("train", 300, seed=6)


@each_task
def test_fewer_items_are_the_beginning_of_more(name):
    task = get_task(name)
    assert task.generate("test", 20, seed=3) == task.generate("test", 60, seed=3)[:20]


@each_task
def test_thousands_of_items_can_be_had(name):
    task = get_task(name)
    assert len(task.generate("train", 2_000, seed=0)) == 2_000
    assert len(task.generate("test", 500, seed=0)) == 500


@each_task
@pytest.mark.parametrize("split", SPLITS)
def test_no_answer_takes_more_than_sixty_percent(name, split):
    items = get_task(name).generate(split, 500, seed=11)
    answer, count = Counter(item.completion for item in items).most_common(1)[0]
    assert count <= 300, f"{answer}: {count} of 500"


@each_task
def test_the_metric_fits_the_items(name):
    task = get_task(name)
    for item in task.generate("validation", 50, seed=2):
        assert bool(item.choices) == (task.metric == "multiple_choice")
        assert bool(item.tests) == (task.metric == "pass@1")
        assert not item.choices or item.completion in item.choices
        assert item.completion == item.completion.strip() != ""
        assert item.prompt == item.prompt.strip() != ""
        assert len(item.completion) <= 10 * task.max_completion_tokens


@each_task
def test_items_are_the_same_on_every_machine(name):
    assert fingerprint(get_task(name).generate("train", 20, seed=0)) == FINGERPRINTS[name]


def test_items_are_the_same_in_another_process_and_need_no_torch():
    program = (
        "import json, sys\n"
        "from training.tasks.catalog import CATALOG, get_task\n"
        "from training.data.example import fingerprint\n"
        "import training.data.sources, training.data.prompting, training.selection.selection\n"
        "print(json.dumps({name: fingerprint(get_task(name).generate('test', 40, seed=9)) for name in CATALOG}))\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules), 'a heavy import'\n"
    )
    there = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "4242"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(there.stdout) == {
        name: fingerprint(get_task(name).generate("test", 40, seed=9)) for name in CATALOG
    }


def _digits(rng: random.Random) -> Example:
    digit = rng.randrange(10)
    return Example(f"What follows {digit}?", str(digit + 1))


DIGITS = Task("digits", "The next digit.", "exact_match", "Answer with a number.", 2, _digits)


def test_a_task_that_is_too_small_says_how_many_items_there_are():
    sizes = {}
    for split in SPLITS:
        with pytest.raises(InvalidInput, match=f"no 11 distinct {split} items") as error:
            DIGITS.generate(split, 11, seed=0)
        sizes[split] = int(error.value.what.split(": ")[1].split()[0])
    assert sum(sizes.values()) == 10, "each of the ten questions is in exactly one split"
    assert len(DIGITS.generate("train", sizes["train"], seed=1)) == sizes["train"]


def test_an_unknown_split_and_a_negative_number_are_refused():
    with pytest.raises(InvalidInput, match="'dev' is not a split"):
        DIGITS.generate("dev", 1, seed=0)
    with pytest.raises(InvalidInput, match="-1 items"):
        DIGITS.generate("train", -1, seed=0)


@given(order=st.permutations(["red", "green", "blue"]), extra=st.text("xyz", min_size=1))
def test_other_wrong_options_or_another_order_make_the_same_question(order, extra):
    def question(options: list[str]) -> Example:
        lines = [f"({'ABC'[i]}) {option}" for i, option in enumerate(options)]
        return Example("\n".join(["Which?", "Options:", *lines]), f"({'ABC'[options.index('red')]})")

    original = canonical_content(question(["red", "green", "blue"]))
    assert canonical_content(question(order)) == original
    assert canonical_content(question(["red", "green", extra])) == original
    assert canonical_content(Example("Which?\nOptions:\n(A) red\n(B) green\n(C) blue", "(B)")) != original


@settings(max_examples=25)
@given(name=st.sampled_from(CATALOG), seeds=st.tuples(st.integers(0, 2**32), st.integers(0, 2**32)))
def test_any_two_seeds_keep_train_and_test_apart(name, seeds):
    task = get_task(name)
    train = {canonical_content(item) for item in task.generate("train", 40, seeds[0])}
    assert train.isdisjoint(canonical_content(item) for item in task.generate("test", 40, seeds[1]))
