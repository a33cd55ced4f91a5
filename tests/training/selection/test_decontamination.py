"""Decontamination: the oracle looks for each item's n-grams in each row, as tuples of words."""

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import InvalidInput
from tests.training.selection.pool_files import pool_of
from training.data.example import Example
from training.data.rows import Columns
from training.selection import decontamination, pieces
from training.selection.decontamination import decontaminate, index, overlaps, report
from training.selection.pool import open_pool


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 128)


SENTENCES = st.lists(st.sampled_from("abc"), max_size=12).map(" ".join)


def plain(texts: list[str], items: list[str], n: int) -> list[tuple[int, tuple[int, ...]]]:
    """(row, items that it holds a piece of), of rows that hold one."""

    def grams(text: str, length: int) -> set[tuple[str, ...]]:
        found = text.split()
        return {tuple(found[at : at + length]) for at in range(len(found) - length + 1)}

    def hit(text: str, item: str) -> bool:
        length = len(item.split())
        if length == 0:
            return False
        if length < 4:
            return text.split() == item.split()
        return bool(grams(text, min(n, length)) & grams(item, min(n, length)))

    found = [(row, tuple(k for k, item in enumerate(items) if hit(text, item))) for row, text in enumerate(texts)]
    return [(row, hits) for row, hits in found if hits]


@given(
    st.lists(SENTENCES.filter(str.strip), min_size=1, max_size=12), st.lists(SENTENCES, min_size=1, max_size=9),
    st.integers(4, 7), st.integers(1, 5), st.integers(1, 4),
)  # fmt: skip
def test_rows_and_items_are_those_of_a_search_for_every_ngram(
    texts: list[str], items: list[str], n: int, block_rows: int, shards: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = pool_of(Path(folder), texts)
        sets = {"one": [Example(item, "") for item in items]}
        found = decontaminate(pool, sets, n)
        assert [(overlap.position, overlap.items) for overlap in found.overlaps] == plain(texts, items, n)
        assert all(overlap.ngram in texts[overlap.position] for overlap in found.overlaps)
        assert found.items_hit == {"one": len({item for _, hits in plain(texts, items, n) for item in hits})}
        known = index(sets, n)
        parts = replace(pool, block_rows=block_rows).shards(shards)
        assert report(known, [overlaps(part, known) for part in parts]) == found


QUESTION = "Which of the two trains that leave the station at noon arrives first in the city?"


def test_a_planted_item_is_found_with_its_set_and_words(tmp_path: Path) -> None:
    texts = [
        "Nothing to see here.",
        f"Somebody asked: {QUESTION.upper()} Nobody knew.",
        "of the two trains that leave the station at noon arrives first in",  # 13 words of it
        "of the two trains that leave the station at noon arrives first",  # 12
    ]
    sets = {
        "trains": [Example("Another question?", "No"), Example(QUESTION, "The red one")],
        "maths": [Example("1 + 1 = ?", "2")],
    }
    found = decontaminate(pool_of(tmp_path, texts), sets)
    assert found.dropped.tolist() == [1, 2]
    assert [(overlap.evaluation_set, overlap.items) for overlap in found.overlaps] == [("trains", (1,))] * 2
    assert found.overlaps[0].ngram == "which of the two trains that leave the station at noon arrives first"
    assert found.items_hit == {"trains": 1, "maths": 0} and found.sizes == {"trains": 2, "maths": 1}


def test_a_short_item_is_found_whole_and_a_phrase_only_where_it_is_all_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": "Tell me: is seventeen a prime number, or not?", "completion": "Yes"}\n'
        '{"prompt": "Is seventeen a prime?", "completion": "Yes"}\n'
        '{"prompt": "Capital of France?", "completion": "Paris"}\n'
        '{"prompt": "The capital of France is big", "completion": "Yes"}\n'
    )
    sets = {"short": [Example("Is seventeen a prime number?", "Yes"), Example("Capital of France", "Paris")]}
    found = decontaminate(open_pool([path], Columns()), sets)
    assert [(overlap.position, overlap.items, overlap.ngram) for overlap in found.overlaps] == [
        (0, (0,), "is seventeen a prime number"),
        (2, (1,), "capital of france"),
    ]


def test_a_long_completion_is_looked_for_and_a_short_one_is_not(tmp_path: Path) -> None:
    summary = "In short the council will vote in May on whether the old bridge should stay open"
    sets = {
        "summaries": [
            Example("Summarise: (a long report).", summary),
            Example("Did it rain today in Rome?", "It did not"),
        ]
    }
    found = decontaminate(pool_of(tmp_path, [f"News. {summary}", "It did not", "Yes"]), sets)
    assert [(overlap.position, overlap.items) for overlap in found.overlaps] == [(0, (0,))]


def test_the_wording_that_many_items_share_is_no_item(tmp_path: Path) -> None:
    asked = "Read the two numbers below with care and say which one of the two is greater:"
    items = [Example(f"{asked} {number} {number + 1}", "") for number in range(11)]
    pool = pool_of(tmp_path, [f"{asked} 100 200", f"{asked} 3 4"])
    found = decontaminate(pool, {"numbers": items})
    assert [(overlap.position, overlap.items) for overlap in found.overlaps] == [(1, (3,))]
    assert found.templates == {"numbers": 4}  # 16 words that are the same in all
    assert decontaminate(pool, {"numbers": items[:10]}).dropped.tolist() == [0, 1]
    assert decontaminate(pool, {"numbers": [items[3]] * 11}).items_hit == {"numbers": 11}  # one text, told often


def test_sets_are_told_apart(tmp_path: Path) -> None:
    found = decontaminate(pool_of(tmp_path, [QUESTION]), {"b": [Example(QUESTION, "")], "a": [Example(QUESTION, "")]})
    assert [overlap.evaluation_set for overlap in found.overlaps] == ["a", "b"]
    assert found.items_hit == {"a": 1, "b": 1} and found.dropped.tolist() == [0]


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_what_is_left_has_no_overlap(seed: int) -> None:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices("abcd", k=rng.randint(1, 30))) for _ in range(40)]
    sets = {"some": [Example(" ".join(rng.choices("abcd", k=9)), "") for _ in range(8)]}
    with tempfile.TemporaryDirectory() as folder:
        pool = pool_of(Path(folder), texts)
        left = pool.without(decontaminate(pool, sets, 5).dropped)
        assert decontaminate(left, sets, 5).overlaps == ()


def test_what_cannot_be_looked_for_is_refused(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, ["a"])
    with pytest.raises(InvalidInput, match="evaluation set trains is empty"):
        decontaminate(pool, {"trains": []})
    with pytest.raises(InvalidInput, match="N-grams of 3 words"):
        decontaminate(pool, {"trains": [Example("a", "")]}, 3)
    assert decontamination.NGRAM_WORDS == 13
