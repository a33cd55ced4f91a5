"""Small Python functions on lists of whole numbers, written from a specification and judged by hidden tests."""

import random

from training.data.example import Example
from training.tasks.task import Task

# What is said of a number n, and the same in Python.
CONDITIONS = {
    "are even": "n % 2 == 0",
    "are odd": "n % 2 == 1",
    "are positive": "n > 0",
    "are negative": "n < 0",
    **{f"are greater than {k}": f"n > {k}" for k in range(1, 10)},
    **{f"are smaller than {k}": f"n < {k}" for k in range(1, 10)},
    **{f"can be divided by {k}": f"n % {k} == 0" for k in range(3, 10)},
}
CHANGES = {
    "squares each": "n * n",
    "negates each": "-n",
    "takes the absolute value of each": "abs(n)",
    **{f"adds {k} to each": f"n + {k}" for k in range(1, 10)},
    **{f"subtracts {k} from each": f"n - {k}" for k in range(1, 10)},
    **{f"multiplies each by {k}": f"n * {k}" for k in range(2, 10)},
}
RESULTS = {
    "their sum": "sum(numbers)",
    "how many there are": "len(numbers)",
    "the largest, or 0 if there is none": "max(numbers, default=0)",
    "the smallest, or 0 if there is none": "min(numbers, default=0)",
    "them in reverse order": "numbers[::-1]",
    "them in ascending order": "sorted(numbers)",
    "them in descending order": "sorted(numbers, reverse=True)",
    "the different ones among them in ascending order": "sorted(set(numbers))",
}
TESTS = 6


def draw(rng: random.Random) -> Example:
    """`… that keeps those that are even, adds 3 to each, and returns their sum.` → the function; tests call it."""
    kept, changed = rng.choice(tuple(CONDITIONS)), rng.choice(tuple(CHANGES))
    steps = [
        (f"keeps those that {kept}", f"numbers = [n for n in numbers if {CONDITIONS[kept]}]"),
        (changed, f"numbers = [{CHANGES[changed]} for n in numbers]"),
    ]
    rng.shuffle(steps)
    result = rng.choice(tuple(RESULTS))
    said = ", ".join(words for words, _ in steps)
    lines = ["def answer(numbers):", *(line for _, line in steps), f"return {RESULTS[result]}"]
    program = "\n    ".join(lines)
    return Example(
        f"Write a Python function answer(numbers) that takes a list of whole numbers, {said}, and returns {result}.",
        program,
        tests=_tests(rng, program),
    )


def _tests(rng: random.Random, program: str) -> str:
    """What the reference program answers to the empty list and to lists with some numbers twice."""
    names: dict[str, object] = {}
    exec(program, names)  # of our own making
    answer = names["answer"]
    assert callable(answer)
    given = [[], *([rng.randint(-15, 20) for _ in range(rng.randint(3, 8))] for _ in range(TESTS - 1))]
    return "\n".join(
        f"assert answer({numbers}) == {answer(list(numbers))}" for numbers in (each + each[:2] for each in given)
    )


TASK = Task(
    name="python_functions",
    description="A Python function from a specification, with hidden tests.",
    metric="pass@1",
    instruction="Answer with the Python function and nothing else.",
    max_completion_tokens=90,
    draw=draw,
)
