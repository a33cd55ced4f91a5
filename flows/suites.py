"""Suites as flows run them: which examples a version or a base model is shown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flows.data_sets import readable
from infra.errors import InvalidInput
from training.data.example import Example
from training.data.sampling import sample
from training.data.sources import load_held_out, load_splits
from training.evaluation.suite import Metric, Suite
from training.recipe import Recipe
from training.tasks.catalog import CATALOG, get_task


@dataclass(frozen=True)
class Prepared:
    """A suite with its examples drawn."""

    title: str
    metric: Metric
    examples: tuple[Example, ...]
    shots: tuple[Example, ...]
    instruction: str
    max_new_tokens: int | None


def suites_for(tasks: list[str] | None, shots: int, samples: int | None) -> tuple[Suite, ...]:
    """Suites from a command line: one a task; none means the recipe's own, with `shots` and `samples` put on top."""
    changes = {"shots": shots, **({"samples": samples} if samples else {})}
    if tasks:
        return tuple(Suite(task=task, **changes) for task in tasks)
    return (Suite(**changes),) if shots or samples else ()


def default_suites(recipe: Recipe) -> tuple[Suite, ...]:
    """The recipe's suites; where it names none, the test split of its own data."""
    return recipe.evaluation or (Suite(),)


def title(suite: Suite, recipe: Recipe | None) -> str:
    """What the suite's results are filed under."""
    own = (recipe.data.task or recipe.adapter) if recipe else "data"
    return suite.title(own)


def suite_named(name: str, recipe: Recipe | None) -> Suite:
    """The suite that a policy means: one of the recipe's by its title, or `TASK/SPLIT[-Kshot]` of a built-in task.

    Raises:
        InvalidInput: neither.
    """
    own = {title(suite, recipe): suite for suite in default_suites(recipe)} if recipe else {}
    if name in own:
        return own[name]
    match = re.fullmatch(r"(\w+)/(test|validation)(?:-(\d+)shot)?", name)
    if match and match[1] in CATALOG:
        return Suite.model_validate({"task": match[1], "split": match[2], "shots": int(match[3] or 0)})
    known = ", ".join(own) or "none of its own"
    raise InvalidInput(
        f"The policy asks for suite '{name}', which the version's recipe does not define ({known}).",
        "Name one of the recipe's suites, or a built-in task as TASK/test or TASK/test-3shot.",
    )


def prepare(suite: Suite, recipe: Recipe | None, masked: bool = False, held_out: bool = False) -> Prepared:
    """Draw a suite's examples.

    Args:
        suite: what is measured.
        recipe: of the version that is measured; its data are meant where the suite names no task.
        masked: a masked language model is measured: by perplexity, where nothing is said.
        held_out: of the recipe's own data no more may be read than the split; no solved examples are shown then.

    Raises:
        InvalidInput: the suite names no task and there is no recipe whose data it could mean, or the data have no
            such split.
    """
    if suite.task is not None:
        task = get_task(suite.task)
        examples = tuple(task.generate(suite.split, suite.samples, suite.seed))
        shots = tuple(task.generate("train", suite.shots, suite.seed)) if suite.shots else ()
        metric, instruction = suite.metric or ("perplexity" if masked else task.metric), task.instruction
    elif recipe is None:
        raise InvalidInput(f"Suite '{title(suite, None)}' names no task, and there is no recipe.", "Give it a task.")
    else:
        among, shots = _examples(suite, recipe, held_out)
        examples = tuple(sample(among, suite.samples, suite.seed))
        own = get_task(recipe.data.task) if recipe.data.task else None
        metric = suite.metric or ("perplexity" if masked else own.metric if own else "exact_match")
        instruction = recipe.data.instruction_text
        if not examples:
            raise InvalidInput(
                f"The data of '{recipe.adapter}' have no {suite.split} examples to evaluate on.",
                f"Add data.{suite.split} (a file) or data.sizes.{suite.split} to the recipe.",
            )
    return Prepared(title(suite, recipe), metric, examples, shots, instruction, suite.max_new_tokens)


def _examples(suite: Suite, recipe: Recipe, held_out: bool) -> tuple[Sequence[Example], tuple[Example, ...]]:
    """What a suite's items are drawn from, and its solved examples; training data that may be gone are left alone."""
    data = readable(recipe.data)
    if held_out or (data.task is None and suite.split == "test" and data.test is not None and not suite.shots):
        return load_held_out(data, suite.split, recipe.seed), ()
    splits = load_splits(data, recipe.seed)
    return getattr(splits, suite.split), tuple(sample(splits.train, suite.shots, suite.seed))
