"""Counting: how many things of one category are in a list of things."""

import random

from training.data.example import Example
from training.tasks.english import NUMBER_WORDS, listed, with_article
from training.tasks.task import Task

# Category: {singular: plural}. No noun belongs to two categories.
CATEGORIES = {
    "fruits": {
        noun: f"{noun}s"
        for noun in ("apple", "apricot", "banana", "fig", "grape", "lemon", "mango", "orange", "pear", "plum", "quince")
    }
    | {"cherry": "cherries", "peach": "peaches", "strawberry": "strawberries"},
    "vegetables": {
        noun: f"{noun}s"
        for noun in ("artichoke", "beetroot", "cabbage", "carrot", "cauliflower", "leek", "onion", "parsnip", "turnip")
    }
    | {"potato": "potatoes", "radish": "radishes", "celery stalk": "celery stalks"},
    "animals": {
        noun: f"{noun}s"
        for noun in ("bear", "cat", "chicken", "cow", "dog", "duck", "frog", "goat", "horse", "owl", "pig", "rabbit")
    }
    | {"mouse": "mice", "goose": "geese", "donkey": "donkeys", "pony": "ponies"},
    "musical instruments": {
        noun: f"{noun}s"
        for noun in ("accordion", "bassoon", "cello", "clarinet", "drum", "flute", "guitar", "harp", "oboe", "piano")
    }
    | {"trombone": "trombones", "trumpet": "trumpets", "tuba": "tubas", "violin": "violins"},
    "pieces of furniture": {
        noun: f"{noun}s"
        for noun in ("armchair", "bed", "bookcase", "chair", "cupboard", "desk", "sofa", "stool", "table", "wardrobe")
    }
    | {"bench": "benches"},
    "tools": {
        noun: f"{noun}s"
        for noun in ("axe", "chisel", "drill", "file", "hammer", "rake", "saw", "screwdriver", "shovel", "spanner")
    },
    "pieces of clothing": {
        noun: f"{noun}s"
        for noun in ("apron", "cap", "cardigan", "coat", "hat", "jacket", "shirt", "skirt", "sock", "sweater")
    }
    | {"scarf": "scarves", "dress": "dresses"},
}
EVERYTHING = "things"

_NOUNS = {noun: plural for nouns in CATEGORIES.values() for noun, plural in nouns.items()}


def draw(rng: random.Random) -> Example:
    """`I have two pears, a drum and three cats. How many animals do I have?` → `3`.

    Three questions in four ask for all `things`; the others name a category and have up to two distractors.
    """
    if rng.random() < 0.75:
        asked = EVERYTHING
        counted = rng.sample(tuple(_NOUNS), rng.randint(2, 6))
        distractors: list[str] = []
    else:
        asked = rng.choice(tuple(CATEGORIES))
        counted = rng.sample(tuple(CATEGORIES[asked]), rng.randint(2, 5))
        others = [noun for category, nouns in CATEGORIES.items() if category != asked for noun in nouns]
        distractors = rng.sample(others, rng.choice((0, 0, 1, 2)))
    quantities = {noun: rng.choice((1, 1, 1, 1, 2, 3)) for noun in [*counted, *distractors]}
    mentioned = list(quantities)
    rng.shuffle(mentioned)
    have = listed([_quantity(noun, quantities[noun]) for noun in mentioned])
    answer = sum(quantities[noun] for noun in counted)
    return Example(f"I have {have}. How many {asked} do I have?", str(answer))


def _quantity(noun: str, count: int) -> str:
    return with_article(noun) if count == 1 else f"{NUMBER_WORDS[count]} {_NOUNS[noun]}"


TASK = Task(
    name="object_counting",
    description="How many fruits, animals, tools, … are in a list of things.",
    metric="exact_match",
    instruction="Count what the question asks for. Answer with a number in digits.",
    max_completion_tokens=4,
    draw=draw,
)
