"""A suite: one measurement that a version is judged by. Written in recipes and in promotion policies."""

from typing import Annotated, Literal

from pydantic import Field

from infra.documents import Section

Metric = Literal["exact_match", "multiple_choice", "perplexity"]
Split = Literal["test", "validation"]


class Suite(Section):
    """Which examples a model is shown, how many, and what is measured on them."""

    name: str | None = Field(None, description="What the suite is called. Default: data, split and shots.")
    task: str | None = Field(None, description="A built-in task. Default: the recipe's own data.")
    split: Split = "test"
    metric: Metric | None = Field(None, description="Default: the task's own; exact_match for data from files.")
    samples: Annotated[int, Field(ge=1)] = 200
    shots: Annotated[int, Field(ge=0)] = Field(0, description="Solved examples in front of every question.")
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Longest answer, in tokens. Default: a little more than the longest wanted answer."
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Draws the samples and the shots.")

    def title(self, data: str = "data") -> str:
        """The suite's name, e.g. `object_counting/test` or `object_counting/test-3shot`.

        Args:
            data: what to call the recipe's own data where the suite names no task.
        """
        if self.name:
            return self.name
        return f"{self.task or data}/{self.split}" + (f"-{self.shots}shot" if self.shots else "")
