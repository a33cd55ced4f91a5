"""Duplicates: the oracle compares every row with every earlier one that stays, on sets of word tuples."""

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import InvalidInput
from tests.training.selection.pool_files import pool_of
from training.data.content_hash import normalised
from training.data.rows import Columns
from training.selection import near_duplicates as duplicates
from training.selection import pieces
from training.selection.near_duplicates import banding, exact_duplicates, near_duplicates
from training.selection.pool import Pool, open_pool
from training.selection.word_hashes import words

WORDS = [f"word{number}" for number in range(500)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 256)


def plain_jaccard(one: str, other: str) -> float:
    def shingles(text: str) -> set[tuple[str, ...]]:
        found = normalised(text).split()
        return {tuple(found[at : at + 5]) for at in range(max(1, len(found) - 4))} if found else set()

    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b) if a | b else 0.0


def plain_near_duplicates(texts: list[str], threshold: float) -> list[tuple[int, int]]:
    """(dropped, original), rows judged in order."""
    stay: list[int] = []
    dropped = []
    for row, text in enumerate(texts):
        like = [other for other in stay if plain_jaccard(text, texts[other]) >= threshold]
        if like:
            dropped.append((row, like[0]))
        else:
            stay.append(row)
    return dropped


def pairs(found: duplicates.Duplicates) -> list[tuple[int, int]]:
    return list(zip(found.dropped.tolist(), found.originals.tolist(), strict=True))


def likenesses(seed: int, number: int) -> list[str]:
    """Texts of 2 to 120 words; half of them are earlier ones with up to three words changed at one end."""
    rng = random.Random(seed)
    texts: list[list[str]] = []
    for _ in range(number):
        if texts and rng.random() < 0.5:
            text = list(rng.choice(texts))
            for at in range(rng.randint(0, min(3, len(text)))):
                text[at] = rng.choice(WORDS)
        else:
            text = rng.choices(WORDS, k=rng.choice([2, 3, 4, 5, 6, 9, 30, 60, 120]))
        texts.append(text)
    return [" ".join(text) for text in texts]


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_what_is_dropped_is_what_a_comparison_of_all_pairs_drops(seed: int, number: int) -> None:
    texts = likenesses(seed, number)  # with pairs far above 0.5, which are missed once in millions, and far below
    with tempfile.TemporaryDirectory() as folder:
        found = near_duplicates(pool_of(Path(folder), texts), 0.5)
    assert pairs(found) == plain_near_duplicates(texts, 0.5)


def test_every_dropped_row_is_like_an_earlier_one_that_stays(tmp_path: Path) -> None:
    texts = likenesses(3, 400)
    found = near_duplicates(pool_of(tmp_path, texts), 0.8)
    assert len(found.dropped) > 100 and not set(found.dropped) & set(found.originals)
    for row, original in pairs(found):
        assert original < row and plain_jaccard(texts[row], texts[original]) >= 0.8
    assert found.groups == len(set(found.originals.tolist()))


def test_pairs_just_above_the_threshold_are_found(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = []
    for _ in range(500):
        text = rng.sample(WORDS, 94)  # 90 shingles
        texts += [" ".join(text), " ".join([*text[:84], *(f"new{at}" for at in range(10))])]  # 80 of 100 are common
    assert plain_jaccard(*texts[:2]) == 0.8
    found = near_duplicates(pool_of(tmp_path, texts), 0.8)
    assert set(pairs(found)) <= {(row + 1, row) for row in range(0, 1000, 2)}
    assert len(found.dropped) >= 485  # 499 expected


def test_pairs_just_below_the_threshold_stay(tmp_path: Path) -> None:
    text = [f"word{at}" for at in range(94)]
    texts = [" ".join(text), " ".join([*text[:83], *(f"new{at}" for at in range(11))])]  # 79 of 101
    assert len(near_duplicates(pool_of(tmp_path, texts), 0.8).dropped) == 0
    assert len(near_duplicates(pool_of(tmp_path, texts), 0.78).dropped) == 1


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 7))
def test_blocks_and_shards_make_no_difference(seed: int, block_rows: int, shards: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = pool_of(Path(folder), [*likenesses(seed, 30), "one", "One.", "..."])
        near, exact = near_duplicates(pool, 0.8), exact_duplicates(pool)
        parts = replace(pool, block_rows=block_rows).shards(shards)
        folders = [Path(folder) / f"sketch-{number}" for number in range(shards)]
        for part, sketch in zip(parts, folders, strict=True):
            sketch.mkdir()
            duplicates.sketch(part, sketch, 0.8)
        assert pairs(duplicates.judge(pool, folders, 0.8)) == pairs(near)
        assert pairs(duplicates.repeated([duplicates.content_hashes(part) for part in parts])) == pairs(exact)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_of_copies_in_any_order_the_first_of_each_stays(seed: int, copies: int) -> None:
    rng = random.Random(seed)
    texts = [" ".join(rng.sample(WORDS, 20)) for _ in range(8)] * copies
    rng.shuffle(texts)
    first = {text: texts.index(text) for text in texts}
    wanted = [(row, first[text]) for row, text in enumerate(texts) if row != first[text]]
    with tempfile.TemporaryDirectory() as folder:
        pool = pool_of(Path(folder), texts)
        assert pairs(exact_duplicates(pool)) == wanted
        assert pairs(near_duplicates(pool)) == wanted


def test_rows_that_differ_in_what_makes_no_difference_are_exact_duplicates(tmp_path: Path) -> None:
    texts = ["3 - 1", "Two words.", "two  WORDS", "3 * 1", "“Two words!”", "two word"]
    assert pairs(exact_duplicates(pool_of(tmp_path, texts))) == [(2, 1), (4, 1)]


def test_one_prompt_with_two_completions_is_no_exact_duplicate(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": "a b", "completion": "c"}\n{"prompt": "a", "completion": "b c"}\n'
        '{"prompt": "A b", "completion": "d"}\n{"prompt": "A b", "completion": "C."}\n'
    )
    assert pairs(exact_duplicates(open_pool([path], Columns()))) == [(3, 0)]


def test_exact_duplicates_are_those_of_a_dictionary(tmp_path: Path) -> None:
    rng = random.Random(1)
    texts = [str(rng.randrange(2000)) for _ in range(3000)]
    first: dict[str, int] = {}
    wanted = [(row, first[text]) for row, text in enumerate(texts) if first.setdefault(text, row) != row]
    found = exact_duplicates(pool_of(tmp_path, texts))
    assert pairs(found) == wanted and found.groups == len({original for _, original in wanted})


def test_short_texts_are_like_others_only_where_they_are_equal(tmp_path: Path) -> None:
    texts = ["a b c d", "a b c e", "A b c d.", "a b c", "a b c d e", "...", "!!"]
    assert pairs(near_duplicates(pool_of(tmp_path, texts), 0.1)) == [(2, 0)]


def test_rows_without_a_word_are_like_nothing(tmp_path: Path) -> None:
    assert pairs(near_duplicates(pool_of(tmp_path, ["...", "!!", "...", ".. !"]))) == []


def test_scripts_without_spaces_are_cut_into_characters() -> None:
    assert words("ウサギとカメ、 ok 2.") == [*"ウサギとカメ", "、", "ok", "2"]
    assert words("Don't (stop) – 3 - 1!") == ["dont", "(stop)", "–", "3", "-", "1"]


def test_a_row_of_chinese_with_one_character_changed_is_a_near_duplicate(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + 7 * at) for at in range(100))
    changed = text[:50] + "啊" + text[51:]
    assert pairs(near_duplicates(pool_of(tmp_path, [text, changed]))) == [(1, 0)]


def test_a_likeness_is_found_among_rows_that_are_only_somewhat_like_it(tmp_path: Path) -> None:
    text = [f"word{at}" for at in range(104)]
    crowd = [  # each like the text by (100 − 15) / (100 + 15); each of its buckets has one of them
        " ".join([*text[:at], *(f"new{at}-{k}" for k in range(11)), *text[at + 11 :]]) for at in range(4, 84)
    ]
    texts = [*crowd, " ".join(text), " ".join([*text[:-1], "end"])]
    assert max(plain_jaccard(one, " ".join(text)) for one in crowd) < 0.8
    assert pairs(near_duplicates(pool_of(tmp_path, texts))) == plain_near_duplicates(texts, 0.8)
    assert plain_near_duplicates(texts, 0.8)[-1] == (81, 80)


def test_a_row_that_is_like_a_dropped_one_alone_stays(tmp_path: Path) -> None:
    text = [f"word{at}" for at in range(104)]
    new = [f"new{at}" for at in range(16)]
    chain = [" ".join([*new[:changed], *text[changed:]]) for changed in (0, 8, 12)]
    assert min(plain_jaccard(*chain[:2]), plain_jaccard(*chain[1:])) > 0.8 > plain_jaccard(chain[0], chain[2])
    assert pairs(near_duplicates(pool_of(tmp_path, chain), 0.8)) == [(1, 0)]


def test_dropped_rows_are_not_looked_at_again(tmp_path: Path) -> None:
    texts = likenesses(5, 100)
    pool: Pool = pool_of(tmp_path, texts)
    left = pool.without(near_duplicates(pool).dropped)
    assert left.rows < 100 and len(near_duplicates(left).dropped) == 0


def test_a_threshold_that_is_no_similarity_is_refused(tmp_path: Path) -> None:
    for threshold in (0.0, 1.1, float("nan")):
        with pytest.raises(InvalidInput, match="no threshold"):
            near_duplicates(pool_of(tmp_path, ["a"]), threshold)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold_and_are_as_long_as_they_may_be(threshold: float) -> None:
    bands, length = banding(threshold)
    assert bands * length <= 128
    assert 1 - (1 - threshold**length) ** bands >= 0.99
    longer = length + 1
    assert longer > 128 or 1 - (1 - threshold**longer) ** (128 // longer) < 0.99


def test_minhash_agrees_with_itself_however_rows_are_grouped(tmp_path: Path) -> None:
    texts = likenesses(9, 50)
    columns = []
    for block_rows in (1, 50):
        (tmp_path / str(block_rows)).mkdir()
        duplicates.sketch(replace(pool_of(tmp_path, texts), block_rows=block_rows), tmp_path / str(block_rows), 0.8)
        columns.append(np.fromfile(tmp_path / str(block_rows) / "band-007.u64", np.uint64))
    assert len(columns[0]) == 50 and np.array_equal(*columns)
