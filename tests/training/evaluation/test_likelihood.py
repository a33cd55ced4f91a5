"""Log-likelihoods: the oracle is one full forward pass a pair and a sum of log-softmax."""

import pytest
import torch

from infra.errors import InvalidInput
from tests.tiny_models import VOCABULARY, tiny_gemma3, tiny_llama, tiny_tokenizer
from tests.training.evaluation.test_generation import MODELS
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.evaluate import evaluate
from training.evaluation.likelihood import log_likelihoods

Pair = tuple[list[int], list[int]]


def pairs(shared: int) -> list[Pair]:
    """Five prompts with one to four continuations of 1 to 9 tokens each, in no order."""
    generator = torch.Generator().manual_seed(shared)

    def draw(number: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (number,), generator=generator).tolist()

    beginning = draw(shared)
    prompts = [beginning + draw(length) for length in (4, 1, 25, 9, 9)]
    made = [
        (prompt, draw(length))
        for prompt, lengths in zip(prompts, [(1, 3, 2, 9), (1,), (1, 1), (5, 2), (4,)], strict=True)
        for length in lengths
    ]
    return [made[place] for place in torch.randperm(len(made), generator=generator).tolist()]


def naive(model: torch.nn.Module, pair: Pair) -> float:
    prompt, continuation = pair
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + continuation])).logits[0]
    scores = logits.log_softmax(dim=-1)[-len(continuation) - 1 : -1]
    return sum(scores[place, token].item() for place, token in enumerate(continuation))


@pytest.mark.parametrize("batch_tokens", [30, 300])
@pytest.mark.parametrize("shared", [0, 12, 50])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_a_full_forward_pass_a_pair(name: str, shared: int, batch_tokens: int) -> None:
    model = MODELS[name]()
    wanted = [naive(model, pair) for pair in pairs(shared)]
    assert log_likelihoods(model, pairs(shared), batch_tokens=batch_tokens) == pytest.approx(wanted, abs=2e-4)


def test_a_huge_vocabulary_makes_smaller_batches_and_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    wanted = log_likelihoods(model, pairs(5))
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, output: calls.append(output.logits.numel()))
    monkeypatch.setattr("training.evaluation.likelihood._MOST_LOGITS", VOCABULARY * 80)
    assert log_likelihoods(model, pairs(5)) == pytest.approx(wanted, abs=1e-4)
    assert max(calls) <= VOCABULARY * 80


def test_an_empty_continuation_is_refused() -> None:
    with pytest.raises(InvalidInput, match="has no likelihood"):
        log_likelihoods(tiny_llama(), [([5], [])])


def test_a_diverged_model_is_no_judge() -> None:
    model = tiny_llama()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(InvalidInput, match="NaN"):
        log_likelihoods(model, pairs(3))


def test_progress_counts_every_pair() -> None:
    told: list[tuple[int, int]] = []
    log_likelihoods(tiny_llama(), pairs(3), batch_tokens=60, on_progress=lambda *state: told.append(state))
    assert told[-1] == (10, 10)


CHOICES = ("red", "a deep green", "blue")
QUESTIONS = [Example(f"What colour is {thing}?", CHOICES[n % 3], CHOICES) for n, thing in enumerate("abcdefgh")]


@pytest.mark.parametrize("shots", [(), tuple(QUESTIONS[:2])])
def test_multiple_choice_prefers_the_most_likely_choice(shots: tuple[Example, ...]) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    form = PromptFormat(tokenizer, instruction="Say it.")
    result = evaluate(model, tokenizer, QUESTIONS, metric="multiple_choice", shots=shots, prompt_format=form)

    def oracle(example: Example) -> str:
        prompt = tokenizer(form.prompt(example.prompt, shots), add_special_tokens=False)["input_ids"]
        choices = [tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in example.choices]
        scores = [naive(model, (prompt, choice)) for choice in choices]
        return example.choices[scores.index(max(scores))]

    assert list(result.answers) == [oracle(example) for example in QUESTIONS]
    assert result.outcomes == tuple(
        int(answer == example.completion) for answer, example in zip(result.answers, QUESTIONS, strict=True)
    )
    assert result.value == sum(result.outcomes) / 8


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma3])
def test_perplexity_weighs_every_completion_token_alike(build) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = build(), tiny_tokenizer()
    form = PromptFormat(tokenizer)
    result = evaluate(model, tokenizer, QUESTIONS, metric="perplexity", prompt_format=form)
    total, count = 0.0, 0
    for example in QUESTIONS:
        prompt, completion = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in form.training_text(example)
        )
        total -= naive(model, (prompt, completion))
        count += len(completion)
    assert result.value == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
    assert sum(result.tokens) == count
    assert result.low < result.value < result.high
    assert result.outcomes is None


def test_a_question_without_its_answer_among_the_choices_is_named() -> None:
    broken = [QUESTIONS[0], Example("What?", "pink", CHOICES)]
    tokenizer = tiny_tokenizer()
    with pytest.raises(InvalidInput, match="Example 2 is not multiple choice"):
        evaluate(tiny_llama(), tokenizer, broken, metric="multiple_choice", prompt_format=PromptFormat(tokenizer))
