"""Code metrics against brute force and plain references."""

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.evaluation.code_metrics import (
    abstracted,
    abstracted_match,
    edit_similarity,
    exact_match,
    extracted_code,
    levenshtein,
    mean_pass_at_k,
    parses,
    pass_at_k,
)

SOURCE = '''
def total(prices, rate=0.5):
    """All of it."""
    result = 0
    for price in prices:  # each
        if price > 10:
            result += price * rate
    return result, "done"
'''


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples: int) -> None:
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations(range(samples), k))
        hits = sum(any(place < correct for place in subset) for subset in subsets)
        assert pass_at_k(samples, correct, k) == pytest.approx(hits / len(subsets), abs=1e-14)


def test_pass_at_k_is_stable_where_binomials_are_huge() -> None:
    exact = 1 - Fraction(math.comb(99_000, 1000), math.comb(100_000, 1000))
    assert pass_at_k(100_000, 1000, 1000) == pytest.approx(float(exact), rel=1e-12)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-9)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over samplings is the probability that k fresh samples hold a correct one; 1 − (1 − c/n)^k is not."""
    n, k, chance = 6, 3, 0.3
    weights = [math.comb(n, c) * chance**c * (1 - chance) ** (n - c) for c in range(n + 1)]
    mean = sum(weight * pass_at_k(n, c, k) for c, weight in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - chance) ** k)
    assert mean_pass_at_k([(6, 0), (6, 6), (6, 3)], 1) == pytest.approx((0 + 1 + 0.5) / 3)


@pytest.mark.parametrize("numbers", [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0), (0, 0, 1)])
def test_pass_at_k_of_impossible_numbers_is_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(*numbers)


def plain_levenshtein(a: str, b: str) -> int:
    """Wagner and Fischer's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


@given(st.text("abc"), st.text("abcé"))
def test_the_distance_is_that_of_the_plain_table(a: str, b: str) -> None:
    assert levenshtein(a, b) == plain_levenshtein(a, b)


def test_the_distance_of_long_texts_is_that_of_the_plain_table() -> None:
    rng = random.Random(0)
    a = "".join(rng.choices("abcdef \n", k=700))
    b = "".join(each for each in a if rng.random() > 0.1) + "tail"
    assert levenshtein(a, b) == plain_levenshtein(a, b) == levenshtein(b, a)


def test_edit_similarity_is_normalised_by_the_longer_text() -> None:
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert edit_similarity("", "") == edit_similarity("same", "same") == 1.0
    assert edit_similarity("", "x") == edit_similarity("ab", "cd") == 0.0


def test_an_exact_match_overlooks_only_white_space_at_line_ends_and_around() -> None:
    assert exact_match("def f():\n    return 1  \n\n", "\ndef f():\n    return 1")
    assert not exact_match("def f():\n  return 1", "def f():\n    return 1")


def renamed(names: dict[str, str]) -> str:
    source = SOURCE
    for old, new in names.items():
        source = source.replace(old, new)
    return source


@given(st.permutations(["alpha", "beta_1", "Gamma", "δ"]))
def test_an_abstracted_match_survives_a_consistent_renaming(names: list[str]) -> None:
    other = renamed(dict(zip(("prices", "rate", "result", "total"), names, strict=True)))
    assert abstracted_match(other, SOURCE)


@pytest.mark.parametrize(
    ("change", "matches"),
    [
        (("return result", "return price"), False),  # an inconsistent renaming
        (("price > 10", "price > 11"), True),  # another literal
        (('"done"', "'over'"), True),
        (("# each", "# every one of them"), True),
        (("    ", "  "), True),
        (("price * rate", "price*rate"), True),
        (("price > 10", "price < 10"), False),
        (('"done"', "7"), False),  # a literal of another kind
        (("rate=0.5", "rate=10"), False),  # then the two numbers are one
        (("            result += price * rate", "            result += price * rate\n            break"), False),
    ],
)
def test_an_abstracted_match_looks_at_structure_alone(change: tuple[str, str], matches: bool) -> None:
    assert abstracted_match(SOURCE.replace(*change), SOURCE) is matches


def test_placeholders_are_numbered_in_order_of_appearance() -> None:
    assert abstracted("total = price * 2 + total * 2") == abstracted("x = y * 3 + x * 3")
    assert abstracted("a = b") == ("NAME_0", "=", "NAME_1", "NEWLINE")
    assert abstracted("a = (1, 'x'") is None
    assert not abstracted_match("a = (", "a = (")


@pytest.mark.parametrize(
    ("code", "right"), [(SOURCE, True), ("def f(:", False), ("", False), ("# only", False), ("a\0", False)]
)
def test_a_program_parses_or_it_does_not(code: str, right: bool) -> None:
    assert parses(code) is right


def test_endless_nesting_does_not_parse_and_does_no_harm() -> None:
    assert not parses("(" * 100_000)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\ny = 2\n```\nDone.", "x = 1\ny = 2"),
        ("```\nx = 1\n```", "x = 1"),
        ("```sh\nls\n```\nthen\n```py\nx = 1\n```", "x = 1"),
        ("```sh\nls\n```", "ls"),
        ("```python\nx = 1", "x = 1"),
        ("```python\ns = '``` no end'\n```", "s = '``` no end'"),
        ("    return 1\n", "    return 1"),
    ],
)
def test_code_is_taken_out_of_its_fence(answer: str, code: str) -> None:
    assert extracted_code(answer) == code
