"""Syllogisms and fallacies: whether a conclusion follows from premises about who is what."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from training.data.example import Example
from training.tasks.english import NAMES, with_article
from training.tasks.task import Task

RELATIONS = ("admirer", "classmate", "client", "colleague", "cousin", "critic", "friend", "neighbour", "opponent",
             "relative", "rival", "student", "teammate", "tutor")  # fmt: skip
ORDINALS = ("First", "Second", "Third")


@dataclass(frozen=True)
class Literal:
    """Predicate number `predicate`, or its negation."""

    predicate: int
    positive: bool

    def __neg__(self) -> "Literal":
        return Literal(self.predicate, not self.positive)

    def holds(self, person: Sequence[bool]) -> bool:
        """Whether it is true of a person, given by the truth value of every predicate."""
        return person[self.predicate] == self.positive


@dataclass(frozen=True)
class Statement:
    """Everybody (`universal`) or somebody who is `subject` is `predicate`."""

    universal: bool
    subject: Literal
    predicate: Literal


def draw(rng: random.Random) -> Example:
    """`First premise: … Second premise: … Conclusion: …` → `valid` or `invalid`.

    The valid arguments are chains of implications. The fallacies are such chains with one thing changed: the
    conclusion reversed, or negated on one side or both, or a premise reversed.
    """
    predicates = rng.randint(3, 4)
    nouns = [f"{rng.choice(RELATIONS)} of {name}" for name in rng.sample(NAMES, predicates)]
    valid = rng.random() < 0.5
    premises, conclusion = _chain(rng, predicates)
    while follows(premises, conclusion) != valid:
        premises, conclusion = _fallacy(rng, *_chain(rng, predicates))
    premises = [_contrapositive(one) if one.universal and rng.random() < 0.3 else one for one in premises]
    rng.shuffle(premises)
    sentences = [
        f"{ordinal} premise: {_sentence(rng, one, nouns)}" for ordinal, one in zip(ORDINALS, premises, strict=False)
    ]
    prompt = (
        f"{' '.join(sentences)} Conclusion: {_sentence(rng, conclusion, nouns)}\n"
        "Given only these premises, is the argument deductively valid or invalid?\nOptions:\n- valid\n- invalid"
    )
    return Example(prompt, "valid" if valid else "invalid", ("valid", "invalid"))


def follows(premises: Sequence[Statement], conclusion: Statement) -> bool:
    """Whether every non-empty world in which the premises hold makes the conclusion true.

    With one-place predicates a person is their tuple of truth values. A counterexample may hold everybody whom the
    universal premises (and, to refute `some`, the conclusion) allow, and needs a witness for each `some`.
    """
    people = list(product((True, False), repeat=1 + max(_numbers([*premises, conclusion]))))
    allowed = [
        person
        for person in people
        if all(one.predicate.holds(person) or not one.subject.holds(person) for one in premises if one.universal)
    ]
    refuting = Statement(False, conclusion.subject, -conclusion.predicate)
    witnesses_wanted = [one for one in premises if not one.universal]
    if conclusion.universal:
        witnesses_wanted.append(refuting)
    else:
        allowed = [p for p in allowed if not (conclusion.subject.holds(p) and conclusion.predicate.holds(p))]
    return not allowed or not all(
        any(one.subject.holds(person) and one.predicate.holds(person) for person in allowed) for one in witnesses_wanted
    )


def _numbers(statements: Sequence[Statement]) -> list[int]:
    return [literal.predicate for one in statements for literal in (one.subject, one.predicate)]


def _chain(rng: random.Random, predicates: int) -> tuple[list[Statement], Statement]:
    """A valid argument: a → b, b → c, … therefore a → c; or some a are b, b → c, … therefore some a are c."""
    literals = [Literal(number, rng.random() < 0.65) for number in range(predicates)]
    universal = rng.random() < 0.7
    premises = [Statement(True, one, other) for one, other in pairwise(literals)]
    conclusion = Statement(universal, literals[0], literals[-1])
    if not universal:
        premises[0] = Statement(False, literals[0], literals[1])
    elif rng.random() < 0.3:
        conclusion = _contrapositive(conclusion)
    return premises, conclusion


def _fallacy(rng: random.Random, premises: list[Statement], conclusion: Statement) -> tuple[list[Statement], Statement]:
    """The argument with one thing changed. Not every change breaks it: ask `follows`."""
    changed = rng.randrange(-3, len(premises))
    if changed == -1:
        return premises, _reversed(conclusion)
    if changed == -2:
        return premises, Statement(conclusion.universal, -conclusion.subject, -conclusion.predicate)
    if changed == -3:
        return premises, Statement(conclusion.universal, conclusion.subject, -conclusion.predicate)
    return [_reversed(one) if i == changed else one for i, one in enumerate(premises)], conclusion


def _reversed(one: Statement) -> Statement:
    return Statement(one.universal, one.predicate, one.subject)


def _contrapositive(one: Statement) -> Statement:
    return Statement(one.universal, -one.predicate, -one.subject)


def _sentence(rng: random.Random, one: Statement, nouns: Sequence[str]) -> str:
    """One of several ways to say it."""
    subject, predicate = _is(one.subject, nouns), _is(one.predicate, nouns)
    if not one.universal:
        forms = [f"Someone who is {subject} is {predicate}.", f"At least one person is {subject} and is {predicate}."]
        return rng.choice(forms)
    forms = [
        f"Everyone who is {subject} is {predicate}.",
        f"Whoever is {subject} is {predicate}.",
        f"Nobody who is {subject} is {_is(-one.predicate, nouns)}.",
        f"Being {subject} is sufficient for being {predicate}.",
        f"Being {predicate} is necessary for being {subject}.",
    ]
    if one.subject.positive and not one.predicate.positive:
        forms.append(f"No {nouns[one.subject.predicate]} is {_is(-one.predicate, nouns)}.")
    return rng.choice(forms)


def _is(literal: Literal, nouns: Sequence[str]) -> str:
    noun = with_article(nouns[literal.predicate])
    return noun if literal.positive else f"not {noun}"


TASK = Task(
    name="formal_fallacies",
    description="Whether a conclusion follows from premises about who is what.",
    metric="multiple_choice",
    instruction="Judge the form of the argument alone. Answer valid or invalid.",
    max_completion_tokens=4,
    draw=draw,
)
