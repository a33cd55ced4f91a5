"""A candidate pool: rows of many files as one stream, of which no more than a block is in memory."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from infra.errors import InvalidInput, NotFound
from training.data.example import Example
from training.data.files import decoded_line, json_object
from training.data.rows import Columns, to_example
from training.selection.pieces import Piece, RawRow, cut, raw_rows

BLOCK_ROWS = 4096

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Neighbouring rows of a pool.

    Args:
        positions: of each row in the pool, ascending.
        examples: the rows.
        skipped: how many rows among them could not be used and are left out.
        why: what is wrong with the first of these.
    """

    positions: Positions
    examples: list[Example]
    skipped: int = 0
    why: str = ""

    @property
    def texts(self) -> list[str]:
        """Prompt and completion of each row as one text."""
        return [example.text for example in self.examples]


@dataclass(frozen=True)
class Pool:
    """Rows of files in a fixed order, read as often as need be. Part of a pool (a shard, some rows) is a pool, too.

    A row's position counts the lines and rows before it in all files, blank lines included, so that it can be known
    without reading them; it is the same in every shard, and `origin` turns it into file and line. What is kept of each
    row of a pool is therefore one number in an array.

    Args:
        pieces: of the files, in order.
        size: one more than the highest position of the whole pool.
        columns: where a row keeps what.
        on_bad: what to do with a row that cannot be used: stop, or leave it out and count it.
        block_rows: how many rows are in memory at once. No result depends on it.
        wanted: bool [size], which positions belong to the pool. Default: all.
    """

    pieces: tuple[Piece, ...]
    size: int
    columns: Columns
    on_bad: Literal["error", "skip"] = "error"
    block_rows: int = BLOCK_ROWS
    wanted: NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)

    def blocks(self) -> Iterator[Block]:
        """The pool's rows, `block_rows` at a time; fewer in the last block.

        Raises:
            InvalidInput: a row that cannot be used, by file and line (unless skipped), or a file that changed.
        """
        positions: list[int] = []
        examples: list[Example] = []
        skipped, why = 0, ""
        for piece, offset, raw in self._raw_rows():
            try:
                examples.append(_example(piece, offset, raw, self.columns))
            except InvalidInput as error:
                if self.on_bad == "error":
                    raise InvalidInput(error.what, f"{error.remedy} Or leave such rows out: on_bad: skip.") from None
                skipped, why = skipped + 1, why or error.what
                continue
            positions.append(piece.position + offset)
            if len(examples) == self.block_rows:
                yield Block(np.array(positions, np.int64), examples, skipped, why)
                positions, examples, skipped, why = [], [], 0, ""
        if examples or skipped:
            yield Block(np.array(positions, np.int64), examples, skipped, why)

    @property
    def rows(self) -> int:
        """How many rows it has at most: which of them cannot be used is known once they are read.

        In a part of a pool blank lines count, too.
        """
        if self.wanted is None:
            return sum(piece.lines - piece.blank for piece in self.pieces)
        return sum(int(self._wanted_of(piece).sum()) for piece in self.pieces)

    def shards(self, number: int) -> list["Pool"]:
        """`number` neighbouring parts of about as many rows, in order; some are empty where there are few pieces."""
        total = sum(piece.lines for piece in self.pieces)
        parts: list[list[Piece]] = [[] for _ in range(number)]
        before = 0
        for piece in self.pieces:
            middle = before + piece.lines / 2
            parts[min(number - 1, int(middle * number / total))].append(piece)
            before += piece.lines
        return [replace(self, pieces=tuple(part)) for part in parts]

    def only(self, positions: Positions) -> "Pool":
        """The pool of those of its rows that stand at `positions`."""
        chosen = np.zeros(self.size, np.bool_)
        chosen[positions] = True
        return replace(self, wanted=chosen if self.wanted is None else chosen & self.wanted)

    def without(self, positions: Positions) -> "Pool":
        """The pool of its rows that do not stand at `positions`."""
        left = np.ones(self.size, np.bool_) if self.wanted is None else self.wanted.copy()
        left[positions] = False
        return replace(self, wanted=left)

    def origin(self, position: int) -> tuple[str, int]:
        """File, and line or row number from 1: what a row is called for good."""
        index = bisect_right(self.pieces, position, key=lambda piece: piece.position) - 1
        piece = self.pieces[max(index, 0)]
        if not 0 <= position - piece.position < piece.lines:
            raise IndexError(f"position {position} is not in this pool")
        return str(piece.path), piece.first + position - piece.position

    def _raw_rows(self) -> Iterator[tuple[Piece, int, RawRow]]:
        """What is wanted, without blank lines; pieces and lines that nobody wants are not decoded."""
        for piece in self.pieces:
            wanted = None if self.wanted is None else self._wanted_of(piece)
            if wanted is not None and not wanted.any():
                continue
            for offset, raw in enumerate(raw_rows(piece, self.columns.names)):
                if (wanted is None or wanted[offset]) and not (isinstance(raw, bytes) and raw.isspace()):
                    yield piece, offset, raw

    def _wanted_of(self, piece: Piece) -> NDArray[np.bool_]:
        assert self.wanted is not None
        return self.wanted[piece.position : piece.position + piece.lines]


def open_pool(
    paths: Sequence[str | Path],
    columns: Columns | None = None,
    on_bad: Literal["error", "skip"] = "error",
) -> Pool:
    """The pool of some files: JSONL (`.jsonl`, `.ndjson`, also with `.gz`) and Parquet, in the order given.

    Args:
        paths: files, or patterns (`shards/*.parquet`), whose files come in order of their names; a file that is named
            twice counts once.
        columns: where a row keeps what. Default: plain text in `text`.
        on_bad: what to do with a row that cannot be used.

    Raises:
        NotFound: a file that is not there, or a pattern that fits none.
        InvalidInput: a file that cannot be read, lacks a column, or a pool without a row.
    """
    columns = columns or Columns(text="text")
    files = dict.fromkeys(file for path in paths for file in _files(str(path)))
    pieces: list[Piece] = []
    size = 0
    for file in files:
        for piece in cut(file, columns.names):
            pieces.append(replace(piece, position=size))
            size += piece.lines
    pool = Pool(tuple(pieces), size, columns, on_bad)
    if not pool.rows:
        raise InvalidInput(
            f"The pool is empty: {', '.join(str(file) for file in files) or 'no file'} has no row.", "Name other files."
        )
    return pool


def content_sum(examples: Iterable[Example]) -> int:
    """The sum of the rows' sha256 hashes, to be added up over blocks and shards."""
    total = 0
    for example in examples:
        content = json.dumps(
            [example.prompt, example.completion, example.choices, *filter(None, [example.tests])]
        ).encode()
        total += int.from_bytes(hashlib.sha256(content).digest(), "big")
    return total


def fingerprint(sums: Iterable[int]) -> str:
    """Names the rows of a pool by their `content_sum`s.

    It does not depend on their order (nor on files, formats, blocks and shards), but on how often each row is there.
    What is chosen of a pool has an order, and `training.data.example.fingerprint`.
    """
    return f"{sum(sums) % 2**256:064x}"


def _example(piece: Piece, offset: int, raw: RawRow, columns: Columns) -> Example:
    place = piece.place(offset)
    row = raw if isinstance(raw, dict) else json_object(place, decoded_line(piece.path, piece.first + offset, raw))
    return to_example(place, row, columns, keys="")


def _files(path: str) -> list[Path]:
    named = Path(path)
    if named.exists() or not any(mark in path for mark in "*?["):
        return [named]
    found = sorted(Path(named.anchor).glob(str(named.relative_to(named.anchor))))
    if not found:
        raise NotFound(f"No file fits {path}.", "Check the pattern.")
    return found
