"""Navigation: whether a walk on a grid ends where it began."""

import random

from training.data.example import Example
from training.tasks.task import Task

# Quarter turns clockwise from the heading at the start.
FORWARD, RIGHT, BACKWARD, LEFT = range(4)
STEP_WORDS = {FORWARD: "forward", RIGHT: "right", BACKWARD: "backward", LEFT: "left"}
TURN_WORDS = {1: "Turn right.", 2: "Turn around.", 3: "Turn left."}


def draw(rng: random.Random) -> Example:
    """`… Take 2 steps. Turn around. Take 2 steps. …` → `Yes`.

    A walk that does not return is one that does, with the length of one leg changed: the two look alike.
    """
    legs = _closed_walk(rng)
    returns = rng.random() < 0.5
    if not returns:
        changed = rng.randrange(len(legs))
        heading, steps = legs[changed]
        legs[changed] = (heading, rng.choice([other for other in range(1, 11) if other != steps]))
    instructions = rng.choice((_sidesteps, _turns))(legs)
    prompt = f"If you follow these instructions, do you end where you began? {instructions}\nOptions:\n- Yes\n- No"
    return Example(prompt, "Yes" if returns else "No", ("Yes", "No"))


def _closed_walk(rng: random.Random) -> list[tuple[int, int]]:
    """(heading, steps) legs in random order whose sum is zero, along one axis or both."""
    legs: list[tuple[int, int]] = []
    for there, back in rng.sample(((FORWARD, BACKWARD), (LEFT, RIGHT)), rng.randint(1, 2)):
        distance = rng.randint(2, 10)
        for heading in (there, back):
            first = rng.randint(1, distance)
            legs.extend((heading, steps) for steps in (first, distance - first) if steps)
    rng.shuffle(legs)
    return legs


def _sidesteps(legs: list[tuple[int, int]]) -> str:
    return " ".join(["Always face forward.", *(f"Take {_steps(n)} {STEP_WORDS[heading]}." for heading, n in legs)])


def _turns(legs: list[tuple[int, int]]) -> str:
    sentences: list[str] = []
    facing = FORWARD
    for heading, n in legs:
        if heading != facing:
            sentences.append(TURN_WORDS[(heading - facing) % 4])
        sentences.append(f"Take {_steps(n)}.")
        facing = heading
    return " ".join(sentences)


def _steps(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"


TASK = Task(
    name="navigate",
    description="Whether a list of steps and turns leads back to the start.",
    metric="multiple_choice",
    instruction="Decide whether the walk ends at its starting point. Answer Yes or No.",
    max_completion_tokens=4,
    draw=draw,
)
