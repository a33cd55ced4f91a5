"""What commands print: tables for people, JSON for programs."""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

_CONTROLS = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_AFTER_ASCII = re.compile(r"[\x7f-\x9f]")


class _Guarded(Console):
    """A console on which a text, whoever wrote it, moves no cursor and sets no title."""

    def render_str(self, text: str, **options: Any) -> Text:
        """As Rich does, with control characters shown as escapes (`\\x1b`), but for tabs and ends of lines."""
        return super().render_str(_CONTROLS.sub(lambda found: repr(found[0])[1:-1], text), **options)


console = _Guarded(highlight=False)
errors = _Guarded(stderr=True, highlight=False)
WIDE = 100  # columns of a terminal from which on a table shows what it can do without
WORD = 12  # columns that a cell whose text may wrap needs at the least

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]


def table(*columns: str) -> Table:
    """An airy table. Marks in front of a column's name: `>` aligns right, `~` lets its text wrap between words."""
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        name = column.lstrip("~>")
        marks = column.removesuffix(name)
        grid.add_column(name, justify="right" if ">" in marks else "left", no_wrap="~" not in marks, overflow="fold")
    return grid


def show(columns: Sequence[str], rows: Iterable[Sequence[str]], nothing: str) -> None:
    """Print the rows under the columns, or `nothing` where there are no rows.

    Args:
        columns: as for `table`; one that is marked with `+` is left out on a terminal narrower than `WIDE`.
        rows: a cell for every column.
        nothing: what to say instead of an empty table.
    """
    shown = [number for number, column in enumerate(columns) if not column.startswith("+") or console.width >= WIDE]
    names = [columns[number].removeprefix("+") for number in shown]
    cells = [[row[number] for number in shown] for row in rows]
    whole = [max(_width(cell) for cell in column) for column in zip(names, *cells, strict=True)]
    least = sum(min(width, WORD) if name.startswith("~") else width for name, width in zip(names, whole, strict=True))
    grid = table(*names)
    if least + 2 * (len(names) - 1) > console.width:  # rather in two lines than cut: a name is there to be copied
        for column in grid.columns:
            column.no_wrap = False
    for row_cells in cells:
        grid.add_row(*row_cells)
    console.print(grid if cells else f"[dim]{nothing}[/]")


def _width(cell: str) -> int:
    """Columns of the terminal that a cell's longest line takes."""
    return max((Text.from_markup(line).cell_len for line in cell.splitlines()), default=0)


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Print labels and what belongs to them, one under the other."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for pair in pairs:
        grid.add_row(*pair)
    console.print(grid)


def print_json(value: Any) -> None:
    """`value` as JSON on standard output."""
    text = json.dumps(value, indent=2, default=_plain, ensure_ascii=False)
    print(_AFTER_ASCII.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, frozenset | set):
        return sorted(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def size(count: int) -> str:
    """Bytes for people: `2.4 MB`."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def count(number: int) -> str:
    """How many, for people: `134.5 M`."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return str(number)


def percent(value: float, low: float | None = None, high: float | None = None) -> str:
    """A proportion with its interval: `74.0 % [67.5–79.6]`."""
    interval = f" [{100 * low:.1f}–{100 * high:.1f}]" if low is not None and high is not None else ""
    return f"{100 * value:.1f} %{interval}"


def measured(metric: str, value: float, low: float | None = None, high: float | None = None) -> str:
    """A measured value in the metric's own unit."""
    if metric in ("perplexity", "brier"):  # no shares
        return f"{value:.2f}" + (f" [{low:.2f}–{high:.2f}]" if low is not None and high is not None else "")
    return percent(value, low, high)


def ago(moment: datetime) -> str:
    """How long since `moment`: `3 h ago`."""
    from datetime import UTC

    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (129600, 3600, "h")):
        if seconds < limit:
            return f"{max(0, seconds) / unit:.0f} {name} ago"
    return f"{seconds / 86400:.0f} d ago"
