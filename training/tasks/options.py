"""Lettered options: `(A)`, `(B)`, …"""

import random
import string
from collections.abc import Sequence

from training.data.example import Example


def multiple_choice(rng: random.Random, question: str, answer: str, others: Sequence[str]) -> Example:
    """A question with its options in random order; the completion is the right option's letter, as in `(B)`."""
    options = [answer, *others]
    rng.shuffle(options)
    letters = tuple(f"({letter})" for letter in string.ascii_uppercase[: len(options)])
    lines = [f"{letter} {option}" for letter, option in zip(letters, options, strict=True)]
    prompt = "\n".join([question, "Options:", *lines])
    return Example(prompt, letters[options.index(answer)], letters)
