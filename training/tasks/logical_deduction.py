"""Logical deduction: the place of one thing in an order that clues determine."""

import random
from dataclasses import dataclass
from itertools import combinations, permutations

from training.data.example import Example
from training.tasks.english import NAMES, NUMBER_WORDS, listed
from training.tasks.options import multiple_choice
from training.tasks.task import Task


@dataclass(frozen=True)
class Scene:
    """Things in a row, and how one speaks of their order.

    Args:
        opening: a sentence with `{n}` and `{things}`.
        kinds: what is ordered.
        thing: how a kind is named in a sentence.
        before, after: the relation of a thing to one that comes later, or earlier.
        places: the predicate of the first place, of the `{ordinal}` ones, of the last but one, and of the last.
    """

    opening: str
    kinds: tuple[str, ...]
    thing: str
    before: str
    after: str
    places: tuple[str, str, str, str]


COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "purple", "red", "white", "yellow")
BIRDS = ("blackbird", "crow", "finch", "hawk", "jay", "magpie", "owl", "raven", "robin", "sparrow", "swallow", "wren")
VEHICLES = ("bus", "convertible", "coupe", "limousine", "minivan", "motorcycle", "sedan", "tractor", "truck", "wagon")
FRUITS = ("apples", "apricots", "cherries", "figs", "grapes", "mangoes", "melons", "peaches", "pears", "plums")
FROM_LEFT_TO_RIGHT = ("is the leftmost", "is the {ordinal} from the left", "is the second from the right",
                      "is the rightmost")  # fmt: skip

SCENES = (
    Scene("On a shelf there are {n} books: {things}.", COLOURS, "the {} book", "is to the left of",
          "is to the right of", FROM_LEFT_TO_RIGHT),
    Scene("On a branch there are {n} birds: {things}.", BIRDS, "the {}", "is to the left of",
          "is to the right of", FROM_LEFT_TO_RIGHT),
    Scene("In a race there were {n} runners: {things}.", NAMES, "{}", "finished ahead of", "finished behind",
          ("finished first", "finished {ordinal}", "finished second-to-last", "finished last")),
    Scene("At a vintage fair there are {n} vehicles: {things}.", VEHICLES, "the {}", "is newer than", "is older than",
          ("is the newest", "is the {ordinal}-newest", "is the second-oldest", "is the oldest")),
    Scene("A market stall sells {n} kinds of fruit: {things}.", FRUITS, "the {}", "cost less than", "cost more than",
          ("are the cheapest", "are the {ordinal}-cheapest", "are the second-most expensive",
           "are the most expensive")),
)  # fmt: skip


def draw(rng: random.Random) -> Example:
    """`On a shelf … The red book is to the left of the blue book. …` → `(A)`."""
    scene = rng.choice(SCENES)
    n = rng.randint(3, 5)
    order = [scene.thing.format(kind) for kind in rng.sample(scene.kinds, n)]
    clues, revealed = _sufficient_clues(rng, scene, order)
    place = rng.choice([place for place in range(n) if place not in revealed])
    mentioned = list(order)
    rng.shuffle(mentioned)
    opening = scene.opening.format(n=NUMBER_WORDS[n], things=listed(mentioned))
    options = {thing: f"{_capital(thing)} {_place(scene, place, n)}." for thing in order}
    answer = options.pop(order[place])
    return multiple_choice(rng, " ".join([opening, *clues]), answer, list(options.values()))


def _sufficient_clues(rng: random.Random, scene: Scene, order: list[str]) -> tuple[list[str], set[int]]:
    """Sentences, each of which narrows the order down, until one order is left; and the places they state outright."""
    n = len(order)
    candidates: list[tuple[int, ...]] = [*combinations(range(n), 2), *((place,) for place in range(n))]
    rng.shuffle(candidates)
    possible = list(permutations(range(n)))  # possible[k][i]: the place of thing i in the k-th order that is left
    sentences: list[str] = []
    revealed: set[int] = set()
    for clue in candidates:
        if len(clue) == 1:
            (place,) = clue
            left = [places for places in possible if places[place] == place]
            sentence = f"{_capital(order[place])} {_place(scene, place, n)}."
        else:
            first, second = clue
            left = [places for places in possible if places[first] < places[second]]
            if rng.random() < 0.5:
                sentence = f"{_capital(order[first])} {scene.before} {order[second]}."
            else:
                sentence = f"{_capital(order[second])} {scene.after} {order[first]}."
        if len(left) < len(possible):
            possible = left
            sentences.append(sentence)
            revealed.update(clue if len(clue) == 1 else ())
    return sentences, revealed


def _place(scene: Scene, place: int, n: int) -> str:
    """The predicate of a place; the last but one is counted from the end when there are four things or more."""
    first, counted, last_but_one, last = scene.places
    if place == 0:
        return first
    if place == n - 1:
        return last
    if place == n - 2 and n > 3:
        return last_but_one
    return counted.format(ordinal=("second", "third")[place - 1])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


TASK = Task(
    name="logical_deduction",
    description="Which of three to five things has a given place in an order that clues determine.",
    metric="multiple_choice",
    instruction="Only one option follows from the statements. Answer with its letter, as in (A).",
    max_completion_tokens=4,
    draw=draw,
)
