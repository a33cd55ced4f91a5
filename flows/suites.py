"""Suites as flows run them: which examples a version or a base model is shown."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from flows.data_sets import readable
from infra.documents import did_you_mean
from infra.errors import InvalidInput
from registry.policy import CALIBRATION, NEARNESS
from training.data.example import Example
from training.data.sampling import sample
from training.data.sources import DataSource, Fractions, load_held_out, load_splits, read_examples
from training.evaluation.suite import Generated, Metric, PassAt, Sampling, Suite, pass_at
from training.evaluation.suite_files import suite_files, suites_called
from training.recipe import Recipe
from training.tasks.catalog import CATALOG, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_BUCKET = re.compile(r"\[\d+-\d+\]$")


@dataclass(frozen=True)
class Prepared:
    """A suite with its examples drawn; `parts` are the places of some of them, by the title of their results."""

    title: str
    metric: Metric
    examples: tuple[Example, ...]
    shots: tuple[Example, ...]
    instruction: str
    max_new_tokens: int | None
    also: tuple[Generated | PassAt, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def suites_for(
    tasks: list[str] | None, shots: int, samples: int | None, files: Sequence[str] = ()
) -> tuple[Suite, ...]:
    """Suites from a command line: one a task, and those of suite files, with `shots` and `samples` put on top.

    Neither tasks nor files mean the recipe's own. What is named twice is measured once.

    Raises:
        NotFound: no such suite file; suggests the closest name.
        InvalidInput: shots for the suites of files, whose titles would not say so, or two suites of one title.
    """
    changes = {"shots": shots, **({"samples": samples} if samples else {})}
    if files and shots:
        raise InvalidInput("--shots goes with --task, not with --suite.", "Write shots into the suite file.")
    of_files = [suite.model_copy(update=changes if samples else {}) for name in files for suite in suites_called(name)]
    if tasks or files:
        suites = tuple(dict.fromkeys([*(Suite(task=task, **changes) for task in tasks or ()), *of_files]))
        titles = [suite.title() for suite in suites]
        if twice := next((each for each in titles if titles.count(each) > 1), None):
            raise InvalidInput(f"Two of the suites are called {twice}.", "Measure them one after the other.")
        return suites
    return (Suite(**changes),) if shots or samples else ()


def default_suites(recipe: Recipe) -> tuple[Suite, ...]:
    """The recipe's suites; where it names none, the test split of its own data."""
    return recipe.evaluation or (Suite(),)


def title(suite: Suite, recipe: Recipe | None) -> str:
    """What the suite's results are filed under."""
    own = (recipe.data.task or recipe.adapter) if recipe else "data"
    return suite.title(own)


def suite_named(name: str, recipe: Recipe | None) -> Suite:
    """The suite that a policy means, itself or by one of its buckets (`summaries/test[512-1024]`).

    One of the recipe's by its title, `TASK/SPLIT[-Kshot]` of a built-in task, or one of a suite file by its title,
    which begins with the file's name.

    Raises:
        InvalidInput: none of them, or a bucket that the suite does not have.
    """
    whole = _BUCKET.sub("", name)
    suite = _suite_titled(whole, recipe)
    buckets = list(suite.bucket_titles(whole).values())
    if name != whole and name not in buckets:
        has = f"It has {', '.join(buckets)}." if buckets else "It has none."
        raise InvalidInput(f"The policy asks for '{name}', but suite '{whole}' has no such bucket.", has)
    return suite


def _suite_titled(name: str, recipe: Recipe | None) -> Suite:
    own = {title(suite, recipe): suite for suite in default_suites(recipe)} if recipe else {}
    if name in own:
        return own[name]
    match = re.fullmatch(r"(\w+)/(test|validation)(?:-(\d+)shot)?", name)
    if match and match[1] in CATALOG:
        return Suite.model_validate({"task": match[1], "split": match[2], "shots": int(match[3] or 0)})
    file = name.partition("/")[0]
    of_file = {suite.title(): suite for suite in suites_called(file)} if file in suite_files() else {}
    if name in of_file:
        return of_file[name]
    known = [*own, *of_file, *suite_files(), *(f"{task}/test" for task in CATALOG)]
    raise InvalidInput(
        f"The policy asks for suite '{name}', which the version's recipe does not define "
        f"({', '.join(own) or 'none of its own'}). {did_you_mean(name, known)}",
        "Name one of the recipe's suites, a built-in task as TASK/test or TASK/test-3shot, or a suite file of suites/.",
    )


def metrics_of(suite: Suite, recipe: Recipe | None) -> tuple[str, ...]:
    """What a suite measures, and what comes beside that; where it names no metric, all that this may turn out to be."""
    task = suite.task or (recipe.data.task if recipe and suite.data is None else None)
    own = (suite.metric,) if suite.metric else (get_task(task).metric if task else "exact_match", "perplexity")
    beside = (*(CALIBRATION if "multiple_choice" in own else ()), *(NEARNESS if pass_at(own) else ()))
    return (*own, *(suite.also or ()), *beside)


def in_parts(prepared: Prepared, suite: Suite, tokenizer: "PreTrainedTokenizerBase") -> Prepared:
    """The suite with its buckets, where it asks for some; items longer than the last limit are left out of it.

    Args:
        prepared: with all its examples.
        suite: what it was drawn from.
        tokenizer: of the model that is served.

    Raises:
        InvalidInput: no item is within the limits.
    """
    if not suite.buckets:
        return prepared
    from training.data.prompting import PromptFormat
    from training.evaluation.buckets import in_buckets, prompt_lengths

    lengths = prompt_lengths(prepared.examples, prepared.shots, PromptFormat(tokenizer, prepared.instruction))
    kept = [place for place, length in enumerate(lengths) if length <= suite.buckets[-1]]
    if not kept:
        raise InvalidInput(
            f"{prepared.title}: no prompt has at most {suite.buckets[-1]:,} tokens; the shortest has {min(lengths):,}.",
            "Raise the last limit of buckets.",
        )
    if len(kept) < len(lengths):
        logger.warning(
            "%s: %d of %d items have more than %d tokens and are left out.",
            *(prepared.title, len(lengths) - len(kept), len(lengths), suite.buckets[-1]),
        )
    titles = suite.bucket_titles(prepared.title)
    found = in_buckets([lengths[place] for place in kept], suite.buckets)
    parts = {titles[limits]: tuple(places) for limits, places in found.items() if places}
    return replace(prepared, examples=tuple(prepared.examples[place] for place in kept), parts=parts)


def prepare(suite: Suite, recipe: Recipe | None, masked: bool = False, held_out: bool = False) -> Prepared:
    """Draw a suite's examples.

    Args:
        suite: what is measured.
        recipe: of the version that is measured; its data are meant where the suite names no task and no data.
        masked: a masked language model is measured: by perplexity, where nothing is said.
        held_out: of the recipe's own data no more may be read than the split; no solved examples are shown then.

    Raises:
        InvalidInput: the suite names no task and there is no recipe whose data it could mean, the data have no such
            split, or programs are asked for where none are run.
    """
    if suite.task is not None:
        task = get_task(suite.task)
        examples = tuple(task.generate(suite.split, suite.samples, suite.seed))
        shots = tuple(task.generate("train", suite.shots, suite.seed)) if suite.shots else ()
        metric, instruction = suite.metric or ("perplexity" if masked else task.metric), task.instruction
    elif suite.data is not None:
        examples, shots = _examples_of_its_own(suite, suite.data, recipe)
        plain = masked or not any(example.completion for example in examples)
        metric, instruction = suite.metric or ("perplexity" if plain else "exact_match"), suite.data.instruction_text
    elif recipe is None:
        raise InvalidInput(f"Suite '{title(suite, None)}' names no task, and there is no recipe.", "Give it a task.")
    else:
        among, shots = _examples(suite, recipe, held_out)
        examples = tuple(sample(among, suite.samples, suite.seed))
        own = get_task(recipe.data.task) if recipe.data.task else None
        plain = masked or not any(example.completion for example in examples)
        metric = suite.metric or ("perplexity" if plain else own.metric if own else "exact_match")
        instruction = recipe.data.instruction_text
        if not examples:
            raise InvalidInput(
                f"The data of '{recipe.adapter}' have no {suite.split} examples to evaluate on.",
                f"Add data.{suite.split} (a file) or data.sizes.{suite.split} to the recipe.",
            )
    also = suite.also or ()
    if suite.programs and not pass_at((metric, *also)):
        raise InvalidInput(
            f"Suite '{title(suite, recipe)}' wants {suite.programs} programs an item, but measures {metric}.",
            "Write metric: pass@K into it, or leave out programs.",
        )
    sampling = Sampling(suite.programs, suite.temperature, suite.seed)
    return Prepared(title(suite, recipe), metric, examples, shots, instruction, suite.max_new_tokens, also, sampling)


def _examples(suite: Suite, recipe: Recipe, held_out: bool) -> tuple[Sequence[Example], tuple[Example, ...]]:
    """What a suite's items are drawn from, and its solved examples; training data that may be gone are left alone."""
    data = readable(recipe.data)
    if held_out or (data.task is None and suite.split == "test" and data.test is not None and not suite.shots):
        return load_held_out(data, suite.split, recipe.seed), ()
    splits = load_splits(data, recipe.seed)
    return getattr(splits, suite.split), tuple(sample(splits.train, suite.shots, suite.seed))


def _examples_of_its_own(
    suite: Suite, data: DataSource, recipe: Recipe | None
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Items and solved examples of a suite that brings its data: every row of its file, or the part that is named."""
    data, named = readable(data), getattr(data, suite.split) is not None
    if data.file is not None and not named and data.fractions == Fractions():
        if suite.split != "test":
            raise InvalidInput(
                f"Suite '{title(suite, recipe)}' has test items only: every row of {data.name}.",
                f"Name a file for data.{suite.split}.",
            )
        if recipe is not None and recipe.data.file is not None and recipe.data.file.resolve() == data.file.resolve():
            raise InvalidInput(
                f"Suite '{title(suite, recipe)}' would measure on {data.name}, which the recipe trains on.",
                "Leave out the suite's data to mean what the recipe holds out, or name a test file.",
            )
        if suite.shots:
            raise InvalidInput(
                f"Suite '{title(suite, recipe)}' needs solved examples that are not among its items.",
                f"Name the items with data.{suite.split}; solved examples then come from data.file.",
            )
        return tuple(sample(read_examples(data), suite.samples, suite.seed)), ()
    if named and not suite.shots:
        return tuple(sample(load_held_out(data, suite.split, suite.seed), suite.samples, suite.seed)), ()
    splits = load_splits(data, suite.seed)
    shots = tuple(sample(splits.train, suite.shots, suite.seed))
    return tuple(sample(getattr(splits, suite.split), suite.samples, suite.seed)), shots
