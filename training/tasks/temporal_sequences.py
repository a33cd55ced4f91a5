"""A day with one gap: when could somebody have gone there?"""

import random
from itertools import pairwise

from training.data.example import Example
from training.tasks.english import NAMES
from training.tasks.options import multiple_choice
from training.tasks.task import Task

PLACES = (
    "aquarium",
    "art gallery",
    "bakery",
    "bank",
    "barber shop",
    "botanical garden",
    "cinema",
    "dental clinic",
    "gym",
    "harbour market",
    "library",
    "museum",
    "observatory",
    "pharmacy",
    "post office",
    "swimming pool",
    "tailor",
    "theatre",
    "town hall",
    "zoo",
)
ACTIVITIES = (
    "buying shoes at the mall",
    "driving to the lake",
    "fixing a bicycle in the yard",
    "having lunch at the canteen",
    "painting a fence",
    "playing tennis at the club",
    "practising the piano at home",
    "reading under a tree",
    "repairing a radio in the garage",
    "sitting on a rooftop",
    "stretching at a studio",
    "taking photos near the river",
    "walking a dog in the park",
    "waiting at the airport",
    "watering plants on the balcony",
    "writing letters in a cafe",
    "working at the office",
    "attending a lecture",
    "cooking at the shelter",
    "planting trees on the hill",
)
LATEST = 22  # o'clock


def draw(rng: random.Random) -> Example:
    """`… Leon woke up at 5am. … When could Leon have gone to the zoo?` → `(B)`."""
    person, *witnesses = rng.sample(NAMES, 6)
    place = rng.choice(PLACES)
    hours = _boundaries(rng)
    spans = list(pairwise(hours))
    free = rng.choice(spans)
    busy = [span for span in spans if span != free]
    sightings = [
        f"{witness} saw {person} {activity} from {_clock(start)} to {_clock(end)}."
        for witness, activity, (start, end) in zip(witnesses, rng.sample(ACTIVITIES, len(busy)), busy, strict=False)
    ]
    rng.shuffle(sightings)
    question = "\n".join(
        [
            f"Today, {person} went to the {place}. We know that:",
            f"{person} woke up at {_clock(hours[0])}.",
            *sightings,
            f"The {place} was closed after {_clock(hours[-1])}.",
            f"Between what times could {person} have gone to the {place}?",
        ]
    )
    return multiple_choice(rng, question, _span(free), [_span(span) for span in rng.sample(busy, 3)])


def _boundaries(rng: random.Random) -> list[int]:
    """Full hours that cut the time from waking to closing into four to six spans of one to four hours."""
    while True:
        hours = [rng.randint(5, 10)]
        for _ in range(rng.randint(4, 6)):
            hours.append(hours[-1] + rng.randint(1, 4))
        if hours[-1] <= LATEST:
            return hours


def _clock(hour: int) -> str:
    return f"{(hour - 1) % 12 + 1}{'am' if hour < 12 else 'pm'}"


def _span(span: tuple[int, int]) -> str:
    return f"{_clock(span[0])} to {_clock(span[1])}"


TASK = Task(
    name="temporal_sequences",
    description="The only gap in a day in which somebody could have gone somewhere.",
    metric="multiple_choice",
    instruction="Find the only time that is free and choose the right option. Answer with its letter, as in (A).",
    max_completion_tokens=4,
    draw=draw,
)
