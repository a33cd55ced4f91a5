"""Rows of Hugging Face data sets: of the hub, or of a folder that `save_to_disk` wrote."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from infra.errors import InvalidInput, NotFound
from training.data.files import Row

if TYPE_CHECKING:
    from datasets import Dataset


def open_dataset(name: str, configuration: str | None = None, revision: str | None = None) -> "Mapping[str, Dataset]":
    """The splits of a data set by name; a data set without splits is one split, `train`.

    Args:
        name: a folder that is there, else a hub id.
        configuration: of the hub data set.
        revision: commit, tag or branch of the hub data set.

    Raises:
        InvalidInput: `datasets` is not installed, or the folder is not one of `save_to_disk`.
        NotFound: neither such a folder nor, as far as the hub can be asked, such a data set.
    """
    try:
        import datasets
    except ImportError:
        raise InvalidInput(
            f"Reading the data set {name} needs the `datasets` library.", "Install it: pip install 'regraft[datasets]'"
        ) from None
    if Path(name).is_dir():
        try:
            loaded = datasets.load_from_disk(name)
        except (FileNotFoundError, ValueError):
            raise InvalidInput(
                f"{name} is not a data set saved with save_to_disk.", "For a JSONL, CSV or Parquet file use data.file."
            ) from None
    else:
        try:
            loaded = datasets.load_dataset(name, configuration, revision=revision)
        except (OSError, ValueError) as error:  # no network, no such data set, no such configuration or revision
            raise NotFound(
                f"The data set {name} cannot be loaded: {error}",
                "It is neither a folder here nor reachable on the hub. Check the name, the network and the token.",
            ) from None
    return {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded


def dataset_rows(name: str, split: str, dataset: "Dataset") -> Iterator[Row]:
    """The rows of one split, numbered from 1."""
    for number, row in enumerate(dataset, start=1):
        yield f"{name} [{split}] row {number}", row
