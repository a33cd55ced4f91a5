"""Files of a pool, written the plain way."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from training.selection.pool import Pool, open_pool


def write_texts(path: Path, texts: Sequence[str], group_rows: int = 3) -> Path:
    """One text a row, in the format that the name promises; returns `path`."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=group_rows)
    else:
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def pool_of(folder: Path, texts: Sequence[str]) -> Pool:
    return open_pool([write_texts(folder / "pool.jsonl", texts)])
