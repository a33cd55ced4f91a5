"""Pools: the oracle reads each file whole, with json and pyarrow."""

import gc
import gzip
import json
import pickle
import random
import re
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import InvalidInput, NotFound
from tests.training.selection.pool_files import pool_of, write_texts
from training.data.example import Example
from training.data.rows import Columns
from training.selection import pieces
from training.selection.pool import Pool, content_sum, fingerprint, open_pool

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
NAMES = ("b.jsonl", "a.parquet", "c.ndjson.gz")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64)


def rows(pool: Pool) -> list[tuple[tuple[str, int], int, str]]:
    return [
        (pool.origin(position), position, example.prompt)
        for block in pool.blocks()
        for position, example in zip(block.positions.tolist(), block.examples, strict=True)
    ]


@given(st.tuples(*[st.lists(TEXTS, max_size=9)] * 3).filter(any), st.integers(1, 12), st.integers(1, 9))
def test_blocks_and_shards_are_the_files_rows_in_order(
    texts: tuple[list[str], ...], block_rows: int, shards: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = [write_texts(Path(folder) / name, part) for name, part in zip(NAMES, texts, strict=True)]
        pool = replace(open_pool(files), block_rows=block_rows)
        wanted = [
            ((str(file), number), text)
            for file, part in zip(files, texts, strict=True)
            for number, text in enumerate(part, start=1)
        ]
        found = rows(pool)
        assert [(origin, text) for origin, _, text in found] == wanted
        assert [position for _, position, _ in found] == list(range(len(wanted)))
        assert pool.rows == len(wanted)
        assert all(len(block.examples) == block_rows for block in list(pool.blocks())[:-1])
        parts = [pickle.loads(pickle.dumps(shard)) for shard in pool.shards(shards)]
        assert len(parts) == shards
        assert [row for shard in parts for row in rows(shard)] == found


def test_shards_share_the_rows_about_evenly(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, [f"text number {number}" for number in range(1000)])
    assert all(240 <= shard.rows <= 260 for shard in pool.shards(4))


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n  \r\n{"text": "two"}\r\n{"text": "three"}')
    pool = open_pool([path])
    assert [(origin[1], text) for origin, _, text in rows(pool)] == [(1, "one"), (4, "two"), (5, "three")]
    assert (pool.rows, pool.size) == (3, 5)


def test_patterns_name_files_in_order_and_each_file_once(tmp_path: Path) -> None:
    for name in ("2.jsonl", "10.jsonl", "1.jsonl"):
        write_texts(tmp_path / name, [name])
    pool = open_pool([str(tmp_path / "2.jsonl"), str(tmp_path / "*.jsonl")])
    assert [text for _, _, text in rows(pool)] == ["2.jsonl", "1.jsonl", "10.jsonl"]
    with pytest.raises(NotFound, match=r"No file fits .*\*\.parquet"):
        open_pool([str(tmp_path / "*.parquet")])


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_prompts_and_completions_are_read_from_their_columns(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pairs.{suffix}"
    content = [{"q": "How many?", "a": " 3 ", "other": 1}, {"q": "Why?", "a": "So.", "other": 2}]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    (block,) = open_pool([path], Columns(prompt="q", completion="a")).blocks()
    assert block.examples == [Example("How many?", "3"), Example("Why?", "So.")]
    assert block.texts == ["How many? 3", "Why? So."]


@given(st.sets(st.integers(0, 49)), st.sets(st.integers(0, 49)), st.integers(1, 5))
def test_a_pool_of_some_rows_has_those_rows_at_their_positions(first: set[int], second: set[int], shards: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = pool_of(Path(folder), [f"text {number}" for number in range(50)])
        narrowed = pool.only(np.array(sorted(first), np.int64)).without(np.array(sorted(second), np.int64))
        left = sorted(first - second)
        assert [(position, text) for _, position, text in rows(narrowed)] == [(n, f"text {n}") for n in left]
        assert narrowed.rows == len(left)
        assert [row for shard in narrowed.shards(shards) for row in rows(shard)] == rows(narrowed)
        assert rows(narrowed.only(np.arange(25)))[-1:] == [row for row in rows(narrowed) if row[1] < 25][-1:]


def test_a_fingerprint_names_the_rows_whatever_their_order_and_format(tmp_path: Path) -> None:
    def name(*pools: Pool) -> str:
        return fingerprint(content_sum(block.examples) for pool in pools for block in pool.blocks())

    texts = ["one", "two", "two", "three"]
    plain = pool_of(tmp_path, texts)
    other = open_pool(
        [write_texts(tmp_path / "a.parquet", ["two", "one"]), write_texts(tmp_path / "b.jsonl.gz", ["three", "two"])]
    )
    assert name(plain) == name(other) == name(*plain.shards(3)) and len(name(plain)) == 64
    for changed in (["one", "two", "three"], ["one", "one", "two", "three"], ["one", "two", "two", "Three"]):
        assert name(pool_of(tmp_path, changed)) != name(other)


def test_a_fingerprint_names_the_tests_of_programs_too(tmp_path: Path) -> None:
    names = set()
    for number, tests in enumerate(("assert f(1) == 1", "assert f(2) == 2")):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"prompt": ["f"], "completion": ["def f(x): return x"], "checks": [tests]}), path)
        (block,) = open_pool([path], Columns(tests="checks")).blocks()
        assert block.examples[0].tests == tests
        names.add(fingerprint([content_sum(block.examples)]))
    assert len(names) == 2


def test_errors_of_a_pool_name_keys_that_a_selection_has(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "pool.jsonl", ["one"])
    with pytest.raises(InvalidInput) as error:
        list(open_pool([path], Columns(prompt="question")).blocks())
    assert "Name the column with columns.prompt" in error.value.remedy
    path.write_bytes(b'{"text": ""}')
    with pytest.raises(InvalidInput) as error:
        list(open_pool([path]).blocks())
    assert error.value.remedy == "Fill it in. Or leave such rows out: on_bad: skip."


GOOD = b'{"text": "good"}\n'
BAD_LINES = [
    (b'{"text": "unfinished\n', r"bad.jsonl line 2 is not JSON"),
    (b'["good"]\n', r"bad.jsonl line 2 is a JSON array"),
    (b'{"txt": "good"}\n', r"bad.jsonl line 2 has no column 'text'. Did you mean 'txt'"),
    (b'{"text": {"a": 1}}\n', r"bad.jsonl line 2: text is dict, not text"),
    (b'{"text": 1.5}\n', r"bad.jsonl line 2: text is float, not text"),
    (b'{"text": 5}\n', r"bad.jsonl line 2: text is int, not text"),
    (b'{"text": null}\n', r"bad.jsonl line 2: text is empty"),
    (b'{"text": " "}\n', r"bad.jsonl line 2: text is empty"),
    (b'{"text": "\\ud800"}\n', r"bad.jsonl line 2: text holds half of a surrogate pair"),
    (b'{"text": "\xff"}\n', r"bad.jsonl line 2 is not UTF-8 text"),
    (b"[" * 100_000 + b"\n", r"bad.jsonl line 2 is nested too deeply"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_row_that_cannot_be_used_is_named_or_counted(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + line + GOOD + line)
    with pytest.raises(InvalidInput, match=message) as error:
        list(open_pool([path]).blocks())
    assert "on_bad: skip" in error.value.remedy
    blocks = list(replace(open_pool([path], on_bad="skip"), block_rows=1).blocks())
    assert [position for block in blocks for position in block.positions.tolist()] == [0, 2]
    assert sum(block.skipped for block in blocks) == 2
    assert re.search(message, next(block.why for block in blocks if block.why))


def test_a_null_in_parquet_is_named_by_its_row(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "bad.parquet", ["a", "b", "c", None, "e"])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match=r"bad.parquet row 4: text is empty"):
        list(open_pool([path]).blocks())


def test_files_that_are_none_of_a_pool_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n")
    (tmp_path / "rows.csv").write_text("text\na\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(GOOD * 1000)[:-10])
    (tmp_path / "plain.jsonl.gz").write_bytes(GOOD)
    write_texts(tmp_path / "none.parquet", [])
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "body.parquet")
    for name, message in {
        "empty.jsonl": "The pool is empty: .*empty.jsonl has no row",
        "blank.jsonl": "The pool is empty",
        "none.parquet": "The pool is empty",
        "rows.csv": "rows.csv is no file of a pool",
        "broken.parquet": "broken.parquet cannot be read",
        "folder.jsonl": "folder.jsonl is a folder",
        "torn.jsonl.gz": "torn.jsonl.gz cannot be read",
        "plain.jsonl.gz": "plain.jsonl.gz cannot be read",
        "body.parquet": "body.parquet has no column 'text'",
    }.items():
        with pytest.raises(InvalidInput, match=message):
            open_pool([tmp_path / name])
    with pytest.raises(NotFound, match=r"absent.jsonl is not there"):
        open_pool([tmp_path / "absent.jsonl"])


def test_damage_in_the_middle_of_a_parquet_file_is_told_in_the_houses_words(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "damaged.parquet", [f"{number} {'x' * 50}" for number in range(1000)], 1000)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"damaged.parquet cannot be read"):
        list(open_pool([path]).blocks())


def test_bytes_that_are_no_text_in_a_parquet_column_of_texts_are_told(tmp_path: Path) -> None:
    array = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"text": array}), tmp_path / "bytes.parquet")
    with pytest.raises(InvalidInput, match=r"bytes.parquet cannot be read: 'utf-8' codec"):
        list(open_pool([tmp_path / "bytes.parquet"]).blocks())


def test_a_file_that_changes_between_two_readings_is_refused(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, ["one", "two"])
    write_texts(tmp_path / "pool.jsonl", ["one", "two", "three"])
    with pytest.raises(InvalidInput, match=r"pool.jsonl changed"):
        list(pool.blocks())
    (tmp_path / "pool.jsonl").unlink()
    with pytest.raises(NotFound, match=r"pool.jsonl is not there"):
        list(pool.blocks())


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_pool(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2**16)

    def peak(number: int) -> tuple[int, int]:
        """Bytes of Python's and of Arrow's memory, the most at once."""
        texts = [random.Random(row).randbytes(50).hex() for row in range(number)]  # nothing to compress
        path = write_texts(tmp_path / f"{number}.{suffix}", texts, group_rows=number)
        del texts
        gc.collect()  # what other tests left behind must not go in the middle of it
        arrow = pa.total_allocated_bytes()
        tracemalloc.start()
        try:
            pool = replace(open_pool([path]), block_rows=500)
            arrow_peak = max(pa.total_allocated_bytes() - arrow for _ in pool.blocks())
            return tracemalloc.get_traced_memory()[1], arrow_peak
        finally:
            tracemalloc.stop()

    few, many = peak(10_000), peak(100_000)  # 1 and 10 MB of text
    assert many[0] < few[0] + 3_000_000, "other threads of the process count, too"
    assert many[1] < few[1] + 3_000_000, "a page and a dictionary more"
