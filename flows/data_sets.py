"""Data sets of selected rows, as recipes name them and trainings read them."""

from pathlib import Path

from registry import AdapterRegistry
from training.data.rows import Columns
from training.data.sources import DataSource

ROWS = "rows.parquet"
_TEXT = "text"


def readable(source: DataSource) -> DataSource:
    """The same source, with the file that holds them here in the place of selected rows; every byte of it is checked.

    Raises:
        NotFound: no such data set.
        CorruptArtifact: its bytes are not what was kept.
    """
    if source.selected is None:
        return source
    file = AdapterRegistry().materialise_dataset(source.selected) / ROWS
    return source.model_copy(update={"selected": None, "file": file, "columns": _columns(file)})


def pinned(source: DataSource) -> DataSource:
    """The same source, with the number of the version that the name of a data set means today.

    Raises:
        NotFound: no such data set.
    """
    if source.selected is None:
        return source
    return source.model_copy(update={"selected": AdapterRegistry().dataset(source.selected).address})


def _columns(file: Path) -> Columns:
    from pyarrow.parquet import read_schema

    names = read_schema(file).names
    if _TEXT in names:
        return Columns(text=_TEXT)
    return Columns(**{name: name for name in ("choices", "tests") if name in names})
