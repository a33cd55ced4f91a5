"""What an adapter must show before an alias may point at it: a YAML file per adapter.

```yaml
defaults: {minimum_samples: 200, max_regression: 0.01}   # said once for all suites
suites:
  - {suite: object_counting/test, minimum: 0.60}
  - {suite: word_sorting/test, minimum: 0.40, significance: 0.05}
```
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, model_validator

from infra.documents import Section, parse, read_yaml, spread_defaults

CALIBRATION = ("ece", "ece_equal_mass", "brier")  # measured beside multiple choice
NEARNESS = ("exact_program", "abstracted_match", "edit_similarity", "parses")  # measured beside pass@K
BESIDE = (*CALIBRATION, *NEARNESS)
LOWER_IS_BETTER = ("perplexity", "loss", *CALIBRATION)


class SuitePolicy(Section):
    """What is asked on one suite. A candidate must pass every line of it.

    All values are in the metric's own unit (accuracy 0–1, perplexity, …). Without a metric the newest number of the
    suite decides, which is the suite's own: what is measured beside that is recorded first. Calibration and how
    near programs are decide only where they are named. Against the current holder of the alias:

    - `max_regression` caps the measured loss: pass if (holder − candidate) ≤ max_regression, with the sign turned where
      lower is better. It asks for "not worse", by the numbers as they were measured.
    - `regression_significance` α, if given, makes a test of that: fail only if the loss is *significantly* above
      max_regression, p ≤ α in a one-sided sign-flip test of the items' scores or outcomes. Equal versions then pass
      with probability of about 1 − α; a real loss may pass, too, where the items are few.
    - `significance` α, if given, asks for more, "really better": pass if p ≤ α in the one-sided exact McNemar test
      where items are right or wrong, else in the one-sided sign-flip test of their scores. It needs both versions'
      on the same items. At α = 0.05 the candidate must win at least five of five disagreements, so a copy of the
      holder never passes.

    Without a holder both pass.
    """

    suite: str = Field(min_length=1, description="Name of the evaluation suite.")
    metric: str | None = Field(
        None, min_length=1, description="Which number decides. Default: whatever the suite measures."
    )
    minimum: FiniteFloat | None = Field(None, description="The value must be at least this.")
    maximum: FiniteFloat | None = Field(None, description="The value must be at most this.")
    minimum_samples: Annotated[int, Field(ge=1)] = Field(1, description="Held-out items that the number must rest on.")
    higher_is_better: bool | None = Field(None, description="Default: yes, but for perplexity, loss and calibration.")
    max_regression: FiniteFloat | None = Field(0.0, ge=0, description="Allowed loss against the holder; null for any.")
    regression_significance: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Count a loss only if it is above max_regression with this p-value."
    )
    significance: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Demand an improvement with this p-value."
    )

    def fits(self, suite: str, metric: str) -> bool:
        """Whether a number of that suite and metric is the one that this line is about."""
        wanted = metric not in BESIDE if self.metric is None else metric == self.metric
        return suite == self.suite and wanted

    def improves_upwards(self, metric: str) -> bool:
        """Whether a higher value of the metric is a better one."""
        return metric not in LOWER_IS_BETTER if self.higher_is_better is None else self.higher_is_better


class Policy(Section):
    """The suites that decide about an adapter's protected aliases."""

    suites: tuple[SuitePolicy, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _spread_defaults(cls, content: Any) -> Any:
        return spread_defaults(content, "suites")

    @model_validator(mode="after")
    def _each_line_once(self) -> "Policy":
        lines = [f"{line.suite} {line.metric}" if line.metric else line.suite for line in self.suites]
        if twice := sorted({line for line in lines if lines.count(line) > 1}):
            raise ValueError(f"decided twice: {', '.join(twice)}")
        return self

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read a policy file.

        Raises:
            NotFound: no such file.
            InvalidInput: not YAML, an unknown key (with the one that was meant), or a wrong value.
        """
        return parse(cls, read_yaml(path), str(path))


def find_policy(adapter: str, folder: Path) -> Policy | None:
    """`folder/ADAPTER.yaml`, else `folder/default.yaml`, else None."""
    for path in (folder / f"{adapter}.yaml", folder / "default.yaml"):
        if path.is_file():
            return Policy.load(path)
    return None
