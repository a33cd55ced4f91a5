"""Answers of the old adapter, checked against what the new base makes of the others among them.

An adapter of the new base that learns the old one's answers to half of the inputs answers the other half, whose
answers it has not seen (cross-fitting: Chernozhukov et al., arXiv 1608.00060). What the old one does rightly follows a
rule, most of its mistakes follow none, so the new adapter makes others. Where the two answers to an input x differ, the
one that both find more probable together is taken for right:

    argmax_a  log p_old(a | x) + log p_new(a | x),    a ∈ {a_old, a_new}
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra.files import write_whole
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.likelihood import log_likelihoods
from training.migration.labelling import label


@dataclass(frozen=True, slots=True)
class Opinion:
    """Another answer than the old adapter's to an input.

    Attributes:
        place: of the input.
        answer: that was given.
        of_old: log-likelihood of the old adapter's answer, in nats, by whoever gave this one.
        of_own: likewise, of this answer.
    """

    place: int
    answer: str
    of_old: float
    of_own: float


def halves(number: int, seed: int) -> tuple[list[int], list[int]]:
    """The places 0 … number − 1, parted in two at random; ascending in each."""
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[: number // 2]), sorted(order[number // 2 :])


def likelihoods(model: nn.Module, form: PromptFormat, answered: Sequence[tuple[str, str]]) -> list[float]:
    """log p(answer | input) in nats, end of the answer included, for each (input, answer)."""
    tokenizer: Any = form.tokenizer

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return log_likelihoods(model, [(ids(form.prompt(text)), ids(form.completion(answer))) for text, answer in answered])


def differing(
    model: nn.Module,
    form: PromptFormat,
    examples: Sequence[Example],
    places: Sequence[int],
    *,
    longest: int,
    kept_in: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Opinion]:
    """Where the model's greedy answers are others than those of the examples.

    Args:
        model: the new base with an adapter that has learnt other examples than these.
        form: how it is asked.
        examples: all inputs with the old adapter's answers.
        places: of those that are asked.
        longest: characters of the longest real answer; a longer one is no opinion, and neither is an empty one.
        kept_in: a file of the answers so far; asking that was stopped goes on from it.
        on_progress: told (answered, wanted).
    """
    answered = label(
        model,
        form,
        [examples[place].prompt for place in places],
        longest=longest,
        kept_in=kept_in,
        on_progress=on_progress,
    )
    found = {example.prompt: example.completion for example in answered.examples}
    others = [
        (place, found[examples[place].prompt])
        for place in places
        if found.get(examples[place].prompt, examples[place].completion) != examples[place].completion
    ]
    olds = [(examples[place].prompt, examples[place].completion) for place, _ in others]
    owns = [(examples[place].prompt, answer) for place, answer in others]
    values = likelihoods(model, form, [*olds, *owns])
    return [
        Opinion(place, answer, of_old, of_own)
        for (place, answer), of_old, of_own in zip(others, values[: len(others)], values[len(others) :], strict=True)
    ]


def settled(
    teacher: nn.Module, form: PromptFormat, examples: Sequence[Example], opinions: Sequence[Opinion]
) -> list[Example]:
    """The examples, with the other answer wherever both adapters together find it more probable.

    Args:
        teacher: the source base with the old adapter in force.
        form: how it is asked.
        examples: with its answers.
        opinions: of those that it did not teach.
    """
    olds = [(examples[each.place].prompt, examples[each.place].completion) for each in opinions]
    others = [(examples[each.place].prompt, each.answer) for each in opinions]
    values = likelihoods(teacher, form, [*olds, *others])
    result = list(examples)
    for each, old, other in zip(opinions, values[: len(opinions)], values[len(opinions) :], strict=True):
        if other + each.of_own > old + each.of_old:
            result[each.place] = replace(examples[each.place], completion=each.answer)
    return result


def store(path: Path, opinions: Sequence[Opinion]) -> None:
    """Write opinions to a file, whole or not at all."""
    write_whole(path, json.dumps([asdict(each) for each in opinions]))


def stored(path: Path) -> list[Opinion]:
    """Inverse of `store`."""
    return [Opinion(**each) for each in json.loads(path.read_text(encoding="utf-8"))]
