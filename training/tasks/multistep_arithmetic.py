"""Arithmetic in several steps: two parenthesised sums of products of small integers, combined."""

import random
from math import prod

from training.data.example import Example
from training.tasks.task import Task


def draw(rng: random.Random) -> Example:
    """`((-1 + 2 + 9 * 5) - (-2 + -4 + -4 * -7)) =` → `24`."""
    left_text, left = _group(rng)
    right_text, right = _group(rng)
    operator = rng.choice("+-*")
    answer = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return Example(f"(({left_text}) {operator} ({right_text})) =", str(answer))


def _group(rng: random.Random) -> tuple[str, int]:
    """Three or four integers joined by `+`, `-`, `*`, and their value: a signed sum of products."""
    first = rng.randint(-9, 9)
    text = str(first)
    terms = [[first]]
    for _ in range(rng.randint(2, 3)):
        operator, number = rng.choice("+-*"), rng.randint(-9, 9)
        text += f" {operator} {number}"
        if operator == "*":
            terms[-1].append(number)
        else:
            terms.append([number if operator == "+" else -number])
    return text, sum(prod(factors) for factors in terms)


TASK = Task(
    name="multistep_arithmetic",
    description="The value of an expression of small integers, in several steps.",
    metric="exact_match",
    instruction="Compute the value of the expression. Answer with an integer in digits.",
    max_completion_tokens=8,
    draw=draw,
)
