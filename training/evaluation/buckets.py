"""Items by the length of their prompts, in tokens as the model that is served reads them."""

from collections.abc import Sequence
from itertools import pairwise

from training.data.example import Example
from training.data.prompting import PromptFormat


def prompt_lengths(examples: Sequence[Example], shots: Sequence[Example], form: PromptFormat) -> list[int]:
    """Tokens of each prompt, with everything in it: template, instruction and solved examples."""
    texts = [form.prompt(example.prompt, shots) for example in examples]
    return [len(ids) for ids in form.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def in_buckets(lengths: Sequence[int], limits: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Places of the lengths that are above `low` and at most `high`, by (low, high), from 0 to the last limit.

    The buckets are disjoint; lengths above the last limit are in none.
    """
    return {
        (low, high): [place for place, length in enumerate(lengths) if low < length <= high]
        for low, high in pairwise((0, *limits))
    }
