"""Rows of JSONL, CSV and Parquet files, read as they are needed."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from infra.errors import InvalidInput, NotFound

# Where a row stands (`data.jsonl line 17`), and its values by column.
Row = tuple[str, dict[str, Any]]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, in order; its suffix says how to read it.

    Raises:
        NotFound: no such file.
        InvalidInput: a suffix that is not known, or content that is not what the suffix promises, by its line.
    """
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder.", "Name a file; for a folder of save_to_disk use data.dataset.")
    if not path.is_file():
        raise NotFound(f"{path} is not there.", "Check the path; in a recipe it starts at the recipe's folder.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InvalidInput(
            f"{path.name}: {path.suffix or 'no suffix'} is not a known format.",
            f"Use one of {', '.join(READERS)}. A JSON array becomes JSONL with: jq -c '.[]' FILE.json > FILE.jsonl",
        )
    return reader(path)


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _decoded_lines(path):
        if line.strip():
            place = f"{path.name} line {number}"
            yield place, json_object(place, line)


def json_object(place: str, line: str) -> dict[str, Any]:
    """The object on a line of JSONL that stands at `place`.

    Raises:
        InvalidInput: it is anything else.
    """
    try:
        row = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise InvalidInput(
            f"{place} is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}.",
            "Each line is one JSON object.",
        ) from None
    except RecursionError:
        raise InvalidInput(f"{place} is nested too deeply.", "Each line is one flat JSON object.") from None
    if not isinstance(row, dict):
        raise InvalidInput(f"{place} is a JSON {_JSON_TYPES[type(row)]}.", "Each line is one JSON object.")
    return row


_JSON_TYPES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def _csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    reader = csv.reader((line for _, line in _decoded_lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path.name} line {reader.line_num + 1}"  # where the row begins: a quoted field may span lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise InvalidInput(
                f"{place} is not valid CSV: {error}.", "Mend the quotes; very long texts are better kept in JSONL."
            ) from None
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = fields
            if delimiter == "," and len(header) == 1 and ";" in header[0]:
                raise InvalidInput(
                    f"{place}: its columns are separated by semicolons, not by commas.",
                    "Write it with commas, or as TSV.",
                )
            if len(set(header)) < len(header):
                raise InvalidInput(f"{place}: two columns have the same name.", "Give each column its own name.")
        elif len(fields) != len(header):
            raise InvalidInput(
                f"{place} has {len(fields)} fields, but the header has {len(header)}.",
                f"Put double quotes around fields with a {'tab' if delimiter == chr(9) else 'comma'} in them.",
            )
        else:
            yield place, dict(zip(header, fields, strict=True))


def _tsv(path: Path) -> Iterator[Row]:
    return _csv(path, delimiter="\t")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInput(f"{path.name} cannot be read as Parquet: {error}", "Write the file again.") from None


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1, and lines with their ends."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, decoded_line(path, number, line)


def decoded_line(path: Path, number: int, line: bytes) -> str:
    """A line of a file as text; the first one without a byte order mark.

    Raises:
        InvalidInput: it is not UTF-8.
    """
    try:
        return line.removeprefix(BYTE_ORDER_MARK if number == 1 else b"").decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path.name} line {number} is not UTF-8 text (byte {error.start + 1} of the line).",
            f"Convert it: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8-{path.name}",
        ) from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
