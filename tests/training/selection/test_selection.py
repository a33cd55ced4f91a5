import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import InvalidInput
from training.data.example import Example, fingerprint
from training.selection.selection import Selection, select

EXAMPLES = [Example("word " * n, "x") for n in range(1, 11)]  # 6, 11, … 51 characters; 2 to 11 words


def words(example: Example) -> int:
    return len(f"{example.prompt} {example.completion}".split())


def test_everything_is_kept_where_nothing_is_asked():
    report = select(EXAMPLES, Selection(), seed=0)
    assert report.examples == tuple(EXAMPLES)
    assert set(report.dropped.values()) == {0}
    assert report.fingerprint_before == report.fingerprint_after == fingerprint(EXAMPLES)


def test_lengths_in_tokens_are_those_of_the_function_given():
    report = select(EXAMPLES, Selection(min_length=3, max_length=5, too_long="drop"), 0, words)
    assert report.examples == tuple(EXAMPLES[1:4])
    assert (report.dropped["too_short"], report.dropped["too_long"]) == (1, 6)
    with pytest.raises(InvalidInput, match="need a tokenizer"):
        select(EXAMPLES, Selection(max_length=5), 0)


def test_lengths_in_characters_need_no_tokenizer():
    report = select(EXAMPLES, Selection(min_length=11, max_length=21, unit="characters", too_long="drop"), 0)
    assert report.examples == tuple(EXAMPLES[1:4])


def test_a_too_long_example_is_an_error_that_names_it():
    with pytest.raises(InvalidInput, match=r"Training example 5 has 6 tokens, above .*max_length 5: 'word") as error:
        select(EXAMPLES, Selection(max_length=5), 0, words)
    assert "too_long to drop" in error.value.remedy


@pytest.mark.parametrize(("level", "kept"), [("none", 5), ("exact", 4), ("normalised", 2)])
def test_duplicates_are_found_at_the_level_asked_for(level, kept):
    examples = [
        Example("How many?", "3"),
        Example("How many?", "3"),
        Example("how  many", "3"),
        Example("“How many?”", "3."),
        Example("How many?", "4"),
    ]
    report = select(examples, Selection(deduplicate=level), 0)
    assert len(report.examples) == kept
    assert report.dropped["duplicate"] == 5 - kept
    assert report.examples[0] == examples[0] and report.examples[-1] == examples[-1]


def test_a_sample_is_seeded_and_at_most_what_there_is():
    one, same, other = (select(EXAMPLES, Selection(sample=4), seed).examples for seed in (1, 1, 2))
    assert one == same and len(one) == len(other) == 4 and one != other
    assert select(EXAMPLES, Selection(sample=40), 1).examples == tuple(EXAMPLES)


def test_nothing_left_is_an_error_that_counts_the_reasons():
    with pytest.raises(InvalidInput, match=r"none of the 10 examples \(10 too short\)"):
        select(EXAMPLES, Selection(min_length=100), 0, words)
    with pytest.raises(InvalidInput, match="there were none"):
        select([], Selection(), 0)


@pytest.mark.parametrize(
    "content", [{"sample": 0}, {"max_length": 0}, {"min_length": 5, "max_length": 4}, {"dedup": 1}]
)
def test_impossible_selections_are_refused(content):
    with pytest.raises(ValidationError):
        Selection.model_validate(content)


@given(
    examples=st.lists(st.builds(Example, st.text("ab A", min_size=1), st.sampled_from(["0", "1"])), min_size=1),
    longest=st.integers(2, 12),
    level=st.sampled_from(["none", "exact", "normalised"]),
    n=st.integers(1, 10),
    seed=st.integers(0, 2**32),
)
def test_the_report_accounts_for_every_example(examples, longest, level, n, seed):
    config = Selection(max_length=longest, unit="characters", too_long="drop", deduplicate=level, sample=n)
    try:
        report = select(examples, config, seed)
    except InvalidInput:
        assert all(len(example.prompt) + 1 > longest for example in examples)
        return
    assert len(report.examples) + sum(report.dropped.values()) == len(examples)
    assert 1 <= len(report.examples) <= n
    assert all(len(example.prompt) + 1 <= longest for example in report.examples)
    assert level == "none" or len(set(report.examples)) == len(report.examples)
    rest = iter(examples)
    assert all(example in rest for example in report.examples), "order is kept"
    assert report == select(examples, config, seed)
