"""What readers return: CSV files, checked against what they were given before any of it counts."""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from pydantic import model_validator

from infra.documents import Section
from infra.errors import InvalidInput, NotFound
from training.evaluation.reader_study import Criterion, Shown, Study, named

MOST_SHOWN = 25  # problems of an error message


class Rating(Section):
    """What a reader said of one answer; None where nothing was said."""

    scores: dict[str, int | None]
    preferred: bool | None
    comment: str = ""


class Ratings(Section):
    """All that has come back, still blind.

    Attributes:
        asked: of the study.
        by_id: ratings of answers by their ids.
        missing: how many scores and marks of each reader are not there, of those that have returned a packet; of a
            row that is gone, all of its own.
        absent: readers (from 1) who have not returned one.
    """

    asked: str
    by_id: dict[str, Rating]
    missing: dict[int, int]
    absent: tuple[int, ...]


class Collected(Section):
    """Ratings as they are kept, sealed: what was changed afterwards is not read."""

    ratings: Ratings
    sha256: str

    @classmethod
    def of(cls, ratings: Ratings) -> "Collected":
        """Seal them."""
        return cls(ratings=ratings, sha256=named(**ratings.model_dump()))

    @model_validator(mode="after")
    def _untouched(self) -> "Collected":
        if named(**self.ratings.model_dump()) != self.sha256:
            raise ValueError("these are not the ratings that were collected")
        return self


def packet_rows(study: Study, reader: int) -> list[list[str]]:
    """A reader's packet (from 0) as rows of a table, the column names first, with room for ratings."""
    scores = [criterion.name for criterion in study.design.criteria]
    head = ["id", "item", "answer", "prompt", "text", *scores, "preferred", "comment"]
    empty = [""] * (len(scores) + 2)
    shown = study.packets[reader]
    return [head, *([each.id, str(each.item), each.answer, each.prompt, each.text, *empty] for each in shown)]


def packet_csv(study: Study, reader: int) -> str:
    """The same as CSV, with a byte order mark, by which spreadsheets know UTF-8."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(packet_rows(study, reader))
    return "\ufeff" + text.getvalue()


def collect(study: Study, files: Sequence[Path], partial: bool = False) -> Ratings:
    """Read returned packets, one file for each reader, in any order.

    Args:
        study: the blind half.
        files: as returned: CSV with commas or semicolons.
        partial: take packets with empty cells or missing rows, and do without those that were not returned.

    Raises:
        InvalidInput: everything that is wrong with any file, a line each; nothing is taken then.
        NotFound: no such file.
    """
    readers = {shown.id: reader for reader, packet in enumerate(study.packets) for shown in packet}
    problems: list[str] = []
    by_id: dict[str, Rating] = {}
    returned: dict[int, Path] = {}
    missing: dict[int, int] = {}
    for file in files:
        rows = _rows(file, study)
        owners = Counter(readers[row["id"]] for _, row in rows if row["id"] in readers)
        if not owners:
            problems.append(f"{file}: holds no answer of this study")
            continue
        reader = owners.most_common(1)[0][0]
        if reader in returned:
            problems.append(f"{file}: reader {reader + 1} has already returned {returned[reader]}")
            continue
        returned[reader] = file
        read = _Packet(file, study.packets[reader], study.design.criteria)
        by_id.update(read.ratings(rows))
        problems += read.wrong + ([] if partial else read.lacking)
        missing[reader + 1] = read.missing
    absent = tuple(reader + 1 for reader in range(study.design.readers) if reader not in returned)
    if absent and not partial:
        problems.append(f"not returned: reader {', '.join(map(str, absent))}")
    if problems:
        more = [f"… and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
        raise InvalidInput(
            "\n".join([*problems[:MOST_SHOWN], *more]),
            "Have these mended, and collect again"
            + ("." if partial else "; --partial does without what is missing. Nothing was taken."),
        )
    return Ratings(asked=study.asked, by_id=by_id, missing=missing, absent=absent)


Row = tuple[int, dict[str, str]]  # number in the file, as a spreadsheet counts, and cells by column


def _rows(file: Path, study: Study) -> list[Row]:
    if not file.is_file():
        raise NotFound(f"{file} is not there.", "Check the path.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidInput(f"{file} is not UTF-8 text.", "Save it as 'CSV UTF-8' from the spreadsheet.") from None
    head, _, rest = text.partition("\n")
    told = head.startswith("sep=")  # by some spreadsheets
    head, text = (head[4:], rest) if told else (head, text)
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=";" if head.count(";") > head.count(",") else ","))
    wanted = ["id", "prompt", "text", *(criterion.name for criterion in study.design.criteria), "preferred"]
    known = {name.lower(): name for name in (*wanted, "comment")}
    names = [known.get(name.strip().lower(), name.strip()) for name in rows[0]] if rows else []
    lost = [name for name in wanted if name not in names]
    if lost:
        raise InvalidInput(
            f"{file} has no column {', '.join(lost)}.", "Return the packet's own CSV, or what its form saves."
        )
    padded = [row + [""] * (len(names) - len(row)) for row in rows[1:]]
    return [
        (number, dict(zip(names, (cell.strip() for cell in row), strict=False)))
        for number, row in enumerate(padded, start=2 + told)
        if any(cell.strip() for cell in row)
    ]


class _Packet:
    """One returned packet, checked row by row.

    Attributes:
        wrong: what must not be, a line each.
        lacking: what is not there, a line each.
        missing: how many scores and marks that is.
    """

    def __init__(self, file: Path, packet: Sequence[Shown], criteria: Sequence[Criterion]) -> None:
        self.wrong: list[str] = []
        self.lacking: list[str] = []
        self.missing = 0
        self._file, self._criteria = file, criteria
        self._given = {shown.id: shown for shown in packet}

    def ratings(self, rows: Sequence[Row]) -> dict[str, Rating]:
        places: dict[str, list[int]] = defaultdict(list)
        found = {}
        for number, row in rows:
            shown = self._given.get(row["id"])
            if shown is None:
                self.wrong.append(f"{self._file} row {number}: id '{row['id']}' is none of this reader's")
                continue
            places[shown.id].append(number)
            if len(places[shown.id]) > 1:
                first = places[shown.id][0]
                self.wrong.append(f"{self._file} row {number}: id '{shown.id}' is there already, in row {first}")
                continue
            self._compare(number, row, shown)
            scores = {each.name: self._score(number, row, each) for each in self._criteria}
            found[shown.id] = Rating(scores=scores, preferred=self._mark(number, row), comment=row.get("comment", ""))
        for shown in self._given.values():
            if shown.id not in found:
                self.lacking.append(f"{self._file}: item {shown.item}, answer {shown.answer} ('{shown.id}') is missing")
                self.missing += len(self._criteria)
        self._preferences(found)
        return found

    def _compare(self, number: int, row: dict[str, str], shown: Shown) -> None:
        for column in ("prompt", "text"):
            if row[column].split() != getattr(shown, column).split():  # spreadsheets change line ends
                self.wrong.append(f"{self._file} row {number}: the {column} of '{shown.id}' is not what was given out")

    def _score(self, number: int, row: dict[str, str], criterion: Criterion) -> int | None:
        told = row[criterion.name]
        if not told:
            self.lacking.append(f"{self._file} row {number}: {criterion.name} is empty")
            self.missing += 1
            return None
        try:
            score = float(told.replace(",", "."))
        except ValueError:
            score = float("nan")
        if not (score.is_integer() and criterion.low <= score <= criterion.high):
            bounds = f"a whole number from {criterion.low} to {criterion.high}"
            self.wrong.append(f"{self._file} row {number}: {criterion.name} is '{told}', not {bounds}")
            return None
        return int(score)

    def _mark(self, number: int, row: dict[str, str]) -> bool | None:
        told = row["preferred"].lower()
        if not told:
            return None
        if told not in _YES | _NO:
            self.wrong.append(f"{self._file} row {number}: preferred is '{row['preferred']}', not 1 or 0")
            return None
        return told in _YES

    def _preferences(self, found: dict[str, Rating]) -> None:
        """Of an item where something is marked, empty cells mean no; where nothing is, the mark is lacking."""
        marked: dict[int, set[bool | None]] = {shown.item: set() for shown in self._given.values()}
        for shown in self._given.values():
            if shown.id in found:
                marked[shown.item].add(found[shown.id].preferred)
        for item, marks in marked.items():
            if True not in marks:
                self.missing += 1
            if marks and True not in marks:
                self.lacking.append(f"{self._file}: item {item} has no preferred answer (of equal ones mark each)")
        for shown in self._given.values():
            if shown.id in found:
                mark = bool(found[shown.id].preferred) if True in marked[shown.item] else None
                found[shown.id] = found[shown.id].model_copy(update={"preferred": mark})


_YES = frozenset({"1", "x", "yes", "true", "1.0"})
_NO = frozenset({"0", "no", "false", "0.0"})
