"""Whether an item's tests can judge a program at all: asked once, before any program is written."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from infra.errors import InvalidInput
from training.data.example import Example
from training.evaluation.code_metrics import extracted_code
from training.evaluation.sandbox import Isolation, Limits, judge_programs

_DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_IMPORTS = ast.Import | ast.ImportFrom


@lru_cache(maxsize=8)  # a study measures the same items on every adapter
def require_sound(examples: tuple[Example, ...], limits: Limits | None, isolation: Isolation) -> None:
    """Make sure of every example that its tests parse, that they assert something, and that its reference passes them.

    Args:
        examples: with tests; an empty completion is no reference, and is not run.
        limits: of each program.
        isolation: what holds it.

    Raises:
        InvalidInput: some are not sound; says how many, which is the first, and why.
    """
    broken = {place: why for place, example in enumerate(examples) if (why := _does_not_parse(example.tests))}
    _refuse(broken, examples, "have tests that do not parse", "Mend the column that data.columns.tests names.")
    idle = {place: "" for place, example in enumerate(examples) if not asserts_something(example.tests)}
    _refuse(
        idle,
        examples,
        "have tests that assert nothing when they are run",
        "Assert what the program's functions return. Functions that only hold asserts have to be called, by a last "
        "line as check(double) or test_double().",
    )
    solved = [place for place, example in enumerate(examples) if example.completion.strip()]
    jobs = [(extracted_code(examples[place].completion), examples[place].tests) for place in solved]
    verdicts = zip(solved, judge_programs(jobs, limits, isolation), strict=True)
    failed = {place: f"{found.status}, {found.reason}" for place, found in verdicts if not found.passed}
    _refuse(
        failed,
        examples,
        "have tests that their own completion, the reference program, does not pass",
        "Mend the tests or the program; what the sandbox allows is in docs/code-evaluation.md.",
    )


def asserts_something(tests: str) -> bool:
    """Whether running the tests can find anything wrong.

    It can if code that is run, outside of functions and classes, asserts or raises, or names something that the tests
    themselves define or import, as a call of `check` or `unittest.main` does, while something in them asserts or
    raises. An assertion without any name, as `assert True`, asserts nothing.
    """
    everything, run = list(ast.walk(ast.parse(tests))), list(_run(ast.parse(tests)))
    own = {node.name for node in everything if isinstance(node, _DEFINITIONS)}
    own |= {
        (alias.asname or alias.name).partition(".")[0]
        for node in everything
        if isinstance(node, _IMPORTS)
        for alias in node.names
    }
    calls_own = any(isinstance(node, ast.Name) and node.id in own for node in run)
    return any(map(_asserts, run)) or (calls_own and any(map(_asserts, everything)))


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return any(isinstance(part, ast.Name) for part in ast.walk(node.test))
    named = isinstance(node, ast.Attribute) and node.attr.startswith("assert")  # unittest's methods
    return isinstance(node, ast.Raise) or named


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """Every node beneath that runs where the tests do: not what functions and classes hold."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _DEFINITIONS | _IMPORTS):
            yield child
            yield from _run(child)


def _does_not_parse(tests: str) -> str:
    try:
        ast.parse(tests)
    except (SyntaxError, ValueError) as error:  # the latter: a null character
        return str(error)
    return ""


def _refuse(found: Mapping[int, str], examples: Iterable[Example], what: str, remedy: str) -> None:
    if not found:
        return
    known, first = list(examples), min(found)
    place = known[first].place or f"Example {first + 1}"
    why = f": {found[first]}" if found[first] else ""
    raise InvalidInput(f"{len(found)} of {len(known)} items {what}, the first of them {place}{why}.", remedy)
