"""Specifications read and solved independently of the generator, and programs run by the real sandbox."""

import ast
import re
import sys
from collections.abc import Callable

import pytest

from training.evaluation.sandbox import Limits, judge_program
from training.tasks.python_functions import TASK, TESTS

CONDITIONS: dict[str, Callable[[int, int], bool]] = {
    r"are even": lambda n, k: not n & 1,
    r"are odd": lambda n, k: bool(n & 1),
    r"are positive": lambda n, k: n >= 1,
    r"are negative": lambda n, k: n <= -1,
    r"are greater than (\d)": lambda n, k: n - k >= 1,
    r"are smaller than (\d)": lambda n, k: n - k <= -1,
    r"can be divided by (\d)": lambda n, k: (abs(n) // k) * k == abs(n),
}
CHANGES: dict[str, Callable[[int, int], int]] = {
    r"squares each": lambda n, k: n**2,
    r"negates each": lambda n, k: 0 - n,
    r"takes the absolute value of each": lambda n, k: max(n, -n),
    r"adds (\d) to each": lambda n, k: n + k,
    r"subtracts (\d) from each": lambda n, k: n - k,
    r"multiplies each by (\d)": lambda n, k: sum([n] * k),
}


def solved(steps: list[str], result: str, numbers: list[int]) -> object:
    for step in steps:
        keeping = step.removeprefix("keeps those that ")
        table = CONDITIONS if keeping != step else CHANGES
        ((function, k),) = (
            (function, int(found[1]) if found.re.groups else 0)
            for pattern, function in table.items()
            if (found := re.fullmatch(pattern, keeping))
        )
        done = [(n, function(n, k)) for n in numbers]
        numbers = [n for n, kept in done if kept] if table is CONDITIONS else [value for _, value in done]
    ordered = sorted(numbers)
    return {
        "their sum": sum(numbers),
        "how many there are": len(numbers),
        "the largest, or 0 if there is none": ordered[-1] if ordered else 0,
        "the smallest, or 0 if there is none": ordered[0] if ordered else 0,
        "them in reverse order": list(reversed(numbers)),
        "them in ascending order": ordered,
        "them in descending order": list(reversed(ordered)),
        "the different ones among them in ascending order": [n for n in range(-999, 999) if n in numbers],
    }[result]


def test_the_tests_ask_for_what_the_specification_says() -> None:
    for item in TASK.generate("test", 300, seed=1):
        said = re.fullmatch(r"Write .* whole numbers, (.+?), and returns (.+)\.", item.prompt)
        assert said
        asserts = [node.test for node in ast.parse(item.tests).body if isinstance(node, ast.Assert)]
        assert len(asserts) == TESTS
        for compared in asserts:
            (call, wanted) = compared.left, compared.comparators[0]  # type: ignore[attr-defined]
            numbers = ast.literal_eval(call.args[0])
            assert solved(said[1].split(", "), said[2], numbers) == ast.literal_eval(wanted), item.prompt


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
def test_the_reference_passes_its_tests_and_another_items_program_does_not() -> None:
    items = TASK.generate("validation", 6, seed=0)
    limits = Limits(seconds=60)
    for item, other in zip(items, [*items[1:], items[0]], strict=True):
        assert judge_program(item.completion, item.tests, limits).passed
        assert judge_program(other.completion, item.tests, limits).status == "failed"


def test_tests_are_part_of_an_item_but_not_of_what_a_model_is_shown() -> None:
    for item in TASK.generate("train", 20, seed=0):
        assert "assert" not in item.text
        assert item.tests.startswith("assert answer([]) == ")
