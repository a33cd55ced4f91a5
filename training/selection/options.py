"""What a selection of rows from a candidate pool can be told."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from infra.documents import Section, read_yaml
from training.data.rows import Columns
from training.data.sources import DataSource
from training.selection.embedding import MINILM
from training.tasks.catalog import CATALOG

Method = Literal["got-d", "dsir", "nearest", "k-centre", "perplexity", "random"]

LIKE_A_TARGET: tuple[Method, ...] = ("got-d", "dsir", "nearest")
BY_EMBEDDING: tuple[Method, ...] = ("got-d", "nearest", "k-centre")
SCORES: dict[Method, str] = {
    "got-d": "calibrated gradient of the transport distance to the target; the smaller, the better",
    "dsir": "log importance weight, in nats; the larger, the better",
    "nearest": "place in the order in which the rows were taken, from 0",
    "k-centre": "place in the order in which the rows were taken, from 0",
    "perplexity": "perplexity of a token; the smaller, the better",
    "random": "place in the order in which the rows were drawn, from 0",
}
DEFAULT_TARGET_ITEMS = 2000  # of a task

_OF_METHODS: dict[str, tuple[Method, ...]] = {
    "target": LIKE_A_TARGET,
    "encoder": BY_EMBEDDING,
    "direction": ("got-d",),
    "epsilon": ("got-d",),
    "base": ("perplexity",),
    "share": ("perplexity",),
    "floor": ("perplexity",),
    "bands": ("perplexity",),
}


class PoolSelection(Section):
    """Which rows of a candidate pool are kept."""

    pool: tuple[str, ...] = Field(
        min_length=1, description="Files and patterns: JSONL (also .gz) and Parquet, as many rows as you like."
    )
    columns: Columns = Field(Columns(text="text"), description="Where a row keeps what; plain text in `text`.")
    on_bad: Literal["error", "skip"] = Field("error", description="What to do with rows that cannot be used.")
    deduplicate: Literal["none", "exact", "near"] = Field(
        "exact", description="Keep the first of rows that are equal but for case, spacing, punctuation; or nearly so."
    )
    similarity: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity of five-word shingles from which rows are nearly equal."
    )
    decontaminate: tuple[DataSource, ...] = Field(
        (), description="Evaluation sets, no piece of which may stay: tasks or files, as under `data` in a recipe."
    )
    method: Method = Field("got-d", description="How rows are chosen.")
    budget: int | None = Field(None, ge=1, description="How many rows to keep. Of perplexity, `share` says it.")
    target: DataSource | None = Field(
        None, description="What the rows are wanted for; of got-d, dsir and nearest. As under `data` in a recipe."
    )
    encoder: str = Field(MINILM, description="Of texts to vectors; of got-d, nearest and k-centre. Any HF encoder.")
    direction: Literal["toward", "away"] = Field("toward", description="Of got-d: what moves away from the target.")
    epsilon: float = Field(0.05, gt=0, description="Of got-d: weight of the entropy, in mean costs.")
    base: str | None = Field(None, description="Of perplexity: the base model that is asked.")
    share: float = Field(0.2, gt=0, le=1, description="Of perplexity: the share of the rows that is kept.")
    floor: float = Field(0.0, ge=0, description="Of perplexity: rows below it are not kept; they repeat themselves.")
    bands: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="Of perplexity: token counts at which a new band begins; each keeps its own share."
    )
    shard_rows: int = Field(20_000, ge=1, description="Rows of the pool that a worker has at a time.")
    seed: int = Field(0, ge=0, lt=2**32)

    @field_validator("pool", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("target", "decontaminate", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return [source_named(each) for each in value] if isinstance(value, list | tuple) else source_named(value)

    @model_validator(mode="after")
    def _consistent(self) -> "PoolSelection":
        for option, methods in _OF_METHODS.items():
            if self.method not in methods and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} goes with {' and '.join(methods)}, not with {self.method}")
        if self.method in LIKE_A_TARGET and self.target is None:
            raise ValueError(f"{self.method} needs a target: a task, or a file of texts like those that are wanted")
        if self.method == "perplexity" and self.base is None:
            raise ValueError("perplexity needs a base: the model that is asked")
        if (self.method == "perplexity") == (self.budget is not None):
            raise ValueError(
                "perplexity keeps a share: leave budget out"
                if self.budget
                else f"{self.method} needs a budget: how many rows to keep"
            )
        return self

    def anchored(self, folder: Path) -> "PoolSelection":
        """The same selection with relative paths counted from `folder`."""
        update: dict[str, Any] = {"pool": tuple(str(folder / each) for each in self.pool)}
        if self.target:
            update["target"] = self.target.anchored(folder)
        if self.decontaminate:
            update["decontaminate"] = tuple(source.anchored(folder) for source in self.decontaminate)
        return self.model_copy(update=update)


def source_named(value: Any) -> Any:
    """A source by one word: a task's name, a kept data set's address, or a file; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value in CATALOG:
        return {"task": value}
    return {"file": value} if Path(value).suffix else {"selected": value}


def load_selection(path: Path) -> dict[str, Any]:
    """The content of a selection file, which need not be complete; relative paths in it count from its folder.

    Raises:
        NotFound, InvalidInput: as `read_yaml`.
    """
    content, folder = read_yaml(path), path.resolve().parent
    pool = content.get("pool")
    if isinstance(pool, str | list):
        content["pool"] = [str(folder / str(each)) for each in ([pool] if isinstance(pool, str) else pool)]
    if "target" in content:
        content["target"] = _anchored(content["target"], folder)
    if isinstance(content.get("decontaminate"), list):
        content["decontaminate"] = [_anchored(each, folder) for each in content["decontaminate"]]
    return content


def _anchored(value: Any, folder: Path) -> Any:
    source = source_named(value)
    if isinstance(source, dict) and isinstance(source.get("file"), str):
        return {**source, "file": str(folder / source["file"])}
    return source
