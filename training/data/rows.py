"""From a row of a file to an example."""

import json
import logging
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from infra.documents import Section, did_you_mean
from infra.errors import InvalidInput
from training.data.conversations import last_exchange
from training.data.example import Example
from training.data.files import Row

logger = logging.getLogger(__name__)


class Columns(Section):
    """Where a row keeps what: in a prompt and a completion column, as a conversation, or as plain text."""

    prompt: str = "prompt"
    completion: str = "completion"
    choices: str | None = Field(None, description="Candidate completions: a list, or a JSON list in CSV.")
    tests: str | None = Field(None, description="Python asserts that judge a completion which is a program.")
    messages: str | None = Field(
        None, description="Chat turns ({role, content} objects). The last assistant turn is the completion."
    )
    text: str | None = Field(None, description="Plain text, that is learnt whole.")

    @model_validator(mode="after")
    def _one_layout(self) -> "Columns":
        apart = (self.prompt, self.completion, self.choices, self.tests) != ("prompt", "completion", None, None)
        if sum(map(bool, (self.messages, self.text, apart))) > 1:
            raise ValueError("give messages, or text, or prompt, completion, choices and tests")
        return self

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        if single := self.messages or self.text:
            return [single]
        return [self.prompt, self.completion, *filter(None, [self.choices, self.tests])]


class EmptyRow(InvalidInput):
    """A row without prompt, completion or text."""


def to_examples(
    rows: Iterable[Row], columns: Columns, on_empty: Literal["error", "skip"], keys: str = "data."
) -> list[Example]:
    """The rows as examples. Completions lose the white space around them, prompts keep theirs.

    Args:
        rows: of a file or data set.
        columns: where they keep what.
        on_empty: what to do with those without prompt or completion.
        keys: what the options of the source begin with, for messages.

    Raises:
        InvalidInput: as `to_example`.
    """
    examples: list[Example] = []
    skipped: list[str] = []
    for place, row in rows:
        try:
            examples.append(to_example(place, row, columns, keys))
        except EmptyRow as error:
            if on_empty == "error":
                raise InvalidInput(error.what, f"Fill it in, or set {keys}on_empty to skip.") from None
            skipped.append(place)
    if skipped:
        logger.warning("Skipped %d empty rows, the first at %s", len(skipped), skipped[0])
    return examples


def to_example(place: str, row: dict[str, Any], columns: Columns, keys: str) -> Example:
    """A row as an example.

    Raises:
        EmptyRow: an empty prompt or completion.
        InvalidInput: a row without the columns, with something else than text, or whose completion is not among its
            choices. Whole numbers are taken for prompts, completions and choices, but not for plain text.
    """
    if columns.text:
        text = _text(place, columns.text, _value(place, row, "text", columns.text, keys))
        example, empty = Example(text, "", place=place), "" if text.strip() else columns.text
    else:
        example = _from_messages(place, row, columns, keys) if columns.messages else _example(place, row, columns, keys)
        empty = "prompt" if not example.prompt.strip() else "completion" if not example.completion else ""
    if empty:
        raise EmptyRow(f"{place}: {empty} is empty.", "Fill it in.")
    if example.choices and example.completion not in example.choices:
        raise InvalidInput(
            f"{place}: the completion {example.completion!r} is not among the choices {list(example.choices)}.",
            "Write one of the choices, as text, into the completion.",
        )
    return example


def _example(place: str, row: dict[str, Any], columns: Columns, keys: str) -> Example:
    prompt = _written(place, columns.prompt, _value(place, row, "prompt", columns.prompt, keys))
    completion = _written(place, columns.completion, _value(place, row, "completion", columns.completion, keys)).strip()
    tests = _text(place, columns.tests, _value(place, row, "tests", columns.tests, keys)) if columns.tests else ""
    if columns.choices is None:
        return Example(prompt, completion, tests=tests, place=place)
    choices = _value(place, row, "choices", columns.choices, keys)
    if isinstance(choices, str):
        try:
            choices = json.loads(choices)
        except json.JSONDecodeError:
            choices = None
    if not isinstance(choices, list) or not choices:
        raise InvalidInput(f"{place}: {columns.choices} is not a list.", 'Write it as ["Yes", "No"].')
    texts = tuple(_written(place, columns.choices, choice).strip() for choice in choices)
    return Example(prompt, completion, texts, tests, place)


def _from_messages(place: str, row: dict[str, Any], columns: Columns, keys: str) -> Example:
    column = str(columns.messages)
    prompt, completion = last_exchange(place, _value(place, row, "messages", column, keys))
    return Example(_text(place, column, prompt), _text(place, column, completion).strip(), place=place)


def _value(place: str, row: dict[str, Any], key: str, column: str, keys: str) -> Any:
    if column not in row:
        raise InvalidInput(
            f"{place} has no column '{column}'. {did_you_mean(column, list(row))}",
            f"It has: {', '.join(row) or 'nothing'}. Name the column with {keys}columns.{key}.",
        )
    return row[column]


def _written(place: str, column: str, value: Any) -> str:
    """Text, or a whole number as text: answers and labels are often kept so."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(place, column, value)


def _text(place: str, column: str, value: Any) -> str:
    """Text; None is empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidInput(f"{place}: {column} is {type(value).__name__}, not text.", "Write it as a string.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{place}: {column} holds half of a surrogate pair.", "Write the text as UTF-8.") from None
    return value
