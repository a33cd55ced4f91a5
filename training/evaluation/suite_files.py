"""Suites in files of their own, `suites/NAME.yaml`: for recipes, policies and the command line to name.

```yaml
description: Summaries of support calls.
defaults: {data: {file: calls.parquet}, samples: 100}   # said once for all suites
suites:
  - {metric: rougeL, also: [bleu, bertscore], buckets: [512, 1024, 2048]}
  - {name: fluency, metric: perplexity}
```
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from infra.documents import Section, did_you_mean, parse, read_yaml, spread_defaults
from infra.errors import InvalidInput, NotFound
from infra.settings import get_settings
from training.evaluation.suite import Suite

_ENDINGS = (".yaml", ".yml")
_SHIPPED = Path(__file__).parent / "suites"


class SuiteFile(Section):
    """What `suites/NAME.yaml` holds: suites that are measured together."""

    description: str = ""
    suites: tuple[Suite, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _spread_defaults(cls, content: Any) -> Any:
        return spread_defaults(content, "suites")

    @classmethod
    def load(cls, path: Path) -> "SuiteFile":
        """Read a suite file. Every suite gets a title that begins with the file's name; paths count from its folder.

        Raises:
            NotFound: no such file.
            InvalidInput: not YAML, an unknown key (with the one that was meant), a wrong value, or one title twice.
        """
        file = parse(cls, read_yaml(path), str(path))
        suites = [_filed(suite, path.stem).anchored(path.resolve().parent) for suite in file.suites]
        titles = [suite.title() for suite in suites]
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise InvalidInput(f"{path}: two suites are called {twice[0]}.", "Give each a name of its own.")
        return file.model_copy(update={"suites": tuple(suites)})


def suites_called(name: str, beside: Path | None = None) -> tuple[Suite, ...]:
    """The suites of a file: `NAME` for suites/NAME.yaml, or a path that ends in .yaml; or the one called `NAME/TITLE`.

    Args:
        name: of the file, its path, or the title of one of its suites.
        beside: where relative paths start. Default: the working directory.

    Raises:
        NotFound: no such file, or no such suite in it; suggests the closest name.
        InvalidInput: a file that is no suite file.
    """
    if name.endswith(_ENDINGS):
        return SuiteFile.load((beside or Path.cwd()) / Path(name).expanduser()).suites
    known = suite_files()
    if name in known:
        return SuiteFile.load(known[name]).suites
    file = name.partition("/")[0]
    if file in known:
        titled = {suite.title(): suite for suite in SuiteFile.load(known[file]).suites}
        if name in titled:
            return (titled[name],)
        raise NotFound(
            f"Suite file '{file}' has no suite '{name}'. {did_you_mean(name, list(titled))}",
            f"Name {file} for all of its suites. Buckets are measured with their suite.",
        )
    hint = did_you_mean(name, list(known))  # the shipped ones are always there
    folders = " or ".join(map(str, _folders()))
    write = f"Write {name}.yaml into {folders}." if re.fullmatch(r"[\w.-]+", name) else f"Suite files lie in {folders}."
    raise NotFound(f"There is no suite file '{name}'. {hint}", f"{write} A path has to end in .yaml.")


def suite_files() -> dict[str, Path]:
    """Every suite file that can be named: of `suites/` in the working directory and in the home, and shipped ones."""
    found = [path for folder in (*_folders(), _SHIPPED) for path in sorted(folder.glob("*.yaml"))]
    return {path.stem: path for path in reversed(found)}


def expanded(evaluation: Any, beside: Path | None = None) -> Any:
    """A recipe's list of suites with every name replaced by the suites of that file; all else as it is."""
    if not isinstance(evaluation, Sequence) or isinstance(evaluation, str):
        return evaluation
    suites: list[Any] = []
    for item in evaluation:
        suites += suites_called(item, beside) if isinstance(item, str) else [item]
    return suites


def _filed(suite: Suite, stem: str) -> Suite:
    """The suite under a title that begins with its file's name."""
    own = suite if suite.task or suite.name else suite.model_copy(update={"data": None})
    title = own.title(stem)
    return suite.model_copy(update={"name": title if title.startswith(f"{stem}/") else f"{stem}/{title}"})


def _folders() -> tuple[Path, Path]:
    return Path.cwd() / "suites", get_settings().home / "suites"
