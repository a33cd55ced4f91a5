"""Shuffled objects: who holds what after a series of swaps."""

import random
from dataclasses import dataclass

from training.data.example import Example
from training.tasks.english import NAMES, listed, with_article
from training.tasks.options import multiple_choice
from training.tasks.task import Task


@dataclass(frozen=True)
class Setting:
    """What is passed around: `kinds` of one `thing`, and the sentence that brings the people together."""

    thing: str
    opening: str
    kinds: tuple[str, ...]


SETTINGS = (
    Setting(
        "ball",
        "are throwing balls to each other",
        ("black", "blue", "brown", "green", "orange", "pink", "purple", "red", "white", "yellow"),
    ),
    Setting(
        "present",
        "are at a gift exchange",
        ("blue", "gold", "green", "orange", "pink", "purple", "red", "silver", "striped", "white"),
    ),
    Setting(
        "card",
        "are sitting at a card table",
        ("ace", "eight", "five", "four", "jack", "king", "nine", "queen", "seven", "ten"),
    ),
    Setting(
        "book",
        "are members of a reading circle",
        ("adventure", "chess", "cookery", "crime", "gardening", "history", "music", "poetry", "sailing", "travel"),
    ),
)


def draw(rng: random.Random) -> Example:
    """`… Rosa has a red ball … First, Rosa and Milo swap … At the end, Rosa has the` → `(C)`."""
    setting = rng.choice(SETTINGS)
    people = rng.sample(NAMES, rng.randint(3, 5))
    objects = [f"{kind} {setting.thing}" for kind in rng.sample(setting.kinds, len(people))]
    holds = dict(zip(people, objects, strict=True))
    start = listed([f"{person} has {with_article(thing)}" for person, thing in holds.items()])
    swaps = []
    count = rng.randint(len(people), len(people) + 2)
    for number in range(count):
        one, other = rng.sample(people, 2)
        holds[one], holds[other] = holds[other], holds[one]
        when = "First" if number == 0 else "Finally" if number == count - 1 else "Then"
        swaps.append(f"{when}, {one} and {other} swap {setting.thing}s.")
    asked = rng.choice(people)
    question = (
        f"{listed(people)} {setting.opening}. At the start, {start}. "
        f"Then pairs of them swap. {' '.join(swaps)} At the end, {asked} has the"
    )
    return multiple_choice(rng, question, holds[asked], [thing for thing in objects if thing != holds[asked]])


TASK = Task(
    name="tracking_shuffled_objects",
    description="Who holds which object after a series of swaps.",
    metric="multiple_choice",
    instruction="Follow the swaps and choose the option that completes the text. Answer with its letter, as in (A).",
    max_completion_tokens=4,
    draw=draw,
)
