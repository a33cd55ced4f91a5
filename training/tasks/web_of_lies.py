"""A web of lies: each person vouches for the one before, or calls them a liar."""

import random
from itertools import pairwise

from training.data.example import Example
from training.tasks.english import NAMES
from training.tasks.task import Task


def draw(rng: random.Random) -> Example:
    """`Rosa lies. Milo says Rosa tells the truth. Does Milo tell the truth?` → `No`."""
    people = rng.sample(NAMES, rng.randint(3, 6))
    truthful = rng.random() < 0.5
    sentences = [f"{people[0]} {_behaves(truthful)}."]
    for subject, speaker in pairwise(people):
        claim = rng.random() < 0.5
        sentences.append(f"{speaker} says {subject} {_behaves(claim)}.")
        truthful = claim == truthful
    sentences.append(f"Does {people[-1]} tell the truth?")
    return Example(" ".join(sentences), "Yes" if truthful else "No", ("Yes", "No"))


def _behaves(truthful: bool) -> str:
    return "tells the truth" if truthful else "lies"


TASK = Task(
    name="web_of_lies",
    description="Whether the last of a chain of people, who speak about each other, tells the truth.",
    metric="multiple_choice",
    instruction="Each person either always tells the truth or always lies. Answer Yes or No.",
    max_completion_tokens=4,
    draw=draw,
)
