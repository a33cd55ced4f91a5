import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import InvalidInput
from training.data.content_hash import folded, normalised
from training.data.example import Example, fingerprint
from training.data.sampling import sample
from training.data.sources import DataSource, load_splits
from training.data.splits import hold_out, without_overlap
from training.tasks.catalog import get_task

examples_of_few_words = st.lists(
    st.builds(Example, st.text("abAB ", min_size=1), st.sampled_from(["0", "1"])), max_size=40
)


def numbered(first: int, count: int) -> list[Example]:
    return [Example(f"question {i}", str(i)) for i in range(first, first + count)]


def write(path: Path, examples: list[Example]) -> Path:
    path.write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.completion}) + "\n" for e in examples))
    return path


# Tasks


def test_a_task_brings_its_splits_in_the_sizes_wanted():
    splits = load_splits(DataSource(task="navigate", sizes={"train": 30, "validation": 0}), seed=4)
    assert splits.train == tuple(get_task("navigate").generate("train", 30, seed=4))
    assert splits.validation == ()
    assert splits.test == tuple(get_task("navigate").generate("test", 200, seed=4))
    assert splits.fingerprints == {
        "train": fingerprint(splits.train),
        "validation": fingerprint(()),
        "test": fingerprint(splits.test),
    }


# Holding out by content


def test_a_file_is_divided_by_its_content(tmp_path):
    examples = numbered(0, 2000)
    splits = load_splits(DataSource(file=write(tmp_path / "data.jsonl", examples)), seed=0)
    assert Counter(splits.train + splits.validation + splits.test) == Counter(examples)
    assert list(splits.train) == [one for one in examples if one in set(splits.train)], "the file's order is kept"
    for split in (splits.validation, splits.test):  # 300 wanted; five standard deviations are 80
        assert 220 < len(split) < 380


def test_no_seed_moves_a_prompt_into_another_split(tmp_path):
    source = DataSource(file=write(tmp_path / "data.jsonl", numbered(0, 100)))
    assert load_splits(source, seed=0) == load_splits(source, seed=1)


@given(examples=examples_of_few_words, added=examples_of_few_words)
def test_copies_stay_together_and_new_rows_move_nobody(examples, added):
    shares = {"validation": 0.3, "test": 0.3}
    parts = hold_out(examples, shares)
    assert sum(map(len, parts.values())) == len(examples)
    where = {folded(example.prompt): split for split, part in parts.items() for example in part}
    for split, part in hold_out([*added, *examples], shares).items():
        for example in part:
            assert where.get(folded(example.prompt), split) == split


@given(examples=examples_of_few_words, share=st.floats(0, 0.6))
def test_the_test_split_does_not_depend_on_the_share_of_validation(examples, share):
    one = hold_out(examples, {"validation": 0.2, "test": 0.3})["test"]
    assert hold_out(examples, {"test": 0.3, "validation": share})["test"] == one
    assert hold_out(examples, {"test": 0.3})["test"] == one


def test_a_split_that_comes_out_empty_is_refused_unless_it_is_not_wanted(tmp_path):
    path = write(tmp_path / "data.jsonl", numbered(0, 1))
    with pytest.raises(InvalidInput, match="too few examples to split: 1, and none") as error:
        load_splits(DataSource(file=path), seed=0)
    assert "data.fractions" in error.value.remedy
    splits = load_splits(DataSource(file=path, fractions={"validation": 0, "test": 0}), seed=0)
    assert repr(splits) == "Splits(1 train, 0 validation, 0 test)"


# Named parts


def test_named_files_are_the_splits(tmp_path):
    for name, first in (("train", 0), ("validation", 10), ("test", 20)):
        write(tmp_path / f"{name}.jsonl", numbered(first, 10))
    source = DataSource(file="train.jsonl", validation="validation.jsonl", test="test.jsonl").anchored(tmp_path)
    splits = load_splits(source, seed=0)
    assert splits.train == tuple(numbered(0, 10))
    assert splits.validation == tuple(numbered(10, 10))
    assert splits.test == tuple(numbered(20, 10))


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_prompt_in_train_and_in_a_held_out_file_is_refused_by_name(tmp_path, part):
    write(tmp_path / "train.jsonl", numbered(0, 30))
    write(tmp_path / "held_out.jsonl", [*numbered(30, 5), Example("QUESTION  7", "seven")])
    other = "test" if part == "validation" else "validation"
    source = DataSource(file="train.jsonl", **{part: "held_out.jsonl"}, fractions={other: 0}).anchored(tmp_path)
    with pytest.raises(InvalidInput, match=f"both train and {part}: 'question 7'"):
        load_splits(source, seed=0)
    dropping = source.model_copy(update={"on_overlap": "drop"})
    splits = load_splits(dropping, seed=0)
    assert len(splits.train) == 29 and Example("question 7", "7") not in splits.train
    assert len(getattr(splits, part)) == 6


@given(train=examples_of_few_words, validation=examples_of_few_words, test=examples_of_few_words)
def test_dropping_overlap_keeps_the_test_whole_and_the_parts_disjoint(train, validation, test):
    parts = without_overlap({"train": train, "validation": validation, "test": test}, "drop")
    assert parts["test"] == test
    prompts = {split: {folded(example.prompt) for example in part} for split, part in parts.items()}
    assert not prompts["train"] & prompts["validation"]
    assert not (prompts["train"] | prompts["validation"]) & prompts["test"]
    everything = {folded(example.prompt) for example in [*train, *validation, *test]}
    assert prompts["train"] | prompts["validation"] | prompts["test"] == everything


# Sizes


def test_sizes_are_exact_and_say_what_there_is(tmp_path):
    path = write(tmp_path / "data.jsonl", numbered(0, 400))
    whole = load_splits(DataSource(file=path), seed=0)
    splits = load_splits(DataSource(file=path, sizes={"train": 50, "test": 10, "validation": 0}), seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (50, 0, 10)
    assert set(splits.train) < set(whole.train) and set(splits.test) < set(whole.test)
    with pytest.raises(InvalidInput, match=f"sizes.test is 500, but data.jsonl has {len(whole.test)} test examples"):
        load_splits(DataSource(file=path, sizes={"test": 500}), seed=0)


# Samples


@given(examples=examples_of_few_words, n=st.integers(0, 45), seed=st.integers(0, 2**32), data=st.data())
def test_a_sample_is_stable(examples, n, seed, data):
    chosen = sample(examples, n, seed)
    assert len(chosen) == min(n, len(examples))
    larger = sample(examples, n + 3, seed)
    assert not Counter(chosen) - Counter(larger), "a sample is part of a larger one"
    shuffled = data.draw(st.permutations(examples))
    assert Counter(sample(shuffled, n, seed)) == Counter(chosen), "the order of the data does not choose"
    grown = sample([*examples, Example("new", "row")], n, seed)
    assert sum((Counter(chosen) - Counter(grown)).values()) <= 1, "a new row takes at most one place"
    rest = iter(examples)
    assert all(example in rest for example in chosen), "order is kept"


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_every_example_is_as_likely_as_any_other(start):
    examples = numbered(0, 20)
    counts = Counter(example for seed in range(start, start + 400) for example in sample(examples, 5, seed))
    # Binomial(400, 1/4): mean 100, standard deviation 8.7; 52 is six of them.
    assert all(48 <= counts[example] <= 152 for example in examples)


# Text


def test_normalising_overlooks_case_space_and_closing_punctuation_but_no_operator():
    assert normalised("How  many?\n") == normalised("how many") == normalised("“How many …”")
    assert normalised("Is it so, then?") == normalised("is it so then")
    assert len({normalised(text) for text in ("3 - 1", "3 * 1", "3 / 1", "3 + 1", "3 1", "3.1", "31")}) == 7
    assert len({normalised(text) for text in ("( [", "( (", "not ( True )", "not True")}) == 4


@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    assert folded(folded(text)) == folded(text)
    assert normalised(normalised(text)) == normalised(text)
