"""Boolean expressions of the constants and `not`, `and`, `or`, with Python's precedence."""

import random

from training.data.example import Example
from training.tasks.task import Task


def draw(rng: random.Random) -> Example:
    """`not ( True and False ) is` → `True`."""
    wanted = rng.random() < 0.5  # left to themselves, expressions are a little more often true
    text, value = _expression(rng, constants=rng.randint(3, 6))
    while value != wanted:
        text, value = _expression(rng, constants=rng.randint(3, 6))
    return Example(f"{text} is", str(value), ("True", "False"))


def _expression(rng: random.Random, constants: int) -> tuple[str, bool]:
    """Two or more operands joined by `and` and `or`, and their value: an `or` of `and`s, since `and` binds tighter."""
    words: list[str] = []
    conjunctions = [True]
    while constants:
        size = rng.randint(1, min(3, constants if words else constants - 1))
        text, value = _operand(rng, size)
        constants -= size
        conjunctions[-1] = conjunctions[-1] and value
        words.append(text)
        if constants:
            operator = rng.choice(("and", "or"))
            words.append(operator)
            if operator == "or":
                conjunctions.append(True)
    return " ".join(words), any(conjunctions)


def _operand(rng: random.Random, constants: int) -> tuple[str, bool]:
    """A constant, or an expression in parentheses, after none, one or two `not`s."""
    if constants == 1:
        value = rng.choice((True, False))
        text = str(value)
    else:
        text, value = _expression(rng, constants)
        text = f"( {text} )"
    negations = rng.choice((0, 0, 1, 1, 2))
    return "not " * negations + text, value ^ (negations % 2 == 1)


TASK = Task(
    name="boolean_expressions",
    description="The truth value of an expression of True, False, not, and, or.",
    metric="multiple_choice",
    instruction="Evaluate the Boolean expression. Answer True or False.",
    max_completion_tokens=4,
    draw=draw,
)
