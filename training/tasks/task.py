"""The contract of a built-in task: one function that draws an item, and splits that are disjoint by construction."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from infra.errors import InvalidInput
from training.data.content_hash import HASH_RANGE, content_hash, folded
from training.data.example import Example
from training.data.splits import SPLITS, Split

Metric = Literal["exact_match", "multiple_choice", "pass@1"]

TRAIN_SHARE = 0.70
VALIDATION_SHARE = 0.15

# Draws in a row without a new item before a task's space counts as used up. The rarest splits take 15 % of the
# draws, so at that point fewer than about one draw in 750 would still bring something new.
PATIENCE = 5_000

_LETTERED_OPTION = re.compile(r"\([A-Z]\) ")


@dataclass(frozen=True)
class Task:
    """A family of questions with known answers, after BIG-Bench Hard (Suzgun et al., 2022, arXiv:2210.09261).

    Args:
        name: its name in the catalogue.
        description: one line for a list of tasks.
        metric: `multiple_choice` where every item has `choices`, `exact_match` where the answer is free text,
            `pass@1` where it is a program with `tests`.
        instruction: the sentence that tells a model what to do and how to write the answer. It is kept apart from
            the prompts; `training.data.prompting.PromptFormat` puts it where the model's template wants it.
        max_completion_tokens: enough tokens for any answer, for common tokenizers.
        draw: draws one item with the generator that it is given and nothing else.
    """

    name: str
    description: str
    metric: Metric
    instruction: str
    max_completion_tokens: int
    draw: Callable[[random.Random], Example]

    def generate(self, split: Split, n: int, seed: int) -> list[Example]:
        """`n` distinct items of a split.

        The content of an item decides its split, so no item of one split occurs in another, whatever the seeds.
        The same arguments give the same items in every process, and `generate(split, n, seed)` is the beginning of
        `generate(split, m, seed)` for m > n.

        Raises:
            InvalidInput: an unknown split, a negative n, or a task that has fewer than n items.
        """
        if split not in SPLITS:
            raise InvalidInput(f"'{split}' is not a split of a task.", f"Choose from {', '.join(SPLITS)}.")
        if n < 0:
            raise InvalidInput(f"Cannot generate {n} items of {self.name}.", "Ask for zero items or more.")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: dict[str, Example] = {}
        draws_in_vain = 0
        while len(found) < n and draws_in_vain < PATIENCE:
            example = self.draw(rng)
            content = canonical_content(example)
            if content in found or split_of(content) != split:
                draws_in_vain += 1
                continue
            found[content] = example
            draws_in_vain = 0
        if len(found) < n:
            raise InvalidInput(
                f"{self.name} has no {n:,} distinct {split} items: {len(found):,} were found.",
                f"Ask for at most {len(found):,}.",
            )
        return list(found.values())


def canonical_content(example: Example) -> str:
    """What makes an item the same question: its folded prompt; of lettered options, only the text of the right one.

    A question with other wrong options, or with its options in another order, is the same question, and belongs to
    the same split.
    """
    lines = example.prompt.splitlines()
    right = f"{example.completion} "
    return folded("\n".join(line.removeprefix(right) for line in lines if not _is_wrong_option(line, right)))


def _is_wrong_option(line: str, right: str) -> bool:
    return _LETTERED_OPTION.match(line) is not None and not line.startswith(right)


def split_of(content: str) -> Split:
    """The split that canonical content belongs to: 70 % train, 15 % validation, 15 % test."""
    place = content_hash(content) / HASH_RANGE
    if place < TRAIN_SHARE:
        return "train"
    return "validation" if place < TRAIN_SHARE + VALIDATION_SHARE else "test"
