"""How near a generated program is to the wanted one, and how many of several samples a task needs.

All of Python programs; nothing is run here (see `training.evaluation.sandbox` and `code_generation`).
"""

import ast
import io
import keyword
import math
import re
import tokenize
from collections.abc import Sequence

_FENCED = re.compile(r"^```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = ("python", "py", "python3", "")
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)


def extracted_code(answer: str) -> str:
    """The program in a model's answer: its first fenced block of Python (else its first fenced block), or all of it.

    A fence that is never closed goes to the end of the answer.
    """
    blocks: list[tuple[str, str]] = _FENCED.findall(answer)
    of_python = [code for language, code in blocks if language.lower() in _PYTHON]
    return (of_python or [code for _, code in blocks] or [answer])[0].strip("\n")


def exact_match(answer: str, wanted: str) -> bool:
    """Whether both texts are equal, but for white space at the ends of lines and empty lines around."""
    return _lines(answer) == _lines(wanted)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def edit_similarity(answer: str, wanted: str) -> float:
    """1 − d / max(|a|, |b|), with Levenshtein's distance d in characters; of two empty texts 1.

    `difflib`'s ratio is another quantity (twice the matching blocks), and depends on the order of its arguments.
    """
    longer = max(len(answer), len(wanted))
    return 1 - levenshtein(answer, wanted) / longer if longer else 1.0


def levenshtein(a: str, b: str) -> int:
    """The least number of single-character insertions, deletions and replacements that make `b` of `a`.

    Bit-parallel: a column of the table is two integers of |a| bits, the places where it grows and where it falls
    (Myers, J. ACM 46(3), 1999, in Hyyrö's form, 2001), so a character of `b` costs a few operations on long integers.
    """
    if not a or not b:
        return len(a) + len(b)
    places: dict[str, int] = {}
    for row, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << row
    every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = every, 0, len(a)
    for character in b:
        equal = places.get(character, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right_up, right_down = down | ~(diagonal | up) & every, up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up, right_down = (right_up << 1 | 1) & every, right_down << 1 & every
        up, down = right_down | ~(diagonal | right_up) & every, right_up & diagonal
    return distance


def parses(code: str) -> bool:
    """Whether Python's own parser takes it, and there is something in it."""
    try:
        return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: null bytes
        return False


def abstracted(code: str) -> tuple[str, ...] | None:
    """The program's tokens with names and literals replaced by placeholders, numbered in order of appearance.

    `total = price * 2` and `x = y * 3` both become `NAME_0 = NAME_1 * NUMBER_0`. The same name is the same placeholder
    throughout, so a consistent renaming changes nothing, and an inconsistent one does. Names are of one kind: without
    running a program Python does not say which are methods. Comments and layout within lines are left out. As in
    Zlotchevski et al. (arXiv 2208.13928), for Python.

    Returns:
        the tokens, or None where the text cannot be read as Python.
    """
    try:
        found = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    seen: dict[tuple[str, str], str] = {}
    counts: dict[str, int] = {}
    tokens = []
    for token in found:
        kind = _placeholder(token)
        if token.type in _LAYOUT:
            continue
        if kind is None:
            tokens.append(_structure(token))
            continue
        if (kind, token.string) not in seen:
            seen[kind, token.string] = f"{kind}_{counts.get(kind, 0)}"
            counts[kind] = counts.get(kind, 0) + 1
        tokens.append(seen[kind, token.string])
    return tuple(tokens)


def _placeholder(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
        return "NAME"
    return {tokenize.NUMBER: "NUMBER", tokenize.STRING: "STRING"}.get(token.type)


def _structure(token: tokenize.TokenInfo) -> str:
    """Line ends and indentation by their kind alone: how far a block is indented does not matter."""
    structural = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return tokenize.tok_name[token.type] if token.type in structural else token.string


def abstracted_match(answer: str, wanted: str) -> bool:
    """Whether two programs are equal but for the choice of names and literals."""
    tokens = abstracted(answer)
    return tokens is not None and tokens == abstracted(wanted)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that of k samples, drawn from n of which c are correct, at least one is.

    The unbiased estimator 1 − C(n − c, k) / C(n, k) of Chen et al. (arXiv 2107.03374, equation 1), as the product
    1 − Π_{i=n−c+1..n} (1 − k/i), in which nothing overflows.

    Args:
        samples: n, at least k.
        correct: c, 0 ≤ c ≤ n.
        k: at least 1.

    Raises:
        ValueError: numbers out of these bounds.
    """
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise ValueError(f"pass@{k} of {correct} correct samples among {samples} is not defined")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """The mean of `pass_at_k` over tasks, each (n, c)."""
    return math.fsum(pass_at_k(n, c, k) for n, c in counts) / len(counts)
