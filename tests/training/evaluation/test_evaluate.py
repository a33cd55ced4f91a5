"""Exact match, metrics of texts, results and comparisons."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import sacrebleu
import torch
from transformers import BertForMaskedLM

from infra.errors import InvalidInput
from tests.tiny_models import tiny_bert, tiny_llama, tiny_tokenizer
from tests.training.evaluation.test_text_metrics import near, sentences
from training.data.example import Example, fingerprint
from training.data.prompting import PromptFormat
from training.evaluation.code_generation import evaluate_code
from training.evaluation.evaluate import evaluate
from training.evaluation.result import EvaluationResult, compare, part, scored
from training.evaluation.statistics import wilson_interval
from training.evaluation.suite import Metric, Sampling
from training.evaluation.text_metrics import text_scores

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

TOKENIZER = tiny_tokenizer()
QUESTIONS = [Example(f"{a} + {b}", str(a + b)) for a in range(4) for b in range(3)]


def memorising(examples: list[Example], form: PromptFormat, steps: int = 150) -> Any:
    """A tiny Llama taught these examples by plain gradient descent."""
    model = tiny_llama().train()
    texts = [form.training_text(example) for example in examples]
    rows = []
    for prompt, completion in texts:
        before, after = (form.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
        rows.append((before + after, [-100] * len(before) + after))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def test_a_model_that_learnt_the_answers_gets_them_right_and_others_wrong() -> None:
    form = PromptFormat(TOKENIZER)
    model = memorising(QUESTIONS, form)
    wrong = [Example(example.prompt, f"{example.completion}0") for example in QUESTIONS[:4]]
    result = evaluate(model, form.tokenizer, [*QUESTIONS, *wrong], metric="exact_match", prompt_format=form)
    assert result.outcomes == (1,) * 12 + (0,) * 4
    assert result.answers == tuple(example.completion for example in [*QUESTIONS, *QUESTIONS[:4]])
    assert result.value == 0.75
    assert result.samples == 16
    assert result.stderr == pytest.approx((0.75 * 0.25 / 16) ** 0.5)
    assert result.dataset_fingerprint == fingerprint([*QUESTIONS, *wrong])
    assert result.low < 0.75 < result.high


def test_the_perplexity_of_plain_texts_is_that_of_all_tokens_but_the_first() -> None:
    form, model = PromptFormat(TOKENIZER), tiny_llama().eval()
    texts = ["the cat sat", "one two three four", "a"]
    rows = [torch.tensor([TOKENIZER(form.plain_text(text), add_special_tokens=False)["input_ids"]]) for text in texts]
    with torch.no_grad():
        losses = [model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1) for row in rows]
    wanted = sum(losses) / sum(row.shape[1] - 1 for row in rows)
    examples = [Example(text, "") for text in texts]
    result = evaluate(model, TOKENIZER, examples, metric="perplexity", prompt_format=form)
    assert result.value == pytest.approx(torch.tensor(wanted).exp().item(), rel=1e-4)


def test_an_answer_that_runs_on_is_not_the_completion() -> None:
    """The default length leaves room to see that the model does not stop where it should."""
    form = PromptFormat(TOKENIZER)
    taught = [Example(example.prompt, f"{example.completion} apples") for example in QUESTIONS]
    result = evaluate(memorising(taught, form), form.tokenizer, QUESTIONS, metric="exact_match", prompt_format=form)
    assert result.value == 0.0
    assert all(answer != example.completion for answer, example in zip(result.answers, QUESTIONS, strict=True))


def test_texts_are_measured_on_the_answers_that_exact_match_would_see_and_empty_ones_have_nothing() -> None:
    """The oracle: each metric of the answers that came back, called by itself."""
    form = PromptFormat(TOKENIZER)
    taught = [Example(f"say {n}", f"{n} {n + 1} and so on") for n in range(4)]
    taught.append(Example("be silent", " "))  # the end mark at once
    asked = [*taught[:4], Example("be silent", "something")]
    also = ["bleu", "chrf", "token_f1", "exact_match"]
    model = memorising(taught, form)
    result = evaluate(model, TOKENIZER, asked, metric="rougeL", also=also, prompt_format=form)
    assert result.answers == (*(example.completion for example in taught[:4]), "")
    assert result.scores == (1.0, 1.0, 1.0, 1.0, 0.0)
    assert (result.value, result.samples, result.outcomes) == (0.8, 5, None)
    assert result.low < 0.8 < result.high
    assert result.stderr == pytest.approx((0.8 * 0.2 / 4) ** 0.5)
    assert [other.metric for other in result.beside] == also
    references = [[example.completion] for example in asked]
    for other in result.beside[:3]:
        found = text_scores(other.metric, result.answers, references)
        assert (other.scores, other.components) == (found.of_items, found.components)
    assert 100 * result.beside[0].value == pytest.approx(
        sacrebleu.corpus_bleu(list(result.answers), [[example.completion for example in asked]]).score
    )
    assert result.beside[3].outcomes == (1, 1, 1, 1, 0)
    alone = evaluate(model, TOKENIZER, asked, metric="exact_match", prompt_format=form)
    assert alone.outcomes == result.beside[3].outcomes and alone.answers == result.answers
    assert EvaluationResult.model_validate_json(result.model_dump_json()) == result


@pytest.mark.parametrize("metric", ["exact_match", "rougeL", "bleu"])
def test_plain_text_has_no_answer_to_compare_with(metric: Metric) -> None:
    form = PromptFormat(TOKENIZER)
    with pytest.raises(InvalidInput, match="Example 2 is plain text"):
        evaluate(tiny_llama(), TOKENIZER, [QUESTIONS[0], Example("a text", "")], metric=metric, prompt_format=form)


def test_metrics_of_answers_do_not_go_with_a_suite_that_writes_none() -> None:
    with pytest.raises(InvalidInput, match="perplexity generates no answers that bleu could be measured on"):
        evaluate(
            tiny_llama(),
            TOKENIZER,
            QUESTIONS,
            metric="perplexity",
            also=["bleu"],
            prompt_format=PromptFormat(TOKENIZER),
        )


def test_a_masked_language_model_is_not_asked_for_texts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    model = BertForMaskedLM(tiny_bert(len(tokenizer)).config)
    with pytest.raises(InvalidInput, match="judged by the perplexity of what is hidden; the suite asks for rougeL"):
        evaluate(model, tokenizer, QUESTIONS, metric="rougeL", prompt_format=PromptFormat(tokenizer))


@on_linux
def test_programs_that_were_learnt_pass_and_others_do_not() -> None:
    form = PromptFormat(TOKENIZER)
    taught = [Example(f"{n}?", f"def f():\n    return {n}", tests=f"assert f() == {n}") for n in range(4)]
    taught.append(Example("double?", "def f(x): return 2 * x", tests="assert f(3) == 6"))
    wrong = [
        replace(example, completion=f"def f():\n    return {n + 5}", tests=f"assert f() == {n + 5}")
        for n, example in enumerate(taught[:3])
    ]
    model = memorising(taught, form)
    result = evaluate(model, TOKENIZER, [*taught, *wrong], metric="pass@1", prompt_format=form)
    assert (result.metric, result.outcomes) == ("pass@1", (1,) * 5 + (0,) * 3)
    assert result.answers == tuple(example.completion for example in [*taught, *taught[:3]])
    assert (result.low, result.high) == wilson_interval(5, 8)
    length = len(taught[0].completion)  # three of eight differ from their reference in one character of it
    assert {each.metric: each.value for each in result.beside} == pytest.approx(
        {"exact_program": 5 / 8, "abstracted_match": 1, "edit_similarity": 1 - 3 / 8 / length, "parses": 1}
    )
    assert EvaluationResult.model_validate_json(result.model_dump_json()) == result
    before = evaluate(tiny_llama(), TOKENIZER, [*taught, *wrong], metric="pass@1", prompt_format=form)
    paired = compare(result, before)
    assert (before.value, paired.test, paired.only_a, paired.only_b) == (0.0, "exact McNemar", 5, 0)


@on_linux
def test_several_programs_an_item_give_every_k_at_once_and_are_compared_by_their_shares() -> None:
    form = PromptFormat(TOKENIZER)
    taught = [Example(f"{n}?", f"def f(): return {n}", tests=f"assert f() == {n}") for n in range(4)]
    model, ask = memorising(taught, form, steps=80), {"metric": "pass@1", "also": ["pass@3"], "prompt_format": form}
    hot = Sampling(programs=6, temperature=1.3, seed=1)
    result = evaluate(model, TOKENIZER, taught, **ask, sampling=hot)
    apart = evaluate_code(
        model,
        TOKENIZER,
        taught,
        prompt_format=form,
        samples=6,
        at=(1, 3),
        temperature=1.3,
        seed=1,
        max_new_tokens=2 * len(TOKENIZER(form.completion(taught[0].completion))["input_ids"]),
    )
    assert (result.value, result.beside[0].value) == pytest.approx((apart.pass_at[1], apart.pass_at[3]))
    assert result.scores == pytest.approx([item.correct / 6 for item in apart.items])
    assert 0 < result.value < result.beside[0].value, "too hot to be always right, and three tries are better than one"
    assert compare(result, result).test == "paired sign flips"
    halves = part(result, [0, 1], "x"), part(result, [2, 3], "y")
    assert sum(half.value for half in halves) / 2 == pytest.approx(result.value)


def test_programs_are_not_judged_without_tests_or_enough_of_them() -> None:
    form = PromptFormat(TOKENIZER)
    with pytest.raises(InvalidInput, match="Example 1 has no tests"):
        evaluate(tiny_llama(), TOKENIZER, QUESTIONS, metric="pass@1", prompt_format=form)
    tested = [replace(example, tests="assert True") for example in QUESTIONS]
    with pytest.raises(InvalidInput, match="pass@5 cannot be told from 3 samples"):
        evaluate(tiny_llama(), TOKENIZER, tested, metric="pass@5", prompt_format=form, sampling=Sampling(programs=3))
    with pytest.raises(InvalidInput, match="pass@1 generates no answers that bleu could be measured on"):
        evaluate(tiny_llama(), TOKENIZER, tested, metric="pass@1", also=["bleu"], prompt_format=form)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    model = BertForMaskedLM(tiny_bert(len(tokenizer)).config)
    with pytest.raises(InvalidInput, match="the suite asks for pass@1"):
        evaluate(model, tokenizer, tested, metric="pass@1", prompt_format=PromptFormat(tokenizer))


def test_texts_are_compared_by_swapping_answers_under_the_corpus_value() -> None:
    references = sentences(40, seed=1)
    form = {"seconds": 0.0, "dataset_fingerprint": "d1"}
    results = []
    for answers in (near(references, seed=2), near(near(near(references, seed=3), seed=4), seed=5)):
        found = text_scores("bleu", answers, [[reference] for reference in references])
        results.append(scored("bleu", found.of_items, found.components, answers, **form))
    paired = compare(*results)
    assert (paired.metric, paired.test, paired.samples) == ("bleu", "approximate randomization", 40)
    assert paired.difference == pytest.approx(results[0].value - results[1].value)
    assert paired.low > 0 and paired.p_value < 0.01
    assert paired.only_a > paired.only_b
    reverse = compare(results[1], results[0])
    assert reverse.p_value == pytest.approx(paired.p_value)
    assert (reverse.difference, reverse.low) == pytest.approx((-paired.difference, -paired.high))


def test_a_result_survives_json_and_shows_what_matters() -> None:
    result = evaluate(tiny_llama(), TOKENIZER, QUESTIONS, metric="exact_match", prompt_format=PromptFormat(TOKENIZER))
    assert EvaluationResult.model_validate_json(result.model_dump_json()) == result
    assert repr(result).startswith("EvaluationResult(exact_match 0.0 % [0.0–24.2], 12 samples")


def test_no_examples_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no examples"):
        evaluate(tiny_llama(), TOKENIZER, [], metric="exact_match", prompt_format=PromptFormat(TOKENIZER))


def result(outcomes: list[int], data: str = "d1", metric: str = "exact_match") -> EvaluationResult:
    value = sum(outcomes) / len(outcomes)
    return EvaluationResult.model_validate(
        {
            "metric": metric,
            "value": value,
            "low": 0.0,
            "high": 1.0,
            "stderr": 0.0,
            "samples": len(outcomes),
            "outcomes": outcomes,
            "seconds": 0.0,
            "dataset_fingerprint": data,
        }
    )


def test_a_comparison_counts_what_one_of_the_two_gets_right() -> None:
    a, b = result([1, 1, 1, 0, 0, 1, 1, 1]), result([1, 0, 0, 1, 0, 0, 0, 0])
    paired = compare(a, b)
    assert (paired.only_a, paired.only_b) == (5, 1)
    assert paired.difference == pytest.approx(a.value - b.value)
    assert paired.p_value == pytest.approx(2 * (1 + 6) / 64)
    assert paired.low is not None
    assert paired.high is not None
    assert paired.low < paired.difference < paired.high


def test_a_comparison_of_a_result_with_itself_sees_nothing() -> None:
    paired = compare(result([1, 0, 1]), result([1, 0, 1]))
    assert (paired.difference, paired.p_value) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (result([1, 0], data="d2"), "different examples"),
        (result([1, 0], metric="multiple_choice"), "cannot be compared"),
    ],
)
def test_results_that_do_not_belong_together_are_not_compared(other: EvaluationResult, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        compare(result([1, 0]), other)


def perplexity(losses: list[float], tokens: list[int]) -> EvaluationResult:
    return EvaluationResult(
        metric="perplexity",
        value=float(torch.tensor(sum(losses) / sum(tokens)).exp()),
        low=0.0,
        high=9.0,
        stderr=0.0,
        samples=len(losses),
        losses=tuple(losses),
        tokens=tuple(tokens),
        seconds=0.0,
        dataset_fingerprint="d1",
    )


def test_perplexities_are_compared_example_by_example() -> None:
    better, worse = [1.0 + n / 10 for n in range(12)], [1.5 + n / 10 for n in range(12)]
    paired = compare(perplexity(better, [2] * 12), perplexity(worse, [2] * 12))
    assert paired.difference < 0
    assert (paired.only_a, paired.only_b) == (12, 0)
    assert paired.p_value < 0.01


def test_perplexities_in_different_tokens_are_not_compared() -> None:
    with pytest.raises(InvalidInput, match="different tokens"):
        compare(perplexity([1.0, 2.0], [2, 2]), perplexity([1.0, 2.0], [2, 3]))
