"""Dyck languages: the brackets that close what a sequence has left open."""

import random

from training.data.example import Example
from training.tasks.task import Task

BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def draw(rng: random.Random) -> Example:
    """`Complete … Input: [ { [ ] (` → `) } ]`."""
    depth_wanted = rng.randint(1, 6)
    pairs_closed = rng.randint(0 if depth_wanted > 3 else 2, 5)
    sequence: list[str] = []
    awaited: list[str] = []
    openings_left = depth_wanted + pairs_closed
    while openings_left or len(awaited) > depth_wanted:
        if awaited and (not openings_left or rng.random() < 0.4) and openings_left + len(awaited) > depth_wanted:
            sequence.append(awaited.pop())
        else:
            opening = rng.choice(tuple(BRACKETS))
            sequence.append(opening)
            awaited.append(BRACKETS[opening])
            openings_left -= 1
    return Example(
        f"Close every bracket that is still open, in the right order. Input: {' '.join(sequence)}",
        " ".join(reversed(awaited)),
    )


TASK = Task(
    name="dyck_languages",
    description="The closing brackets that complete a sequence of four kinds of brackets.",
    metric="exact_match",
    instruction="Complete the sequence. Answer with only the missing closing brackets, separated by single spaces.",
    max_completion_tokens=16,
    draw=draw,
)
