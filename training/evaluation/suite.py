"""A suite: one measurement that a version is judged by. Written in recipes, suite files and policies."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from infra.documents import Section
from training.data.sources import DataSource

TextMetric = Literal["rouge1", "rouge2", "rougeL", "bleu", "chrf", "bertscore", "token_f1"]
Generated = Literal["exact_match", TextMetric]  # measured on what the model writes
Metric = Literal["multiple_choice", "perplexity", Generated]
Split = Literal["test", "validation"]

TEXT_METRICS: tuple[str, ...] = get_args(TextMetric)
GENERATED: tuple[str, ...] = get_args(Generated)


class Suite(Section):
    """Which examples a model is shown, how many, and what is measured on them."""

    name: str | None = Field(None, description="What the suite is called. Default: data, split and shots.")
    task: str | None = Field(None, description="A built-in task. Default: the recipe's own data.")
    data: DataSource | None = Field(None, description="Data of the suite's own, as in a recipe.")
    split: Split = "test"
    metric: Metric | None = Field(None, description="Default: the task's own; exact_match for data from files.")
    also: tuple[Generated, ...] | None = Field(None, description="Further metrics of the same generated answers.")
    samples: Annotated[int, Field(ge=1)] = 200
    shots: Annotated[int, Field(ge=0)] = Field(0, description="Solved examples in front of every question.")
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Longest answer, in tokens. Default: a little more than the longest wanted answer."
    )
    buckets: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="Limits of prompt length, in the model's tokens: the value of each part, too."
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Draws the samples and the shots.")

    @model_validator(mode="after")
    def _consistent(self) -> "Suite":
        if self.task is not None and self.data is not None:
            raise ValueError("give task or data, not both")
        if self.data is not None and self.data.task is not None:
            raise ValueError("name a built-in task with task, not with data")
        if self.also and self.metric is not None and self.metric not in GENERATED:
            raise ValueError(f"also goes with a metric of generated answers, not with {self.metric}")
        measured = (self.metric, *(self.also or ()))
        if len(set(measured)) < len(measured):
            raise ValueError("a metric is named twice in metric and also")
        if any(low >= high for low, high in pairwise(self.buckets or ())):
            raise ValueError("give the limits of buckets in rising order, each once")
        return self

    def title(self, data: str = "data") -> str:
        """The suite's name, e.g. `object_counting/test` or `object_counting/test-3shot`.

        Args:
            data: what to call the recipe's own data where the suite names no task and no data.
        """
        if self.name:
            return self.name
        own = self.task or (Path(self.data.name).stem if self.data else data)
        return f"{own}/{self.split}" + (f"-{self.shots}shot" if self.shots else "")

    def bucket_titles(self, title: str) -> dict[tuple[int, int], str]:
        """What the results of the buckets are filed under, by (more tokens than, up to): `summaries/test[512-1024]`."""
        return {(low, high): f"{title}[{low}-{high}]" for low, high in pairwise((0, *(self.buckets or ())))}

    def anchored(self, folder: Path) -> "Suite":
        """The same suite with relative paths counted from `folder`."""
        return self.model_copy(update={"data": self.data.anchored(folder)}) if self.data else self
