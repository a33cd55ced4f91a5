"""Text to numbers: prompt and completion become input ids and labels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from infra.errors import InvalidInput
from kernels.cross_entropy import IGNORE


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as a model reads it.

    Args:
        input_ids: what the model reads.
        labels: what it is judged on, `IGNORE` (−100) where it is not. One per input id for language models; the
            decoder's tokens for encoder-decoders; a single class for classification.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def encode(
    texts: Iterable[tuple[str, str]],
    tokenizer: Any,
    *,
    max_length: int,
    loss_on: Literal["completion", "everything"] = "completion",
    named: Callable[[int], str] = "Example {}".format,
) -> list[Encoded]:
    """Encode (prompt, completion) texts for a causal language model.

    The two are tokenised apart and then joined, so that the boundary between them is the one that generation meets: the
    prompt's last token never depends on the completion. Special tokens are those that the texts spell out. The first
    token of an example has no label, since nothing comes before it; so a row of packed examples and a padded row are
    judged on the same positions.

    Args:
        texts: prompt and completion, as `PromptFormat` makes them.
        tokenizer: of the base model.
        max_length: tokens of prompt and completion together.
        loss_on: which tokens are labelled.
        named: what to call an example, by its number from 1, in a message.

    Raises:
        InvalidInput: an example is too long, or has no token that could be labelled.
    """
    encoded = []
    for number, (prompt, completion) in enumerate(texts, start=1):
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        after = tokenizer(completion, add_special_tokens=False)["input_ids"] if completion else []
        ids = (*before, *after)
        _check_length(named(number), len(ids), max_length)
        first = max(1, len(before)) if loss_on == "completion" else 1
        if first >= len(ids):
            raise InvalidInput(
                f"{named(number)} has no token to learn: its {loss_on} is empty once tokenised.",
                "Give it a completion, or remove it.",
            )
        encoded.append(Encoded(ids, (*[IGNORE] * first, *ids[first:])))
    return encoded


def encode_sequence_to_sequence(texts: Iterable[tuple[str, str]], tokenizer: Any, *, max_length: int) -> list[Encoded]:
    """Encode (source, target) texts for an encoder-decoder, with the tokenizer's own special tokens.

    Raises:
        InvalidInput: source or target is longer than `max_length`, or the target is empty.
    """
    encoded = []
    for number, (source, target) in enumerate(texts, start=1):
        ids = tokenizer(source)["input_ids"]
        labels = tokenizer(text_target=target)["input_ids"]
        _check_length(f"Example {number}", max(len(ids), len(labels)), max_length)
        if not target:
            raise InvalidInput(f"Example {number} has no target.", "Give it a completion, or remove it.")
        encoded.append(Encoded(tuple(ids), tuple(labels)))
    return encoded


def encode_classification(
    texts: Iterable[tuple[str, str]], tokenizer: Any, *, classes: Sequence[str], max_length: int
) -> list[Encoded]:
    """Encode (text, class name) pairs; the label is the place of the name in `classes`.

    Raises:
        InvalidInput: a text is too long, or its class is not among `classes`.
    """
    encoded = []
    for number, (text, name) in enumerate(texts, start=1):
        ids = tokenizer(text)["input_ids"]
        _check_length(f"Example {number}", len(ids), max_length)
        if name not in classes:
            raise InvalidInput(f"Example {number} is of class '{name}', which is none of {', '.join(classes)}.")
        encoded.append(Encoded(tuple(ids), (list(classes).index(name),)))
    return encoded


def encode_masked(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    max_length: int,
    generator: torch.Generator,
    probability: float = 0.15,
    named: Callable[[int], str] = "Example {}".format,
) -> list[Encoded]:
    """Encode texts for masked-token prediction (BERT, arXiv 1810.04805, section 3.1).

    Of the tokens that are not special, `probability` are drawn (at least one a text); of those 80 % become the mask
    token, 10 % a random token, 10 % stay. The draw is made once, as in the paper; repeat the texts for more masks.

    Raises:
        InvalidInput: a text is too long, or has no token that could be masked, or the tokenizer has no mask.
    """
    if tokenizer.mask_token_id is None:
        raise InvalidInput("The tokenizer has no mask token.", "Set mask_token in the base's tokenizer_config.json.")
    encoded = []
    special = set(tokenizer.all_special_ids)
    for number, text in enumerate(texts, start=1):
        ids = list(tokenizer(text)["input_ids"])
        _check_length(named(number), len(ids), max_length)
        places = [place for place, token in enumerate(ids) if token not in special]
        if not places:
            raise InvalidInput(f"{named(number)} has no token that could be masked.", "Remove it.")
        order = torch.randperm(len(places), generator=generator)[: max(1, round(probability * len(places)))]
        labels = [IGNORE] * len(ids)
        for place in (places[index] for index in order.tolist()):
            labels[place] = ids[place]
            fate = torch.rand((), generator=generator).item()
            if fate < 0.8:
                ids[place] = tokenizer.mask_token_id
            elif fate < 0.9:
                ids[place] = int(torch.randint(len(tokenizer), (), generator=generator))
        encoded.append(Encoded(tuple(ids), tuple(labels)))
    return encoded


def _check_length(name: str, length: int, limit: int) -> None:
    if length > limit:
        raise InvalidInput(
            f"{name} is {length:,} tokens long; training.max_length allows {limit:,}.",
            f"Raise training.max_length to {length} or more, or leave such examples out: "
            f"selection: {{max_length: {limit}, too_long: drop}}",
        )
