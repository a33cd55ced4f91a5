"""The unit of data everywhere: a prompt and the completion that is wanted."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised example.

    Args:
        prompt: what the model is given; the whole of a plain text.
        completion: what it should answer, without leading space or end-of-text mark; nothing of a plain text.
        choices: for multiple choice, the candidate completions, `completion` among them.
        tests: where the completion is a Python program, asserts that a right one passes; no model is shown them.
        place: where it was read (`data.jsonl line 17`), for messages; no part of what the example is.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    tests: str = ""
    place: str = field(default="", compare=False, repr=False)

    @property
    def text(self) -> str:
        """Prompt and completion as one text."""
        return f"{self.prompt} {self.completion}".strip()

    @classmethod
    def stored(cls, content: Mapping[str, Any]) -> "Example":
        """Inverse of `asdict`, by way of JSON."""
        return cls(**{**content, "choices": tuple(content["choices"])})


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 over the examples' content in order, so that two runs can be shown to have seen the same data."""
    digest = hashlib.sha256()
    for example in examples:
        content = [example.prompt, example.completion, example.choices, *filter(None, [example.tests])]
        digest.update(json.dumps(content).encode())
        digest.update(b"\n")
    return digest.hexdigest()
