"""Synthetic inputs get their answers from the teacher: the source base with its adapter, asked as in its training."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from infra.errors import InvalidInput
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.evaluate import SPARE_TOKENS
from training.evaluation.generation import end_tokens, greedy_answers

CHUNK = 64  # inputs whose answers are stored together


@dataclass(frozen=True, slots=True)
class Labelled:
    """Inputs with their answers, and how many were left out because the teacher's answer was none.

    Attributes:
        examples: in the order of the inputs.
        empty: answered with nothing.
        run_on: answered with more than any real answer had.
        changed: answers that a second opinion has changed since.
    """

    examples: tuple[Example, ...]
    empty: int
    run_on: int
    changed: int = 0


def label(
    teacher: nn.Module,
    form: PromptFormat,
    inputs: Sequence[str],
    *,
    longest: int,
    kept_in: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Labelled:
    """The teacher's greedy answer to every input.

    Args:
        teacher: the source base with its adapter in force.
        form: how the adapter was asked in training, with the source base's tokenizer.
        inputs: what to answer.
        longest: characters of the longest real answer.
        kept_in: a file, one input with its answer a line; labelling that was stopped goes on from it.
        on_progress: told (answered, wanted).

    Raises:
        InvalidInput: an input too long for the teacher, or a file of other inputs.
    """
    tokenizer: Any = form.tokenizer
    answers = _stored(kept_in, inputs)
    if on_progress:
        on_progress(len(answers), len(inputs))
    while len(answers) < len(inputs):
        chunk = inputs[len(answers) : len(answers) + CHUNK]
        asked = [tokenizer(form.prompt(text), add_special_tokens=False)["input_ids"] for text in chunk]
        found = greedy_answers(
            teacher,
            tokenizer,
            asked,
            max_new_tokens=longest + SPARE_TOKENS,  # a token has a character at least
            ends=end_tokens(teacher, tokenizer, form),
            stop_strings=form.stop_strings,
        )
        if kept_in is not None:
            _store(kept_in, zip(chunk, found, strict=True))
        answers += found
        if on_progress:
            on_progress(len(answers), len(inputs))
    pairs = list(zip(inputs, answers, strict=True))
    return Labelled(
        tuple(Example(prompt=text, completion=answer) for text, answer in pairs if 0 < len(answer) <= longest),
        sum(not answer for answer in answers),
        sum(len(answer) > longest for answer in answers),
    )


def _stored(path: Path | None, inputs: Sequence[str]) -> list[str]:
    """The answers of a labelling that was stopped; the last line, where a process was killed in it, does not count."""
    if path is None or not path.is_file():
        return []
    answers = []
    content = path.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]
    if whole != content:
        path.write_text(whole, encoding="utf-8")
    for line, expected in zip(whole.splitlines(), inputs, strict=False):
        text, answer = json.loads(line)
        if text != expected:
            raise InvalidInput(f"{path} holds answers to other inputs.", f"rm {path}")
        answers.append(answer)
    return answers


def _store(path: Path, pairs: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{json.dumps([text, answer])}\n" for text, answer in pairs))
