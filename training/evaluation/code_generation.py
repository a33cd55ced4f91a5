"""Judging a model that writes programs: several samples a task, each run by the task's tests; pass@k and nearness."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import PreTrainedTokenizerBase

from infra.errors import InvalidInput
from training.data.example import Example, fingerprint
from training.data.prompting import PromptFormat
from training.evaluation.code_metrics import (
    abstracted_match,
    edit_similarity,
    exact_match,
    extracted_code,
    mean_pass_at_k,
    parses,
    pass_at_k,
)
from training.evaluation.evaluate import end_tokens
from training.evaluation.result import EvaluationResult
from training.evaluation.sampling import sampled
from training.evaluation.sandbox import Limits, judge_programs, strongest_isolation
from training.evaluation.statistics import bootstrap_mean


class CodeItem(BaseModel):
    """What became of one task's samples.

    Attributes:
        programs: the code of each sample.
        statuses: of each, as `training.evaluation.sandbox.Verdict` names them.
        correct: how many passed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    programs: tuple[str, ...]
    statuses: tuple[str, ...]
    correct: int


class CodeResult(BaseModel):
    """pass@k and nearness of generated programs. Goes through JSON unchanged.

    Attributes:
        items: one for each example, in order.
        pass_at: k → mean over items of the unbiased estimator of pass@k.
        nearness: mean over all samples: `exact_match`, `abstracted_match` and `edit_similarity` to the reference
            program, and `parses`, each in [0, 1].
        isolation: what held the programs.
        seconds: how long it took.
        dataset_fingerprint: of the examples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    items: tuple[CodeItem, ...]
    pass_at: dict[int, float]
    nearness: dict[str, float]
    isolation: str
    seconds: float
    dataset_fingerprint: str

    @property
    def statuses(self) -> dict[str, int]:
        """How many samples came to which end."""
        return dict(Counter(status for item in self.items for status in item.statuses).most_common())

    def as_evaluation(self, k: int) -> EvaluationResult:
        """pass@k with its 95 % bootstrap interval over items; of one sample each, also right and wrong item by item."""
        values = [pass_at_k(len(item.statuses), item.correct, k) for item in self.items]
        interval = bootstrap_mean(values, seed=0)
        single = all(len(item.statuses) == 1 for item in self.items)
        return EvaluationResult(
            metric=f"pass@{k}",
            value=self.pass_at[k],
            low=interval.low,
            high=interval.high,
            stderr=interval.stderr,
            samples=len(values),
            outcomes=tuple(item.correct for item in self.items) if single else None,
            answers=tuple(item.programs[0] for item in self.items),
            seconds=self.seconds,
            dataset_fingerprint=self.dataset_fingerprint,
        )


def evaluate_code(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    prompt_format: PromptFormat,
    shots: Sequence[Example] = (),
    samples: int = 10,
    at: Sequence[int] = (1,),
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_new_tokens: int,
    seed: int = 0,
    limits: Limits | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CodeResult:
    """Sample programs for each example, run them by its tests in the sandbox, and count.

    Args:
        model: a causal language model, bare or adapted.
        tokenizer: of the base model.
        examples: with `tests`; the completion is the reference program.
        prompt_format: how the model is asked; as it was in training.
        shots: solved examples in front of every question.
        samples: n of an example.
        at: the k of pass@k, none above n.
        temperature: of the sampling. Chen et al. (arXiv 2107.03374, section 3.3): 0.2 for pass@1, 0.8 for pass@100.
        top_p: of the sampling.
        max_new_tokens: longest answer.
        seed: of the sampling. An example's samples do not hang on the other examples.
        limits: of each program.
        on_progress: told (done, wanted): samples drawn, then programs judged.

    Raises:
        InvalidInput: no examples, one without tests, k above n, or no sandbox on this machine.
    """
    _check(examples, samples, at)
    isolation = strongest_isolation()
    started = time.monotonic()
    wanted = 2 * samples * len(examples)
    ends = end_tokens(model, tokenizer, prompt_format)
    programs: list[list[str]] = []
    for number, example in enumerate(examples):
        ids = tokenizer(prompt_format.prompt(example.prompt, shots), add_special_tokens=False)["input_ids"]
        drawn = sampled(
            model,
            ids,
            samples,
            max_new_tokens=max_new_tokens,
            ends=ends,
            temperature=temperature,
            top_p=top_p,
            generator=torch.Generator().manual_seed(seed + number),
        )
        programs.append([_program(tokenizer.decode(each.tokens), prompt_format.stop_strings) for each in drawn])
        if on_progress:
            on_progress(samples * (number + 1), wanted)
    jobs = [
        (program, example.tests) for example, several in zip(examples, programs, strict=True) for program in several
    ]
    told = (lambda done, of: on_progress(of + done, wanted)) if on_progress else None
    statuses = [verdict.status for verdict in judge_programs(jobs, limits, isolation, on_progress=told)]
    items = tuple(
        CodeItem(programs=tuple(several), statuses=tuple(own), correct=own.count("passed"))
        for several, own in zip(programs, _in_groups(statuses, samples), strict=True)
    )
    counts = [(samples, item.correct) for item in items]
    return CodeResult(
        items=items,
        pass_at={k: mean_pass_at_k(counts, k) for k in at},
        nearness=_nearness(examples, programs),
        isolation=isolation,
        seconds=time.monotonic() - started,
        dataset_fingerprint=fingerprint(examples),
    )


def _check(examples: Sequence[Example], samples: int, at: Sequence[int]) -> None:
    if not examples:
        raise InvalidInput("There are no examples to evaluate on.", "Give a data set with at least one example.")
    for number, example in enumerate(examples, start=1):
        if not example.tests.strip():
            raise InvalidInput(
                f"{example.place or f'Example {number}'} has no tests, so its programs cannot be judged.",
                "Name the column that holds them with data.columns.tests, or measure another metric.",
            )
    if not at or not all(1 <= k <= samples for k in at):
        raise InvalidInput(
            f"pass@{max(at, default=0)} cannot be told from {samples} samples.",
            "Draw at least as many as the largest k.",
        )


def _program(answer: str, stop_strings: Sequence[str]) -> str:
    for stop in stop_strings:
        answer = answer.partition(stop)[0]
    return extracted_code(answer.strip())


def _in_groups(items: Sequence[str], size: int) -> list[list[str]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _nearness(examples: Sequence[Example], programs: Sequence[Sequence[str]]) -> dict[str, float]:
    pairs = [(program, example.completion) for example, own in zip(examples, programs, strict=True) for program in own]
    measures: dict[str, Callable[[str, str], float]] = {
        "exact_match": exact_match,
        "abstracted_match": abstracted_match,
        "edit_similarity": edit_similarity,
        "parses": lambda program, _: parses(program),
    }
    return {name: math.fsum(measure(*pair) for pair in pairs) / len(pairs) for name, measure in measures.items()}
