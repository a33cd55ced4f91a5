"""Files of rows, cut into pieces that can be read by themselves: byte ranges of JSONL, row groups of Parquet."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import islice
from pathlib import Path
from typing import Any

from infra.documents import did_you_mean
from infra.errors import InvalidInput, NotFound

PIECE_BYTES = 2**20  # of JSONL, at least; memory does not depend on it
_ROWS_AT_ONCE = 1024  # of Parquet
_BUFFER_BYTES = 2**20  # of a Parquet column that is being read; else pyarrow reads a whole row group

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet")

RawRow = bytes | dict[str, Any]  # a line as it stands in the file, or a row's values by column


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring lines or rows of one file.

    Args:
        path: the file.
        label: what its lines or rows are called, `data.jsonl line`.
        first: number of the first line or row in its file, from 1.
        lines: how many, blank lines included.
        blank: how many of them are blank lines.
        begin: byte of the file at which the first line begins; the row group of a Parquet file.
        stamp: size and time of change of the file when it was cut.
        position: of the first line or row in the pool, from 0.
    """

    path: Path
    label: str
    first: int
    lines: int
    blank: int
    begin: int
    stamp: tuple[int, int]
    position: int = 0

    def place(self, offset: int) -> str:
        """`data.jsonl line 17`."""
        return f"{self.label} {self.first + offset}"


def cut(path: Path, columns: list[str]) -> list[Piece]:
    """The pieces of a file, in order. JSONL is read once to count its lines; of Parquet only the footer is read.

    A compressed file is one piece, since its middle cannot be found.

    Args:
        path: JSONL (plain or gzip) or Parquet.
        columns: which a Parquet file must have; of JSONL each row is asked when it is read.

    Raises:
        NotFound: no such file.
        InvalidInput: a folder, a suffix that is not known, or a file that cannot be read or lacks a column.
    """
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder.", f"Name its files: '{path}/*.jsonl' or '{path}/*.parquet'.")
    if not path.name.lower().endswith(SUFFIXES):
        raise InvalidInput(f"{path.name} is no file of a pool.", f"Use one of {', '.join(SUFFIXES)}.")
    with _readable(path):
        stamp = _stamp(path)
        return _row_groups(path, stamp, columns) if _is_parquet(path) else _line_ranges(path, stamp)


def raw_rows(piece: Piece, columns: list[str]) -> Iterator[RawRow]:
    """The `piece.lines` lines or rows of a piece, blank lines included.

    Args:
        piece: where they are.
        columns: which to read of Parquet.

    Raises:
        NotFound: the file is gone.
        InvalidInput: it cannot be read, or is not the file that was cut.
    """
    with _readable(piece.path):
        if _stamp(piece.path) != piece.stamp:
            raise InvalidInput(f"{piece.path.name} changed while it was being read.", "Start again, and leave it be.")
        yield from _parquet_rows(piece, columns) if _is_parquet(piece.path) else _lines(piece)


def _line_ranges(path: Path, stamp: tuple[int, int]) -> list[Piece]:
    pieces: list[Piece] = []
    label = f"{path.name} line"
    first, begin, at, lines, blank = 1, 0, 0, 0, 0
    enough = float("inf") if _is_compressed(path) else PIECE_BYTES
    with _opened(path) as file:
        for line in file:
            lines += 1
            blank += line.isspace()
            at += len(line)
            if at - begin >= enough:
                pieces.append(Piece(path, label, first, lines, blank, begin, stamp))
                first, begin, lines, blank = first + lines, at, 0, 0
    if lines:
        pieces.append(Piece(path, label, first, lines, blank, begin, stamp))
    return pieces


def _lines(piece: Piece) -> Iterator[bytes]:
    with _opened(piece.path) as file:
        file.seek(piece.begin)
        yield from islice(file, piece.lines)


def _row_groups(path: Path, stamp: tuple[int, int], columns: list[str]) -> list[Piece]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        names = file.schema_arrow.names
        for column in columns:
            if column not in names:
                raise InvalidInput(
                    f"{path.name} has no column '{column}'. {did_you_mean(column, names)}",
                    f"It has: {', '.join(names) or 'nothing'}. Name the pool's columns with columns: its text, or its "
                    "prompt and completion.",
                )
        pieces, label, first = [], f"{path.name} row", 1
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            pieces.append(Piece(path, label, first, rows, 0, group, stamp))
            first += rows
    return pieces


def _parquet_rows(piece: Piece, columns: list[str]) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(piece.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[piece.begin], columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _opened(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if _is_compressed(path) else path.open("rb")


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What goes wrong with the file in here is said in the house's words."""
    import zlib

    from pyarrow import ArrowException

    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"{path} is not there.", "Check the path.") from None
    except (
        ArrowException,
        OSError,
        EOFError,
        UnicodeDecodeError,
        zlib.error,
    ) as error:  # gzip's BadGzipFile is an OSError
        raise InvalidInput(f"{path.name} cannot be read: {error}", "Check that the file is whole.") from None
