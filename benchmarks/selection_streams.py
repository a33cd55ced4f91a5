"""Rows a second and memory of the steps that stream a candidate pool, on one thread, against a plain way of each.

    python -m benchmarks.selection_streams [--rows 1000000] [--words 40] [--peer-rows 20000]

A pool of synthetic texts (Zipf's law over 50,000 words; a tenth are copies of earlier rows, of which half have a word
changed at the end) is written to a temporary Parquet. Each step runs in a process of its own; memory is how far its
highest resident size lies above that after its imports. Peers: `datasets` streaming the same file; a dictionary of
normalised texts; datasketch's MinHash and MinHashLSH with as many permutations and the same threshold; DSIR with the
authors' counting (a SHA-256 per n-gram). The slow peers see the first `--peer-rows` rows. Seconds are the processor's.
Linux only.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.results_file import Row, write

WORDS_KNOWN = 50_000
TARGET_ROWS = 1000


@dataclass(frozen=True)
class Measured:
    """One step over some rows: by the processor's time, and MiB of resident memory."""

    rows_per_second: float
    peak_memory: float
    memory_before: float
    found: int


@cache
def vocabulary() -> list[str]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 11, WORDS_KNOWN)
    return ["".join(map(chr, rng.integers(97, 123, length))) for length in lengths]


def texts(rows: int, length: int) -> Iterator[str]:
    """The pool's rows; copies are of one of the last 1,000 rows."""
    known, rng = np.array(vocabulary()), np.random.default_rng(1)
    shares = 1 / np.arange(1, WORDS_KNOWN + 1)
    edges = np.cumsum(shares / shares.sum())
    recent: list[str] = []
    for begin in range(0, rows, 1000):
        drawn = known[np.minimum(np.searchsorted(edges, rng.random((1000, length))), WORDS_KNOWN - 1)]
        fresh = [" ".join(row) for row in drawn]
        for place in np.flatnonzero(rng.random(1000) < 0.1) if recent else ():
            copy = recent[rng.integers(1000)]
            fresh[place] = copy if rng.random() < 0.5 else f"{copy.rpartition(' ')[0]} changed"
        yield from fresh[: rows - begin]
        recent = fresh


def write_pool(path: Path, rows: int, length: int) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    source = texts(rows, length)
    with ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        while part := list(islice(source, 50_000)):
            writer.write_table(pa.table({"text": part}))


@cache
def target() -> list[str]:
    """Texts of 2,000 rare words."""
    known, rng = vocabulary()[-2000:], np.random.default_rng(2)
    return [" ".join(known[at] for at in rng.integers(0, 2000, 40)) for _ in range(TARGET_ROWS)]


def read(path: Path, rows: int) -> int:
    from training.selection.pool import open_pool

    return sum(len(block.examples) for block in open_pool([path]).blocks())


def exact(path: Path, rows: int) -> int:
    from training.selection.near_duplicates import exact_duplicates
    from training.selection.pool import open_pool

    return len(exact_duplicates(open_pool([path])).dropped)


def near(path: Path, rows: int) -> int:
    from training.selection.near_duplicates import near_duplicates
    from training.selection.pool import open_pool

    return len(near_duplicates(open_pool([path])).dropped)


def importance(path: Path, rows: int) -> int:
    from training.selection.dsir import resample
    from training.selection.pool import open_pool

    return len(resample(open_pool([path]), target(), rows // 10, 0)[0])


def plain_rows(path: Path, rows: int) -> Iterator[str]:
    from pyarrow.parquet import ParquetFile

    found = (row["text"] for batch in ParquetFile(path).iter_batches(1024) for row in batch.to_pylist())
    return islice(found, rows)


def datasets_read(path: Path, rows: int) -> int:
    from datasets import load_dataset

    stream = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    return sum(1 for row in islice(stream, rows) if row["text"])


def dictionary_exact(path: Path, rows: int) -> int:
    from training.data.content_hash import normalised

    first: dict[str, int] = {}
    return sum(first.setdefault(normalised(text), row) != row for row, text in enumerate(plain_rows(path, rows)))


def datasketch_near(path: Path, rows: int) -> int:
    from datasketch import MinHash, MinHashLSH

    index, dropped = MinHashLSH(threshold=0.8, num_perm=128), 0
    for row, text in enumerate(plain_rows(path, rows)):
        words = text.split()
        sketch = MinHash(num_perm=128)
        sketch.update_batch([" ".join(words[at : at + 5]).encode() for at in range(max(1, len(words) - 4))])
        if index.query(sketch):
            dropped += 1
        else:
            index.insert(row, sketch)
    return dropped


def authors_importance(path: Path, rows: int) -> int:
    def counts(text: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        found = np.zeros(10_000, np.int64)
        words = re.findall(r"\w+|[^\w\s]+", text.lower())
        for gram in [*words, *map(" ".join, pairwise(words))]:
            found[int(hashlib.sha256(gram.encode()).hexdigest(), 16) % 10_000] += 1
        return found

    of_target, of_pool = sum(map(counts, target())), sum(map(counts, plain_rows(path, rows)))
    ratio = np.log(of_target / of_target.sum() + 1e-8) - np.log(of_pool / of_pool.sum() + 1e-8)
    weights = np.array([counts(text) @ ratio for text in plain_rows(path, rows)])
    keys = weights + np.random.default_rng(0).gumbel(size=len(weights))
    return len(np.argsort(-keys)[: rows // 10])


def alone(step: Callable[[Path, int], int], path: Path, rows: int) -> Measured:
    """The step in a fresh process, its imports made by one row's work before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_measured, step, path, rows).result()


def _measured(step: Callable[[Path, int], int], path: Path, rows: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.parquet"
        write_pool(small, 1000, 10)
        step(small, 1000)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    began = time.process_time()
    found = step(path, rows)
    return Measured(rows / (time.process_time() - began), _memory("VmHWM"), before, found)


def _memory(which: Literal["VmRSS", "VmHWM"]) -> float:
    """MiB resident now, or at most. (The peak of `getrusage` is inherited from the parent process.)"""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=40, help="of a row")
    parser.add_argument("--peer-rows", type=int, default=20_000, help="for peers that would take hours")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    few = min(options.rows, options.peer_rows)
    steps: dict[str, tuple[Callable[[Path, int], int], int]] = {
        "read": (read, options.rows),
        "exact": (exact, options.rows),
        "near": (near, options.rows),
        "dsir": (importance, options.rows),
        "datasets": (datasets_read, options.rows),
        "dictionary": (dictionary_exact, options.rows),
        "datasketch": (datasketch_near, few),
        "authors": (authors_importance, few),
    }
    measured: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.parquet"
        write_pool(path, options.rows, options.words)
        for name, (step, rows) in steps.items():
            measured[name] = alone(step, path, rows)
            print(name, json.dumps(asdict(measured[name])), flush=True)
    speed = {name: found.rows_per_second for name, found in measured.items()}
    grown = {name: max(1.0, found.peak_memory - found.memory_before) for name, found in measured.items()}
    pool = f"a pool of {options.rows:,} rows"
    per = "rows/s"
    write(
        "selection_streams",
        [
            Row(f"{pool} is read", speed["read"], speed["datasets"], "datasets, streaming", per, 1),
            Row(f"exact duplicates in {pool}", speed["exact"], speed["dictionary"], "a dictionary", per, 0.5),
            Row(f"near duplicates in {pool}", speed["near"], speed["datasketch"], "datasketch's MinHashLSH", per, 3),
            Row(f"DSIR over {pool}", speed["dsir"], speed["authors"], "the authors' way of counting", per, 3),
            Row(f"memory to read {pool}", grown["read"], 64, "what we allow", "MiB", 1, "lower"),
            Row(f"memory for exact duplicates in {pool}", grown["exact"], 128, "what we allow", "MiB", 1, "lower"),
            Row(f"memory for near duplicates in {pool}", grown["near"], 256, "what we allow", "MiB", 1, "lower"),
            Row(f"memory for DSIR over {pool}", grown["dsir"], 128, "what we allow", "MiB", 1, "lower"),
        ],
        details={
            "rows": options.rows,
            "words": options.words,
            "peer rows": few,
            "load": os.getloadavg()[0],
            "steps": {name: asdict(found) for name, found in measured.items()},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
