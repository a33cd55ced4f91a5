"""A suite: one measurement that a version is judged by. Written in recipes, suite files and policies."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from infra.documents import Section
from training.data.sources import DataSource


def _pass_at(text: str) -> str:
    if not re.fullmatch(r"pass@[1-9]\d{0,3}", text):
        raise PydanticCustomError("literal_error", "give {expected}", {"expected": "'pass@K' with a number K"})
    return text


TextMetric = Literal["rouge1", "rouge2", "rougeL", "bleu", "chrf", "bertscore", "token_f1"]
Generated = Literal["exact_match", TextMetric]  # measured on what the model writes
PassAt = Annotated[str, AfterValidator(_pass_at)]  # pass@1, pass@10: measured by running what the model writes
Metric = Literal["multiple_choice", "perplexity", Generated] | PassAt
Split = Literal["test", "validation"]

TEXT_METRICS: tuple[str, ...] = get_args(TextMetric)
GENERATED: tuple[str, ...] = get_args(Generated)


def pass_at(metrics: Iterable[str | None]) -> list[int]:
    """The k of each `pass@k` among them, in order."""
    return [int(metric.removeprefix("pass@")) for metric in metrics if metric and metric.startswith("pass@")]


def of_the_same_answers(metric: str, also: Iterable[str]) -> bool:
    """Whether further metrics are measured on what the model writes for this one: texts, or programs."""
    if metric in GENERATED:
        return all(other in GENERATED for other in also)
    return bool(pass_at([metric])) and all(pass_at([other]) for other in also)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How programs are written that pass@k is estimated from.

    Attributes:
        programs: n of each item. Default: the largest k that is asked for. One alone is the greedy one.
        temperature: of several. Default: 0.2 where only pass@1 is asked for, else 0.8, near the best for small and for
            large k (Chen et al., arXiv 2107.03374, section 3.3).
        seed: of the sampling.
    """

    programs: int | None = None
    temperature: float | None = None
    seed: int = 0

    def of(self, ks: list[int]) -> tuple[int, float]:
        """How many programs are written for pass@k of these k, and at which temperature; 0 is greedy."""
        programs = self.programs or max(ks)
        if programs == 1:
            return 1, 0.0
        return programs, self.temperature or (0.2 if max(ks) == 1 else 0.8)


class Suite(Section):
    """Which examples a model is shown, how many, and what is measured on them."""

    name: str | None = Field(None, description="What the suite is called. Default: data, split and shots.")
    task: str | None = Field(None, description="A built-in task. Default: the recipe's own data.")
    data: DataSource | None = Field(None, description="Data of the suite's own, as in a recipe.")
    split: Split = "test"
    metric: Metric | None = Field(None, description="Default: the task's own; exact_match for data from files.")
    also: tuple[Generated | PassAt, ...] | None = Field(None, description="Further metrics of the same answers.")
    samples: Annotated[int, Field(ge=1)] = 200
    shots: Annotated[int, Field(ge=0)] = Field(0, description="Solved examples in front of every question.")
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Longest answer, in tokens. Default: a little more than the longest wanted answer."
    )
    programs: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Programs an item that pass@K is estimated from. Default: K; one is written greedily."
    )
    temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Of several programs. Default: 0.2 for pass@1, else 0.8."
    )
    buckets: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="Limits of prompt length, in the model's tokens: the value of each part, too."
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Draws the samples, the shots and the programs.")

    @model_validator(mode="after")
    def _consistent(self) -> "Suite":
        if self.task is not None and self.data is not None:
            raise ValueError("give task or data, not both")
        if self.data is not None and self.data.task is not None:
            raise ValueError("name a built-in task with task, not with data")
        measured = (self.metric, *(self.also or ()))
        if self.also and self.metric is not None and not of_the_same_answers(self.metric, self.also):
            raise ValueError(
                f"also: {', '.join(self.also)} goes with metrics of the same answers, not with {self.metric}"
            )
        ks, programs = pass_at(measured), self.programs
        if self.metric is not None and not ks and (programs or self.temperature):
            raise ValueError(f"programs and temperature go with pass@K, not with {self.metric}")
        if ks and programs is not None and programs < max(ks):
            raise ValueError(f"pass@{max(ks)} cannot be told from {programs} programs an item; give at least {max(ks)}")
        if self.temperature and (programs or max(ks, default=1)) == 1:
            raise ValueError("one program an item is written greedily; give programs with a temperature")
        if len(set(measured)) < len(measured):
            raise ValueError("a metric is named twice in metric and also")
        if any(low >= high for low, high in pairwise(self.buckets or ())):
            raise ValueError("give the limits of buckets in rising order, each once")
        return self

    def title(self, data: str = "data") -> str:
        """The suite's name: `object_counting/test`, `object_counting/test-3shot`, `python_functions/test-10programs`.

        Args:
            data: what to call the recipe's own data where the suite names no task and no data.
        """
        if self.name:
            return self.name
        own = self.task or (Path(self.data.name).stem if self.data else data)
        programs = self.programs or max(pass_at((self.metric, *(self.also or ()))), default=1)
        shown = f"-{self.shots}shot" if self.shots else ""
        return f"{own}/{self.split}{shown}" + (f"-{programs}programs" if programs > 1 else "")

    def bucket_titles(self, title: str) -> dict[tuple[int, int], str]:
        """What the results of the buckets are filed under, by (more tokens than, up to): `summaries/test[512-1024]`."""
        return {(low, high): f"{title}[{low}-{high}]" for low, high in pairwise((0, *(self.buckets or ())))}

    def anchored(self, folder: Path) -> "Suite":
        """The same suite with relative paths counted from `folder`."""
        return self.model_copy(update={"data": self.data.anchored(folder)}) if self.data else self
