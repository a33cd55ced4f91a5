"""A blinded reader study: people rate answers of several arms without knowing whose they are.

After the study of the BHC benchmark (Aali et al., JAMIA 2024, arXiv 2403.05720): every reader sees every item with one
answer of each arm, side by side in random order, rates each answer by each criterion, and marks the one preferred.

A study has two halves. The blind one (`Study`) is all that packets are made of and that returned ratings are read by;
the other (`Key`) says which answer is which arm's, and nobody opens it before the analysis. All is drawn by the key's
secret: whoever has this program, the data and the answers, but not the key, can tell nothing from a packet.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, model_validator

from infra.documents import Section
from infra.errors import CorruptArtifact, InvalidInput

LETTERS = "ABCDEFGHIJ"  # what a packet calls the answers to an item; and so the most arms
ID_DIGITS = 16  # hexadecimal
RESERVED = frozenset({"id", "item", "answer", "prompt", "text", "preferred", "comment"})  # columns of a packet


class Criterion(Section):
    """What answers are rated by, on an ordinal scale of whole numbers."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]
    question: str = Field("", description="What the reader is asked.")
    low: int = 1
    high: int = 10

    @model_validator(mode="after")
    def _usable(self) -> "Criterion":
        if self.low >= self.high:
            raise ValueError(f"the scale of {self.name} goes from {self.low} to {self.high}")
        if self.name in RESERVED:
            raise ValueError(f"'{self.name}' is a column of its own; call the criterion something else")
        return self


CRITERIA = (
    Criterion(name="comprehensiveness", question="Does it hold all that matters?"),
    Criterion(name="conciseness", question="Does it hold nothing else?"),
    Criterion(name="correctness", question="Is everything that it says right?"),
    Criterion(name="fluency", question="Does it read well?"),
)


class Design(Section):
    """What is decided before anybody reads: the study is pre-registered by it."""

    title: str = "Reader study"
    instructions: str = "Rate every answer by every criterion, and mark the answer that you prefer."
    criteria: tuple[Criterion, ...] = CRITERIA
    readers: Annotated[int, Field(ge=1, le=99)] = 3

    @model_validator(mode="after")
    def _distinct(self) -> "Design":
        names = [criterion.name for criterion in self.criteria]
        if not names or len(set(names)) < len(names):
            raise ValueError("give at least one criterion, and each only once")
        return self


class Shown(Section):
    """One answer as one reader sees it.

    Attributes:
        id: names it in what is returned; says nothing else.
        item: its item's place in this reader's packet, from 1.
        answer: its letter among the answers to the item.
    """

    id: str
    item: int
    answer: str
    prompt: str
    text: str


class Study(Section):
    """The blind half: the packet of each reader, in order.

    Attributes:
        design: what was decided.
        asked: names what the study was made from; another one does not go on in its folder.
        key_sha256: of the key's file.
        packets: of each reader, all that is shown.
    """

    design: Design
    asked: str
    key_sha256: str
    packets: tuple[tuple[Shown, ...], ...]


class Answered(Section):
    """What an id stands for."""

    reader: int
    item: int
    arm: int


class Key(Section):
    """The other half: whose answer each id is. It stays with whoever runs the study.

    Attributes:
        secret: what ids and orders were drawn by. As it is in the file, the file's sha256 gives nothing away either.
        arms: their names.
        items: how many there are.
        packets_sha256: of what the packets show.
        answers: of each id: the reader (from 0), the item's place in the data and the arm's in `arms`.
    """

    secret: str
    arms: tuple[str, ...]
    items: int
    packets_sha256: str
    answers: dict[str, Answered]

    def as_file(self) -> str:
        """Its file's text, always the same."""
        return self.model_dump_json(indent=1) + "\n"

    @property
    def sha256(self) -> str:
        """Of its file."""
        return hashlib.sha256(self.as_file().encode()).hexdigest()


def blind(
    design: Design, prompts: Sequence[str], answers: Mapping[str, Sequence[str]], secret: str, asked: str = ""
) -> tuple[Study, Key]:
    """Draw the packets of a study: the same ones for the same arguments.

    Each reader has the items in an order of their own. Over every block of as many items as there are arms, each arm
    stands once in each position (the rows of a randomly permuted cyclic Latin square, in random order), so positions
    are balanced and every order of arms is equally likely. Ids and orders are keyed hashes (HMAC-SHA256), which nobody
    can compute without the secret, nor learn anything of it from.

    Args:
        design: what was decided.
        prompts: of the items.
        answers: of each arm, one for each item.
        secret: to draw by; new for each study, from the system's own randomness.
        asked: names what the study is made from.

    Raises:
        InvalidInput: no items, less than two arms, too many, or an arm that has not answered each item, or any.
    """
    _check(prompts, answers)
    arms = tuple(answers)
    ids: dict[str, Answered] = {}
    packets = []
    for reader in range(design.readers):
        packet = []
        places = _shuffled(len(prompts), secret, "items", reader)
        orders = _orders(secret, reader, len(prompts), len(arms))
        for number, (place, order) in enumerate(zip(places, orders, strict=True), start=1):
            for letter, arm in zip(LETTERS, order, strict=False):
                name = f"r{_drawn(secret, 'id', reader, place, arm)[:ID_DIGITS]}"  # no spreadsheet reads a number
                ids[name] = Answered(reader=reader, item=place, arm=arm)
                text = answers[arms[arm]][place].strip()
                packet.append(Shown(id=name, item=number, answer=letter, prompt=prompts[place], text=text))
        packets.append(tuple(packet))
    shown = tuple(packets)
    key = Key(secret=secret, arms=arms, items=len(prompts), packets_sha256=packets_sha256(shown), answers=ids)
    return Study(design=design, asked=asked, key_sha256=key.sha256, packets=shown), key


def packets_sha256(packets: Sequence[Sequence[Shown]]) -> str:
    """Names what packets show, word by word."""
    return named(packets=[[shown.model_dump() for shown in packet] for packet in packets])


def require_intact(study: Study, key: Key) -> None:
    """Raise `CorruptArtifact` unless both halves are as they were made."""
    if key.sha256 != study.key_sha256:
        raise CorruptArtifact("The key is not the one that the packets were made with.", "Bring the study's own back.")
    if packets_sha256(study.packets) != key.packets_sha256:
        raise CorruptArtifact(
            "The study's packets are not what was made for it: study.json was changed.", "Bring it back from a copy."
        )


def _check(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> None:
    if not prompts:
        raise InvalidInput("There are no items to read.", "Give a data set with at least one example.")
    if not 2 <= len(answers) <= len(LETTERS):
        raise InvalidInput(
            f"A study compares 2 to {len(LETTERS)} arms; there are {len(answers)} ({', '.join(answers) or 'none'}).",
            "Name two or more versions or answer files.",
        )
    for arm, own in answers.items():
        if len(own) != len(prompts):
            raise InvalidInput(f"{arm} has {len(own)} answers to {len(prompts)} items.", "Give one for each item.")
        if not any(text.strip() for text in own):
            raise InvalidInput(f"All {len(own)} answers of {arm} are empty.", "Mend its answers, or leave it out.")


def _orders(secret: str, reader: int, items: int, arms: int) -> list[list[int]]:
    """An order of the arms for each item."""
    orders: list[list[int]] = []
    while len(orders) < items:
        base = _shuffled(arms, secret, "arms", reader, len(orders))
        turns = _shuffled(arms, secret, "turns", reader, len(orders))
        orders += [base[turn:] + base[:turn] for turn in turns]
    return orders[:items]


def _shuffled(number: int, secret: str, *what: str | int) -> list[int]:
    return sorted(range(number), key=lambda each: _drawn(secret, *what, each))


def _drawn(secret: str, *what: str | int) -> str:
    return hmac.new(secret.encode(), json.dumps(what).encode(), "sha256").hexdigest()


def named(**what: object) -> str:
    """A name for what a study is made from: sha256 of it as JSON."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
