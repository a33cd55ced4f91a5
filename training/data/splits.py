"""Three splits that share no prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from infra.errors import InvalidInput
from training.data.content_hash import HASH_RANGE, content_hash, folded
from training.data.example import Example, fingerprint

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """What to train on, to watch while training, and to judge by. No prompt is in two of them."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def fingerprints(self) -> dict[Split, str]:
        """The content of each split by name."""
        return {split: fingerprint(getattr(self, split)) for split in SPLITS}

    def __repr__(self) -> str:
        return f"Splits({len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test)"


def hold_out(examples: Sequence[Example], shares: Mapping[Split, float]) -> dict[Split, list[Example]]:
    """Divide examples: about `shares` of the prompts to the named splits, the rest to train; order is kept.

    The prompt decides, nothing else: copies of a prompt (in any letter case and spacing) stay together, no prompt
    moves when rows are added, and an adapter that was trained with one seed has never seen the test of another. Test
    takes the lowest hashes, so that its prompts do not depend on the share of validation.
    """
    parts: dict[Split, list[Example]] = {split: [] for split in ("train", *shares)}
    for example in examples:
        place = content_hash(folded(example.prompt)) / HASH_RANGE
        for split in sorted(shares):  # test, then validation
            if place < shares[split]:
                parts[split].append(example)
                break
            place -= shares[split]
        else:
            parts["train"].append(example)
    return parts


def without_overlap(
    parts: Mapping[Split, Sequence[Example]], on_overlap: Literal["error", "drop"]
) -> dict[Split, list[Example]]:
    """The parts with no prompt (in any letter case and spacing) in two of them.

    Raises:
        InvalidInput: a prompt in two parts, under `error`. Under `drop` it stays where it is held out most: in test
            before validation before train.
    """
    taken: dict[str, Split] = {}
    disjoint: dict[Split, list[Example]] = {}
    for split in reversed(SPLITS):
        prompts = [folded(example.prompt) for example in parts[split]]
        for example, prompt in zip(parts[split], prompts, strict=True):
            if prompt in taken and on_overlap == "error":
                raise InvalidInput(
                    f"A prompt is in both {split} and {taken[prompt]}: {_shortened(example.prompt)}",
                    f"Remove it from one of them, or set data.on_overlap to drop: it is then left out of {split}.",
                )
        disjoint[split] = [example for example, p in zip(parts[split], prompts, strict=True) if p not in taken]
        taken.update(dict.fromkeys(prompts, split))
    return disjoint


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
