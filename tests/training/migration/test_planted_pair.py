"""A whole migration on two tiny base models of different architectures and tokenizers: three tasks, three seeds."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.migration_ablation import (
    OURS,
    RANDOM_TEXT,
    SEEDS_ONLY,
    SYNTHESIS,
    TEACHER_RATE,
    TEACHER_STEPS,
    accuracy,
    measure,
    trained,
)
from benchmarks.planted import PLANTED, make_pair
from training.base_models import load_base
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.methods.borrowing import borrowed
from training.migration.labelling import label
from training.migration.synthesis import synthesise

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the pretrained pair."""
    made = tmp_path_factory.mktemp("pair")
    make_pair(made)
    return made


@pytest.fixture(scope="module")
def accuracies(directory: Path) -> dict[str, float]:
    """Of teacher, bare target and students in percent, averaged over nine teachers and two students of each."""
    jobs = [(place, seed) for place in range(len(PLANTED)) for seed in range(3)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(measure, *job, directory, {OURS, RANDOM_TEXT, SEEDS_ONLY}) for job in jobs]
        found = [future.result() for future in running]
    for each in found:
        each["to beat"] = max(each["teacher"], each["bare"])
    return {name: 100 * mean(each[name] for each in found) for name in ("to beat", OURS, RANDOM_TEXT, SEEDS_ONLY)}


def test_the_new_adapter_is_as_good_as_the_better_of_old_one_and_bare_target(accuracies: dict[str, float]) -> None:
    assert accuracies[OURS] >= accuracies["to beat"] - 2, accuracies


def test_it_learns_more_than_from_other_text_or_from_the_seeds_alone(accuracies: dict[str, float]) -> None:
    assert accuracies[OURS] >= accuracies[RANDOM_TEXT] + 5, accuracies
    assert accuracies[OURS] >= accuracies[SEEDS_ONLY] + 5, accuracies


def test_what_is_learnt_is_what_the_teacher_says_and_not_what_the_target_thinks(directory: Path) -> None:
    task, opposite = PLANTED[1], {"yes": "no", "no": "yes"}
    rows = [Example(row.prompt, opposite[row.completion]) for row in task.examples(240, seed=0)]
    source, target = (load_base(reference, cache=directory / "cache") for reference in make_pair(directory))
    seeds = [row.prompt for row in rows[:5]]
    with borrowed(source.model):
        teacher = trained(source, rows[:120], 0, TEACHER_STEPS, TEACHER_RATE)
        pool = synthesise(target.model, target.tokenizer, task.name, seeds, 120, SYNTHESIS, seed=0)
        learnt = label(teacher, PromptFormat(source.tokenizer), pool.inputs, longest=3).examples
    with borrowed(target.model):
        assert accuracy(trained(target, learnt, 0), target.tokenizer, rows[120:]) > 0.9
