"""Judging a model on examples: exact match, multiple choice, perplexity, nearness of texts, programs that pass."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from infra.errors import InvalidInput
from training.data.example import Example, fingerprint
from training.data.prompting import PromptFormat
from training.evaluation.calibration import CALIBRATION_ERRORS, brier_score, softmax
from training.evaluation.code_generation import evaluate_code
from training.evaluation.generation import end_tokens, greedy_answers
from training.evaluation.likelihood import log_likelihoods
from training.evaluation.masked import masked_losses
from training.evaluation.result import EvaluationResult, PairedComparison, accuracy, compare, of_losses, scored
from training.evaluation.suite import Generated, Metric, PassAt, Sampling, of_the_same_answers, pass_at
from training.evaluation.text_metrics import text_scores
from training.objectives.of_model import is_masked_lm, objective_of

__all__ = ["EvaluationResult", "PairedComparison", "compare", "evaluate"]

SPARE_TOKENS = 4  # more than the longest wanted answer, so that one which runs on is seen to do so
PROGRAM_LENGTHS = 2  # times the longest reference program: another one that is right may be longer


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    metric: Metric,
    also: Sequence[Generated | PassAt] = (),
    shots: Sequence[Example] = (),
    prompt_format: PromptFormat,
    max_new_tokens: int | None = None,
    sampling: Sampling = Sampling(),
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Measure one metric of a language model, bare or adapted. Of a masked one there is only perplexity.

    - `exact_match`: the greedy answer is the completion, character by character, but for white space around it.
    - `multiple_choice`: the choice with the highest log-likelihood is the completion; summed over its tokens, not
      normalised by length, without an end mark (`acc` of lm-eval). Of equal choices the first one counts. Beside it
      come calibration error and Brier score, with the softmax of the log-likelihoods as probabilities.
    - `perplexity`: exp of the mean negative log-likelihood a token of the completions, end marks included; of plain
      texts, of all tokens but the first; of a masked language model, of those that are hidden, 15 % of each text.
    - `pass@K`: the probability that of K programs at least one passes the example's tests, see
      `code_generation.evaluate_code`. Beside it comes how near the programs are to the reference.
    - others: how near the greedy answer comes to the completion, see `text_metrics.text_scores`. The value of `bleu`
      and `chrf` is that of the corpus, of the others the mean of the items.

    Args:
        model: its mode (training or evaluation) is restored afterwards.
        tokenizer: of the base model.
        examples: at least one.
        metric: one of the above.
        also: further metrics of the same greedy answers, or of the same programs; they come `beside` the result.
        shots: solved examples in front of every question.
        prompt_format: how the model is asked; as it was in training.
        max_new_tokens: longest answer that is generated. Default: the longest completion and `SPARE_TOKENS` more; of
            programs `PROGRAM_LENGTHS` times the longest.
        sampling: of programs.
        batch_tokens: rows × slots of a batch; memory grows with it.
        on_progress: told (done, wanted): examples, or choices for multiple_choice, or steps of programs.

    Raises:
        InvalidInput: no examples, choices that lack the completion, a text without a completion to compare answers
            with, a program without tests, K above the number of programs, prompts too long for the model, or what a
            masked language model cannot be asked.
    """
    if not examples:
        raise InvalidInput("There are no examples to evaluate on.", "Give a data set with at least one example.")
    check_metric(model, metric, len(shots))
    if also and not of_the_same_answers(metric, also):
        raise InvalidInput(
            f"{metric} generates no answers that {', '.join(also)} could be measured on.",
            "Leave out 'also'; metrics of texts go with each other, and pass@K with pass@K.",
        )
    asked = _Asked(tokenizer, prompt_format, tuple(examples), tuple(shots))
    started, items = time.monotonic(), fingerprint(examples)
    if metric == "perplexity":
        if is_masked_lm(model):
            texts = [example.text for example in examples]
            losses, counts = masked_losses(model, tokenizer, texts, batch_tokens=batch_tokens, on_progress=on_progress)
        else:
            pairs = asked.judged_texts()
            found = log_likelihoods(model, pairs, batch_tokens=batch_tokens, on_progress=on_progress)
            losses, counts = [-score for score in found], [len(ids) for _, ids in pairs]
        result = of_losses(losses, counts, seconds=0.0, dataset_fingerprint=items)
    elif metric == "multiple_choice":
        found = log_likelihoods(model, asked.choices(), batch_tokens=batch_tokens, on_progress=on_progress)
        result = _chosen(examples, found, items)
    elif ks := pass_at((metric, *also)):
        programs, temperature = sampling.of(ks)
        result = evaluate_code(
            model,
            tokenizer,
            examples,
            prompt_format=prompt_format,
            shots=shots,
            samples=programs,
            at=ks,
            temperature=temperature,
            max_new_tokens=max_new_tokens or PROGRAM_LENGTHS * asked.longest_answer(),
            batch_tokens=batch_tokens,
            seed=sampling.seed,
            on_progress=on_progress,
        ).as_evaluation(*ks)
    else:
        answers = greedy_answers(
            model,
            tokenizer,
            asked.prompts(),
            max_new_tokens=max_new_tokens or asked.longest_answer() + SPARE_TOKENS,
            ends=end_tokens(model, tokenizer, prompt_format),
            stop_strings=prompt_format.stop_strings,
            batch_tokens=batch_tokens,
            on_progress=on_progress,
        )
        result, *beside = (_judged(each, examples, answers, items) for each in (metric, *also))
        result = result.model_copy(update={"beside": tuple(beside), "answers": tuple(answers)})
    return result.model_copy(update={"seconds": time.monotonic() - started})


def check_metric(model: nn.Module, metric: Metric | None, shots: int) -> None:
    """Raise `InvalidInput` if a model cannot be measured like that, or at all."""
    objective_of(model)
    if is_masked_lm(model) and (metric not in (None, "perplexity") or shots):
        wanted = metric if metric not in (None, "perplexity") else f"{shots} solved examples in front"
        raise InvalidInput(
            f"A masked language model is judged by the perplexity of what is hidden; the suite asks for {wanted}.",
            "Write evaluation: [{metric: perplexity}] into the recipe.",
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """Examples as a model reads them. The texts of a `PromptFormat` spell out their special tokens."""

    tokenizer: PreTrainedTokenizerBase
    form: PromptFormat
    examples: tuple[Example, ...]
    shots: tuple[Example, ...]

    def prompts(self) -> list[list[int]]:
        return [self._ids(self.form.prompt(example.prompt, self.shots)) for example in self.examples]

    def completions(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and completion of each example, end mark included."""
        completions = [self._ids(self.form.completion(example.completion)) for example in self.examples]
        return list(zip(self.prompts(), completions, strict=True))

    def judged_texts(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and completion of each example; of a plain text, as it is learnt, its first token and the rest."""
        pairs = []
        for example, pair in zip(self.examples, self.completions(), strict=True):
            if example.completion:
                pairs.append(pair)
            else:
                ids = self._ids(self.form.plain_text(example.prompt))
                pairs.append((ids[:1], ids[1:]))
        return pairs

    def longest_answer(self) -> int:
        """Tokens of the longest completion, end mark included; no example may be without."""
        for number, example in enumerate(self.examples, start=1):
            if not example.completion:
                raise InvalidInput(
                    f"Example {number} is plain text: it has no completion to compare an answer with.",
                    "Measure perplexity, or give data with prompts and completions.",
                )
        return max(len(completion) for _, completion in self.completions())

    def choices(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and choice, example after example, choice after choice."""
        pairs = []
        for number, (example, prompt) in enumerate(zip(self.examples, self.prompts(), strict=True), start=1):
            if len(example.choices) < 2 or example.completion not in example.choices:
                raise InvalidInput(
                    f"Example {number} is not multiple choice: its choices are {list(example.choices)}, "
                    f"its completion is '{example.completion}'.",
                    "Give at least two choices, the completion among them, or measure exact_match.",
                )
            texts = [self.form.completion(choice).removesuffix(self.form.end_mark) for choice in example.choices]
            pairs += [(prompt, self._ids(text)) for text in texts]
        return pairs

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _chosen(examples: Sequence[Example], scores: Sequence[float], items: str) -> EvaluationResult:
    """Multiple choice from the log-likelihoods of all choices, example after example, and how well it is calibrated."""
    left = iter(scores)
    answers, outcomes, confidences, brier = [], [], [], []
    for example in examples:
        of_choice = [next(left) for _ in example.choices]
        probabilities, preferred = softmax(of_choice), of_choice.index(max(of_choice))
        answers.append(example.choices[preferred])
        outcomes.append(int(example.choices[preferred] == example.completion))
        confidences.append(probabilities[preferred])
        brier.append(brier_score(probabilities, example.choices.index(example.completion)))
    known = list(zip(confidences, outcomes, strict=True))
    beside = (
        *(scored(error, (), known, (), seconds=0.0, dataset_fingerprint=items) for error in CALIBRATION_ERRORS),
        scored("brier", brier, (), (), seconds=0.0, dataset_fingerprint=items),
    )
    result = accuracy("multiple_choice", outcomes, answers, seconds=0.0, dataset_fingerprint=items)
    return result.model_copy(update={"beside": beside})


def _judged(metric: str, examples: Sequence[Example], answers: Sequence[str], items: str) -> EvaluationResult:
    """What one metric says of generated answers."""
    if metric == "exact_match":
        right = [
            answer.strip() == example.completion.strip() for answer, example in zip(answers, examples, strict=True)
        ]
        return accuracy(metric, right, (), seconds=0.0, dataset_fingerprint=items)
    found = text_scores(metric, answers, [[example.completion] for example in examples])
    return scored(metric, found.of_items, found.components, (), seconds=0.0, dataset_fingerprint=items)
