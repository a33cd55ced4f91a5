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
from training.evaluation.code_tests import require_sound
from training.evaluation.generation import end_tokens, greedy_answers
from training.evaluation.result import EvaluationResult, accuracy, scored
from training.evaluation.sampling import sampled
from training.evaluation.sandbox import Limits, judge_programs, strongest_isolation

NEARNESS: dict[str, Callable[[str, str], float]] = {
    "exact_program": exact_match,
    "abstracted_match": abstracted_match,
    "edit_similarity": edit_similarity,
    "parses": lambda program, _: parses(program),
}


class CodeItem(BaseModel):
    """What became of one task's samples.

    Attributes:
        programs: the code of each sample.
        statuses: of each, as `training.evaluation.sandbox.Verdict` names them.
        correct: how many passed.
        nearness: mean over the samples: `exact_program`, `abstracted_match` and `edit_similarity` to the reference
            program, and `parses`, each in [0, 1].
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    programs: tuple[str, ...]
    statuses: tuple[str, ...]
    correct: int
    nearness: dict[str, float]


class CodeResult(BaseModel):
    """pass@k and nearness of generated programs. Goes through JSON unchanged.

    Attributes:
        items: one for each example, in order.
        pass_at: k → mean over items of the unbiased estimator of pass@k.
        isolation: what held the programs.
        seconds: how long it took.
        dataset_fingerprint: of the examples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    items: tuple[CodeItem, ...]
    pass_at: dict[int, float]
    isolation: str
    seconds: float
    dataset_fingerprint: str

    @property
    def statuses(self) -> dict[str, int]:
        """How many samples came to which end."""
        return dict(Counter(status for item in self.items for status in item.statuses).most_common())

    @property
    def nearness(self) -> dict[str, float]:
        """Mean over all samples of each measure."""
        return {name: math.fsum(item.nearness[name] for item in self.items) / len(self.items) for name in NEARNESS}

    def as_evaluation(self, k: int, *also: int) -> EvaluationResult:
        """pass@k; `beside` it pass@k of other k, and nearness. Intervals are over items.

        Of one sample each, an item is right or wrong, and near or not; of several it has a share.
        """
        counts = [(len(item.statuses), item.correct) for item in self.items]
        passed = {f"pass@{each}": [pass_at_k(n, c, each) for n, c in counts] for each in (k, *also)}
        near = {name: [item.nearness[name] for item in self.items] for name in NEARNESS}
        whole, *beside = (self._measured(name, values) for name, values in {**passed, **near}.items())
        answers = tuple(item.programs[0] for item in self.items)
        return whole.model_copy(update={"beside": tuple(beside), "answers": answers})

    def _measured(self, name: str, values: Sequence[float]) -> EvaluationResult:
        of, single = self.dataset_fingerprint, all(len(item.statuses) == 1 for item in self.items)
        if single and name != "edit_similarity":
            return accuracy(name, list(map(int, values)), (), seconds=self.seconds, dataset_fingerprint=of)
        return scored(name, values, (), (), seconds=self.seconds, dataset_fingerprint=of)


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
    batch_tokens: int = 4096,
    seed: int = 0,
    limits: Limits | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CodeResult:
    """Have programs written for each example, run them by its tests in the sandbox, and count.

    Args:
        model: a causal language model, bare or adapted.
        tokenizer: of the base model.
        examples: with `tests`; the completion is the reference program.
        prompt_format: how the model is asked; as it was in training.
        shots: solved examples in front of every question.
        samples: n of an example.
        at: the k of pass@k, none above n.
        temperature: of the sampling. Chen et al. (arXiv 2107.03374, section 3.3): 0.2 for pass@1, 0.8 for pass@100.
            0 is greedy, for one sample.
        top_p: of the sampling.
        max_new_tokens: longest answer.
        batch_tokens: rows × slots of a batch of greedy answers; memory grows with it.
        seed: of the sampling. An example's samples do not hang on the other examples.
        limits: of each program.
        on_progress: told (done, wanted): samples drawn, then programs judged.

    Raises:
        InvalidInput: no examples, one without tests or with tests that cannot judge (see `code_tests.require_sound`), k
            above n, several greedy ones, or no sandbox on this machine.
    """
    _check(examples, samples, at, temperature)
    isolation = strongest_isolation()
    require_sound(tuple(examples), limits, isolation)
    started = time.monotonic()
    wanted, tell = 2 * samples * len(examples), on_progress or (lambda done, of: None)
    texts = [prompt_format.prompt(example.prompt, shots) for example in examples]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ends, stops = end_tokens(model, tokenizer, prompt_format), prompt_format.stop_strings
    programs: list[list[str]] = []
    if temperature == 0:
        answers = greedy_answers(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            ends=ends,
            stop_strings=stops,
            batch_tokens=batch_tokens,
            on_progress=lambda done, _: tell(done, wanted),
        )
        programs += [[extracted_code(answer)] for answer in answers]
    else:
        for number, ids in enumerate(prompts):
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
            programs.append([_program(tokenizer.decode(each.tokens), stops) for each in drawn])
            tell(samples * (number + 1), wanted)
    jobs = [
        (program, example.tests) for example, several in zip(examples, programs, strict=True) for program in several
    ]
    verdicts = judge_programs(jobs, limits, isolation, on_progress=lambda done, of: tell(of + done, wanted))
    statuses = [verdict.status for verdict in verdicts]
    items = tuple(
        CodeItem(
            programs=tuple(several),
            statuses=tuple(own),
            correct=own.count("passed"),
            nearness=_nearness(example.completion, several),
        )
        for example, several, own in zip(examples, programs, _in_groups(statuses, samples), strict=True)
    )
    counts = [(samples, item.correct) for item in items]
    return CodeResult(
        items=items,
        pass_at={k: mean_pass_at_k(counts, k) for k in at},
        isolation=isolation,
        seconds=time.monotonic() - started,
        dataset_fingerprint=fingerprint(examples),
    )


def _check(examples: Sequence[Example], samples: int, at: Sequence[int], temperature: float) -> None:
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
    if temperature == 0 and samples > 1:
        raise InvalidInput(f"{samples} greedy programs are one and the same.", "Draw them with a temperature above 0.")


def _program(answer: str, stop_strings: Sequence[str]) -> str:
    for stop in stop_strings:
        answer = answer.partition(stop)[0]
    return extracted_code(answer.strip())


def _in_groups(items: Sequence[str], size: int) -> list[list[str]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _nearness(wanted: str, programs: Sequence[str]) -> dict[str, float]:
    return {
        name: math.fsum(measure(program, wanted) for program in programs) / len(programs)
        for name, measure in NEARNESS.items()
    }
