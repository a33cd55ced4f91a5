"""Judging a model on examples: exact match, multiple choice, perplexity."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from infra.errors import InvalidInput
from training.data.example import Example, fingerprint
from training.data.prompting import PromptFormat
from training.evaluation.generation import greedy_answers
from training.evaluation.likelihood import log_likelihoods
from training.evaluation.masked import masked_losses
from training.evaluation.prompt_cache import plain_model
from training.evaluation.result import EvaluationResult, PairedComparison, accuracy, compare
from training.evaluation.statistics import bootstrap_perplexity, perplexity
from training.evaluation.suite import Metric
from training.objectives.of_model import is_masked_lm, objective_of

__all__ = ["EvaluationResult", "PairedComparison", "compare", "evaluate"]

SPARE_TOKENS = 4  # more than the longest wanted answer, so that one which runs on is seen to do so


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    metric: Metric,
    shots: Sequence[Example] = (),
    prompt_format: PromptFormat,
    max_new_tokens: int | None = None,
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Measure one metric of a language model, bare or adapted. Of a masked one there is only perplexity.

    - `exact_match`: the greedy answer is the completion, character by character, but for white space around it.
    - `multiple_choice`: the choice with the highest log-likelihood is the completion; summed over its tokens, not
      normalised by length, without an end mark (`acc` of lm-eval). Of equal choices the first one counts.
    - `perplexity`: exp of the mean negative log-likelihood a token of the completions, end marks included; of a masked
      language model, of the tokens that are hidden, 15 % of each text.

    Args:
        model: its mode (training or evaluation) is restored afterwards.
        tokenizer: of the base model.
        examples: at least one.
        metric: one of the above.
        shots: solved examples in front of every question.
        prompt_format: how the model is asked; as it was in training.
        max_new_tokens: longest answer of exact_match. Default: the longest completion and `SPARE_TOKENS` more.
        batch_tokens: rows × slots of a batch; memory grows with it.
        on_progress: told (done, wanted): examples, or choices for multiple_choice.

    Raises:
        InvalidInput: no examples, choices that lack the completion, prompts too long for the model, or what a masked
            language model cannot be asked.
    """
    if not examples:
        raise InvalidInput("There are no examples to evaluate on.", "Give a data set with at least one example.")
    check_metric(model, metric, len(shots))
    asked = _Asked(tokenizer, prompt_format, tuple(examples), tuple(shots))
    started = time.monotonic()
    if metric == "perplexity":
        if is_masked_lm(model):
            texts = [example.text for example in examples]
            losses, counts = masked_losses(model, tokenizer, texts, batch_tokens=batch_tokens, on_progress=on_progress)
        else:
            scored = asked.completions()
            scores = log_likelihoods(model, scored, batch_tokens=batch_tokens, on_progress=on_progress)
            losses, counts = [-score for score in scores], [len(ids) for _, ids in scored]
        result = _perplexity(losses, counts, fingerprint(examples))
        return result.model_copy(update={"seconds": time.monotonic() - started})
    if metric == "multiple_choice":
        scores = log_likelihoods(model, asked.choices(), batch_tokens=batch_tokens, on_progress=on_progress)
        answers = _preferred(examples, scores)
    else:
        answers = greedy_answers(
            model,
            tokenizer,
            asked.prompts(),
            max_new_tokens=max_new_tokens or max(len(ids) for _, ids in asked.completions()) + SPARE_TOKENS,
            ends=end_tokens(model, tokenizer, prompt_format),
            stop_strings=prompt_format.stop_strings,
            batch_tokens=batch_tokens,
            on_progress=on_progress,
        )
    return accuracy(
        metric,
        [
            answer == example.completion.strip()
            for answer, example in zip(map(str.strip, answers), examples, strict=True)
        ],
        answers,
        seconds=time.monotonic() - started,
        dataset_fingerprint=fingerprint(examples),
    )


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


def _preferred(examples: Sequence[Example], scores: Sequence[float]) -> list[str]:
    left = iter(scores)
    preferred = []
    for example in examples:
        of_choice = [next(left) for _ in example.choices]
        preferred.append(example.choices[of_choice.index(max(of_choice))])
    return preferred


def _perplexity(losses: list[float], tokens: list[int], dataset_fingerprint: str) -> EvaluationResult:
    resampled = bootstrap_perplexity(losses, tokens, seed=0)
    return EvaluationResult(
        metric="perplexity",
        value=perplexity(sum(losses), sum(tokens)),
        low=resampled.low,
        high=resampled.high,
        stderr=resampled.stderr,
        samples=len(losses),
        losses=tuple(losses),
        tokens=tuple(tokens),
        seconds=0.0,
        dataset_fingerprint=dataset_fingerprint,
    )


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, form: PromptFormat | None = None) -> set[int]:
    """Everything that ends an answer: the tokenizer's and the model's end of text, and the format's end mark."""
    of_model = getattr(getattr(plain_model(model), "generation_config", None), "eos_token_id", None)
    of_mark = tokenizer(form.end_mark, add_special_tokens=False)["input_ids"] if form else []
    ends = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])}
    if len(of_mark) == 1:
        ends.update(of_mark)
    return {end for end in ends if end is not None}
