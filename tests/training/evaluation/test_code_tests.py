"""Tests that cannot judge a program are refused before one is written."""

import sys

import pytest

from infra.errors import InvalidInput
from training.data.example import Example
from training.evaluation.code_tests import asserts_something, require_sound
from training.evaluation.sandbox import strongest_isolation
from training.tasks.catalog import get_task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

SQUARE = "def f(x):\n    return x * x\n"


def item(tests: str, completion: str = SQUARE, place: str = "") -> Example:
    return Example("Square it.", completion, tests=tests, place=place)


def require(*items: Example) -> None:
    require_sound(items, None, strongest_isolation())


@pytest.mark.parametrize(
    "tests",
    [
        "pass",
        "assert True",
        "assert 1 + 1 == 2",
        "x = f(2)",
        "'assert f(2) == 4'",
        "def test_a():\n    assert f(2) == 4",
        "def check(candidate):\n    assert candidate(2) == 4",
        "import unittest\nclass Tests(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(2), 4)",
        "def check(candidate):\n    print(candidate(2))\ncheck(f)",
        "if False:\n    def test_a():\n        assert f(2) == 4",
    ],
)
def test_what_cannot_find_a_wrong_program_wrong_asserts_nothing(tests: str) -> None:
    assert not asserts_something(tests)
    with pytest.raises(InvalidInput, match="assert nothing when they are run") as refused:
        require(item("assert f(2) == 4"), item(tests, place="t.jsonl line 9"))
    assert "1 of 2 items" in refused.value.what and "t.jsonl line 9" in refused.value.what
    assert "called" in refused.value.remedy


@pytest.mark.parametrize(
    "tests",
    [
        "assert f(2) == 4",
        "for n in range(3):\n    assert f(n) == n * n",
        "if f(2) != 4:\n    raise ValueError",
        "def check(candidate):\n    assert candidate(2) == 4\ncheck(f)",
        "def test_a():\n    assert f(2) == 4\nfor test in [test_a]:\n    test()",
    ],
)
def test_asserts_that_are_run_by_whatever_road_are_taken(tests: str) -> None:
    assert asserts_something(tests)
    require(item(tests))


def test_tests_that_do_not_parse_are_told_with_their_row() -> None:
    with pytest.raises(InvalidInput, match=r"2 of 3 items have tests that do not parse.*Example 2: invalid syntax"):
        require(item("assert f(2) == 4"), item("assert f(2)="), item("assert"))


def test_tests_that_their_own_reference_fails_are_told_with_their_row_and_why() -> None:
    wrong = [item("assert f(2) == 5", place="t.jsonl line 4"), item("assert g(2) == 4")]
    with pytest.raises(InvalidInput, match="2 of 3 items have tests that their own completion") as refused:
        require(item("assert f(2) == 4"), *wrong)
    assert "t.jsonl line 4: failed, AssertionError, at: assert f(2) == 5" in refused.value.what


def test_a_reference_may_be_fenced_as_an_answer_is_or_not_be_there() -> None:
    require(item("assert f(2) == 4", f"So:\n```python\n{SQUARE}```"), item("assert f(2) == 4", ""))


def test_the_built_in_tests_are_sound() -> None:
    require(*get_task("python_functions").generate("test", 10, seed=3))
