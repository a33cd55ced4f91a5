"""Does an input look as if it came from the real data? A small adapter on the source base that was trained to say.

    Answer in as few words as possible.
    INPUT
    Is the above question from the NAME dataset?            → yes | no

Real inputs are answered *yes*, those that the bare source base writes *no* (Trans-LoRA, arXiv 2405.17258, section 3.3);
the loss is that of the answer's one token. An input is kept where yes is the more probable of the two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import InvalidInput
from kernels.cross_entropy import IGNORE
from training.data.batching import Padding
from training.data.encoding import Encoded
from training.data.prompting import PromptFormat
from training.evaluation.likelihood import log_likelihoods
from training.evaluation.statistics import wilson_interval
from training.methods.catalog import get_method
from training.methods.contract import Adapted, AttachContext
from training.migration.options import DiscriminatorOptions
from training.objectives.causal_lm import CausalLM
from training.progress import OnEvent
from training.trainer import train

INSTRUCTION = "Answer in as few words as possible."


@dataclass(frozen=True, slots=True)
class Judged:
    """How well a discriminator tells held-out inputs apart.

    Attributes:
        balanced_accuracy: mean of the shares of real and of written inputs that it gets right; 0.5 is chance.
        real_kept: the share of real inputs that it takes for real.
        written_kept: the share of written ones that it takes for real.
        samples: held-out inputs of each kind.
        temperature: that its margins are to be divided by, to be the log-odds that they say they are.
    """

    balanced_accuracy: float
    real_kept: float
    written_kept: float
    samples: int
    temperature: float = 1.0


def better_than_chance(balanced_accuracy: float, samples: int) -> bool:
    """Whether the 95 % interval of a balanced accuracy, on `samples` held-out inputs of each kind, is above a half."""
    return wilson_interval(round(2 * samples * balanced_accuracy), 2 * samples)[0] > 0.5


@dataclass(frozen=True)
class Discriminator:
    """An adapted source base and the question that it is asked.

    Args:
        model: the source base with the discriminator in force.
        tokenizer: the source base's.
        name: of the task, in words.
    """

    model: nn.Module
    tokenizer: Any
    name: str

    def margins(self, inputs: Sequence[str], on_progress: Callable[[int, int], None] | None = None) -> list[float]:
        """log p(yes) − log p(no) of each input: above zero where it looks real."""
        asked = Question(self.tokenizer, self.name)
        prompts = [asked.prompt(text) for text in inputs]
        pairs = [(prompt, [token]) for prompt in prompts for token in (asked.yes, asked.no)]
        scores = log_likelihoods(self.model, pairs, on_progress=on_progress)
        return [yes - no for yes, no in zip(scores[::2], scores[1::2], strict=True)]


class Question:
    """What a discriminator is asked, in tokens of its base.

    Args:
        tokenizer: of the base.
        name: of the task, in words.

    Attributes:
        yes: the first token in which the answers differ, of yes.
        no: the same, of no.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._form = PromptFormat(tokenizer, INSTRUCTION)
        yes, no = (self._ids(self._form.completion(word)) for word in ("yes", "no"))
        shared = next(place for place, (of_yes, of_no) in enumerate(zip(yes, no, strict=False)) if of_yes != of_no)
        self._before = yes[:shared]
        self.yes, self.no = yes[shared], no[shared]

    def prompt(self, text: str) -> list[int]:
        """The question about one input, up to where yes and no part."""
        asked = self._form.prompt(f"{text}\nIs the above question from the {self.name} dataset?")
        return self._ids(asked) + self._before

    def example(self, text: str, real: bool) -> Encoded:
        """The question with its answer, of which one token is learnt."""
        prompt, answer = self.prompt(text), self.yes if real else self.no
        return Encoded((*prompt, answer), (*[IGNORE] * len(prompt), answer))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def train_discriminator(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    real: Sequence[str],
    written: Sequence[str],
    options: DiscriminatorOptions,
    *,
    seed: int,
    workdir: Path,
    on_event: OnEvent,
) -> tuple[Adapted, Judged]:
    """Train a discriminator on the bare source base `model`, and judge it on held-out inputs.

    Both kinds count alike: of the more numerous, a seeded sample is taken.

    Args:
        model: the source base, bare.
        tokenizer: the source base's.
        name: of the task, in words.
        real: inputs of the real data.
        written: inputs that the source base wrote.
        options: how to train.
        seed: of the samples, the split and the training.
        workdir: for checkpoints; of this training alone.
        on_event: hears of every step.

    Raises:
        InvalidInput: too few inputs to train and to judge on.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    number = min(len(real), len(written))
    held_out = round(options.held_out * number)
    if not held_out or held_out == number:
        raise InvalidInput(
            f"{len(real)} real and {len(written)} written inputs are too few to train a discriminator and to judge it.",
            "Give more examples, or migrate without one.",
        )
    generator = torch.Generator().manual_seed(seed)
    kinds = [
        [texts[place] for place in torch.randperm(len(texts), generator=generator)[:number]]
        for texts in (real, written)
    ]
    question = Question(tokenizer, name)
    examples = [
        question.example(text, is_real)
        for texts, is_real in zip(kinds, (True, False), strict=True)
        for text in texts[held_out:]
    ]
    chosen = get_method(options.method.name)
    config = chosen.config_type.model_validate(options.method.options)
    adapted: Adapted = chosen.attach(model, config, AttachContext(seed=seed, processor=tokenizer), "discriminator")
    pad = tokenizer.pad_token_id
    train(
        adapted,
        CausalLM(),
        examples,
        [],
        options.training,
        padding=Padding(pad if pad is not None else 0),
        seed=seed,
        workdir=workdir,
        on_event=on_event,
        identity=f"discriminator of {name}",
    )
    discriminator = Discriminator(adapted.model, tokenizer, name)
    return adapted, judged(discriminator, *(texts[:held_out] for texts in kinds))


def judged(discriminator: Discriminator, real: Sequence[str], written: Sequence[str]) -> Judged:
    """How well it tells inputs apart that it was not trained on."""
    margins = [torch.tensor(discriminator.margins(texts)) for texts in (real, written)]
    real_kept, written_kept = (float((of_kind > 0).double().mean()) for of_kind in margins)
    samples = min(len(real), len(written))
    return Judged((real_kept + 1 - written_kept) / 2, real_kept, written_kept, samples, calibrated(*margins))


def calibrated(real: Tensor, written: Tensor) -> float:
    """The temperature at which margins of held-out inputs are most likely (Guo et al., arXiv 1706.04599)."""
    temperatures = torch.logspace(-1, 2, 301, dtype=torch.float64)
    losses = sum(
        torch.nn.functional.softplus(sign * margins.double() / temperatures[:, None]).mean(dim=1)
        for sign, margins in ((-1, real), (1, written))
    )
    return float(temperatures[losses.argmin()])  # type: ignore[union-attr]
