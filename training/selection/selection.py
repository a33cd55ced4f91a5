"""Choosing training examples: a length filter, then duplicates, then a seeded sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.documents import Section
from infra.errors import InvalidInput
from training.data.content_hash import normalised
from training.data.example import Example, fingerprint
from training.data.sampling import sample

Length = Annotated[int, Field(ge=1)]


class Selection(Section):
    """Which of the training examples to train on."""

    min_length: Length | None = Field(None, description="Drop shorter examples. Prompt and completion together.")
    max_length: Length | None = Field(None, description="Longest example. Prompt and completion together.")
    unit: Literal["tokens", "characters"] = Field("tokens", description="What lengths are counted in.")
    too_long: Literal["error", "drop"] = Field(
        "error", description="What to do with an example above max_length. A cut one would teach a wrong answer."
    )
    deduplicate: Literal["none", "exact", "normalised"] = Field(
        "exact",
        description="Keep the first of examples with the same prompt and completion; `normalised` overlooks letter "
        "case, white space, quotation marks and punctuation at the end of words.",
    )
    sample: Annotated[int, Field(ge=1)] | None = Field(None, description="Keep at most this many, chosen at random.")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "Selection":
        if self.min_length and self.max_length and self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} is above max_length {self.max_length}")
        return self


@dataclass(frozen=True)
class SelectionReport:
    """What was chosen and what was not.

    Args:
        examples: the chosen ones, in their original order.
        dropped: how many each reason took: `too_short`, `too_long`, `duplicate`, `not_sampled`.
        fingerprint_before: names the content that was offered.
        fingerprint_after: names the content that was chosen.
    """

    examples: tuple[Example, ...]
    dropped: dict[str, int]
    fingerprint_before: str
    fingerprint_after: str


def select(
    examples: Sequence[Example],
    config: Selection,
    seed: int,
    count_tokens: Callable[[Example], int] | None = None,
) -> SelectionReport:
    """Apply the selection; deterministic under the seed.

    Args:
        examples: the whole training split.
        config: what to keep.
        seed: of the sample.
        count_tokens: the length of an example as the model will see it, chat template included; needed where lengths
            are counted in tokens.

    Raises:
        InvalidInput: an example above `max_length` under `too_long: error`, token lengths without `count_tokens`, or
            nothing left.
    """
    fitting, too_short, too_long = _fitting(examples, config, count_tokens)
    distinct = _distinct(fitting, config.deduplicate)
    chosen = distinct if config.sample is None else sample(distinct, config.sample, seed)
    dropped = {
        "too_short": too_short,
        "too_long": too_long,
        "duplicate": len(fitting) - len(distinct),
        "not_sampled": len(distinct) - len(chosen),
    }
    if not chosen:
        reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count)
        raise InvalidInput(
            f"Selection leaves none of the {len(examples):,} examples ({reasons or 'there were none'}).",
            "Loosen selection.min_length or selection.max_length.",
        )
    return SelectionReport(tuple(chosen), dropped, fingerprint(examples), fingerprint(chosen))


def _fitting(
    examples: Sequence[Example], config: Selection, count_tokens: Callable[[Example], int] | None
) -> tuple[list[Example], int, int]:
    """The examples within the bounds, and how many were too short and too long."""
    if config.min_length is None and config.max_length is None:
        return list(examples), 0, 0
    measure = _characters if config.unit == "characters" else count_tokens
    if measure is None:
        raise InvalidInput("Lengths in tokens need a tokenizer.", "Set selection.unit to characters.")
    shortest, longest = config.min_length or 0, config.max_length or float("inf")
    fitting: list[Example] = []
    too_short = too_long = 0
    for number, example in enumerate(examples, start=1):
        length = measure(example)
        if length < shortest:
            too_short += 1
        elif length <= longest:
            fitting.append(example)
        elif config.too_long == "drop":
            too_long += 1
        else:
            which = example.place or f"Training example {number:,}"
            raise InvalidInput(
                f"{which} has {length:,} {config.unit}, above selection.max_length {config.max_length:,}: "
                f"{_shortened(example.prompt)}",
                "Raise selection.max_length, or set selection.too_long to drop.",
            )
    return fitting, too_short, too_long


def _characters(example: Example) -> int:
    return len(example.prompt) + len(example.completion)


def _distinct(examples: Sequence[Example], level: Literal["none", "exact", "normalised"]) -> list[Example]:
    """The first of each group of duplicates. Equal prompts with different completions are not duplicates."""
    if level == "none":
        return list(examples)
    seen: dict[tuple[str, str], Example] = {}
    for example in examples:
        texts = (example.prompt, example.completion)
        seen.setdefault(texts if level == "exact" else (normalised(texts[0]), normalised(texts[1])), example)
    return list(seen.values())


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
