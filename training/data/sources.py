"""Where a recipe's examples come from, and how they are split."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.documents import Section, did_you_mean
from infra.errors import InvalidInput, NotFound
from training.data.example import Example
from training.data.files import Row, read_rows
from training.data.hub_datasets import dataset_rows, open_dataset
from training.data.rows import Columns, to_examples
from training.data.sampling import sample
from training.data.splits import SPLITS, Split, Splits, hold_out, without_overlap
from training.tasks.catalog import CATALOG, get_task

Fraction = Annotated[float, Field(ge=0, lt=1)]

HELD_OUT: tuple[Split, ...] = ("validation", "test")
DEFAULT_FRACTION = 0.15
DEFAULT_TASK_SIZES: dict[Split, int] = {"train": 2000, "validation": 200, "test": 200}


class Sizes(Section):
    """How many examples of each split, exactly. Default: 2000, 200 and 200 of a task, all of a file or data set."""

    train: Annotated[int, Field(ge=1)] | None = None
    validation: Annotated[int, Field(ge=0)] | None = None
    test: Annotated[int, Field(ge=0)] | None = None


class Fractions(Section):
    """Shares of a file's or data set's prompts that are held out. Default: 0.15 each, where no part is named."""

    validation: Fraction | None = None
    test: Fraction | None = None


class DataSource(Section):
    """A built-in task, a file, a Hugging Face data set, or rows that were selected: exactly one of them."""

    task: str | None = Field(None, description="A built-in task.")
    file: Path | None = Field(None, description="JSONL, CSV, TSV or Parquet; from the recipe's folder.")
    dataset: str | None = Field(None, description="A folder of save_to_disk, or an id of the Hugging Face hub.")
    selected: str | None = Field(None, description="A data set that `regraft data select` kept: NAME@2, or NAME.")
    configuration: str | None = Field(None, description="Configuration of the hub data set.")
    revision: str | None = Field(None, description="Commit, tag or branch of the hub data set.")
    split: str | None = Field(None, description="The data set's split to train on. Default: train.")
    validation: str | None = Field(None, description="Validation file, or split of the data set.")
    test: str | None = Field(None, description="Test file, or split of the data set.")
    fractions: Fractions = Fractions()
    sizes: Sizes = Sizes()
    columns: Columns = Columns()
    on_empty: Literal["error", "skip"] = Field("error", description="What to do with rows without prompt or answer.")
    on_overlap: Literal["error", "drop"] = Field(
        "error", description="Prompts that are in two splits: refuse, or drop them from the less held-out split."
    )
    instruction: str | None = Field(
        None, description="Said to the model before every prompt. Default: a task's own; none for other data."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "DataSource":
        given = [name for name in ("task", "file", "dataset", "selected") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of task, file, dataset and selected ({' and '.join(given) or 'none'} given)"
            )
        (kind,) = given
        if self.task is not None and self.task not in CATALOG:
            raise ValueError(f"'{self.task}' is not a task. {did_you_mean(self.task, list(CATALOG))}")
        for name in ("configuration", "revision", "split"):
            if kind != "dataset" and getattr(self, name) is not None:
                raise ValueError(f"{name} goes with dataset, not with {kind}")
        if kind == "task" and (self.validation or self.test or self.fractions != Fractions()):
            raise ValueError("a task has its own splits: leave out validation, test and fractions")
        if kind in ("task", "selected") and self.columns != Columns():
            raise ValueError(f"columns do not go with {kind}: they are known")
        for part in ("validation", "test"):
            if getattr(self, part) is not None and getattr(self.fractions, part) is not None:
                raise ValueError(f"give {part} or fractions.{part}, not both")
        if (self.fractions.validation or 0) + (self.fractions.test or 0) >= 1:
            raise ValueError("fractions of validation and test leave nothing to train on")
        return self

    @property
    def name(self) -> str:
        """What to call it in a sentence: the task, the file's name, or the data set."""
        return self.task or self.selected or (self.file.name if self.file else str(self.dataset))

    @property
    def instruction_text(self) -> str:
        """What is said to the model before every prompt, perhaps nothing."""
        if self.instruction is not None:
            return self.instruction
        return get_task(self.task).instruction if self.task else ""

    def anchored(self, folder: Path) -> "DataSource":
        """The same source with relative paths counted from `folder`."""
        update: dict[str, object] = {}
        if self.file is not None or self.selected is not None:
            update |= {part: str(folder / name) for part in ("validation", "test") if (name := getattr(self, part))}
        if self.file is not None:
            update["file"] = folder / self.file
        elif self.dataset is not None and (folder / self.dataset).is_dir():
            update["dataset"] = str(folder / self.dataset)
        return self.model_copy(update=update)


def read_examples(source: DataSource, keys: str = "data.") -> list[Example]:
    """Every example of the source's file, or of its data set's split to train on.

    Args:
        source: where they are.
        keys: what its options begin with, for messages.

    Raises:
        InvalidInput: the source is a task (its `generate` draws examples), or a row that cannot be used.
        NotFound: no such file, data set or split.
    """
    if source.task:
        raise InvalidInput(f"The task {source.task} generates its examples.", "Use load_splits or Task.generate.")
    return to_examples(_parts(source)["train"], source.columns, source.on_empty, keys)


def first_row(source: DataSource) -> Row | None:
    """The first row that `read_examples` reads, if there is one; it raises the same."""
    return next(iter(_parts(source)["train"]), None)


def load_splits(source: DataSource, seed: int) -> Splits:
    """The examples of a source in three splits.

    A task's splits are disjoint by construction. A part that a file or data set does not name is held out of its
    training part by `hold_out`: like a task's item, a prompt belongs to the same split under every seed.

    Args:
        source: where the examples are.
        seed: draws a task's items, and the examples of a file or data set where `sizes` wants fewer than there are.

    Raises:
        InvalidInput: rows that cannot be used, a prompt in two named parts, fewer examples than `sizes` asks for, or
            a split that comes out empty.
        NotFound: no such file, data set or split.
    """
    if source.task:
        task = get_task(source.task)
        sizes = {split: getattr(source.sizes, split) for split in SPLITS}
        return Splits(
            *(
                tuple(task.generate(split, DEFAULT_TASK_SIZES[split] if n is None else n, seed))
                for split, n in sizes.items()
            )
        )
    parts = {split: to_examples(rows, source.columns, source.on_empty) for split, rows in _parts(source).items()}
    for split, examples in parts.items():
        if not examples:
            raise InvalidInput(f"{source.name} has no {split} examples: it is empty.", "Is it the right one?")
    rows = len(parts["train"])
    shares = {split: _share(source, split) for split in HELD_OUT if split not in parts}
    parts = without_overlap(parts | hold_out(parts["train"], shares), source.on_overlap)
    for split in SPLITS:
        if not parts[split] and shares.get(split) != 0:
            raise InvalidInput(
                f"{source.name} has too few examples to split: {rows:,}, and none of them falls to {split}.",
                "Give it more rows, or say how to split it with data.validation and data.test (other files or splits) "
                "or data.fractions (0 for none at all).",
            )
    return Splits(*(_sized(source, split, parts[split], seed) for split in SPLITS))


def load_held_out(source: DataSource, split: Literal["validation", "test"], seed: int) -> tuple[Example, ...]:
    """The validation or test examples of a source, without a look at those that it trains on.

    Raises:
        InvalidInput: they are part of what it trains on, or rows that cannot be used.
        NotFound: no such file or split.
    """
    if source.task:
        wanted = getattr(source.sizes, split)
        number = DEFAULT_TASK_SIZES[split] if wanted is None else wanted
        return tuple(get_task(source.task).generate(split, number, seed))
    part = getattr(source, split)
    if part is None:
        raise InvalidInput(
            f"The {split} examples of {source.name} are held out of its training examples, which are not to be read.",
            "Measure on a built-in task, or on a file of its own.",
        )
    if source.file:
        rows: Iterable[Row] = read_rows(Path(part))
    else:
        name = str(source.dataset)
        splits = open_dataset(name, source.configuration, source.revision)
        if part not in splits:
            raise NotFound(f"The data set {name} has no split '{part}'. {did_you_mean(part, list(splits))}")
        rows = dataset_rows(name, part, splits[part])
    return _sized(source, split, to_examples(rows, source.columns, source.on_empty), seed)


def _parts(source: DataSource) -> dict[Split, Iterable[Row]]:
    """The rows of the training part, and of the validation and test parts that are named."""
    if source.file:
        files: dict[Split, Path] = {"train": source.file}
        files |= {split: Path(name) for split in HELD_OUT if (name := getattr(source, split))}
        return {split: read_rows(path) for split, path in files.items()}
    name = str(source.dataset)
    splits = open_dataset(name, source.configuration, source.revision)
    wanted: dict[Split, str] = {"train": source.split or "train"}
    for split in HELD_OUT:
        # A split by the usual name is what it says, unless the recipe wants a fraction of the training part instead.
        usual = split if split in splits and getattr(source.fractions, split) is None else None
        if chosen := getattr(source, split) or usual:
            wanted[split] = chosen
    for chosen in wanted.values():
        if chosen not in splits:
            raise NotFound(
                f"The data set {name} has no split '{chosen}'. {did_you_mean(chosen, list(splits))}",
                f"It has: {', '.join(splits)}. Name them with data.split, data.validation and data.test.",
            )
    return {split: dataset_rows(name, chosen, splits[chosen]) for split, chosen in wanted.items()}


def _share(source: DataSource, split: Split) -> float:
    share = getattr(source.fractions, split)
    return DEFAULT_FRACTION if share is None else share


def _sized(source: DataSource, split: Split, examples: list[Example], seed: int) -> tuple[Example, ...]:
    """As many examples as the source wants of a split, all where it does not say."""
    wanted = getattr(source.sizes, split)
    if wanted is None:
        return tuple(examples)
    if wanted > len(examples):
        raise InvalidInput(
            f"data.sizes.{split} is {wanted:,}, but {source.name} has {len(examples):,} {split} examples.",
            f"Lower data.sizes.{split}, or hold out more or less of it with data.fractions.",
        )
    return tuple(sample(examples, wanted, seed))
