"""Sampled programs, judged by running them: counts against a plain loop, on a tiny model that has learnt one answer."""

import sys

import pytest
import torch

from infra.errors import InvalidInput
from registry import policy
from tests.tiny_models import EOS, tiny_llama, tiny_tokenizer
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.code_generation import NEARNESS, CodeItem, CodeResult, evaluate_code
from training.evaluation.code_metrics import edit_similarity, pass_at_k
from training.evaluation.sandbox import Limits, judge_program
from training.evaluation.statistics import mean_interval, wilson_interval

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

PROGRAM = "def f(): return 7"
ITEMS = [
    Example("seven", PROGRAM, tests="assert f() == 7"),
    Example("eight", "def f(): return 8", tests="assert f() == 8"),
]
LIMITS = Limits(seconds=60)


@pytest.fixture(scope="module")
def taught() -> tuple[object, object]:
    """A tiny model that mostly answers with one program."""
    model, tokenizer = tiny_llama(seed=3), tiny_tokenizer()
    form = PromptFormat(tokenizer)
    texts = [form.training_text(Example(item.prompt, PROGRAM)) for item in ITEMS]  # wrong for the second
    prompts, answers = zip(*(tuple(tokenizer(each)["input_ids"] for each in pair) for pair in texts), strict=True)
    ids = torch.tensor([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    labels = ids.clone()
    labels[:, : len(prompts[0])] = -100
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
    return model.eval(), tokenizer


def measured(taught: tuple[object, object], **options: object) -> CodeResult:
    model, tokenizer = taught
    settings = {"samples": 6, "at": (1, 3), "max_new_tokens": 24, "limits": LIMITS, "seed": 1, **options}
    return evaluate_code(model, tokenizer, ITEMS, prompt_format=PromptFormat(tokenizer), **settings)


def test_what_passes_is_counted_and_pass_at_k_follows(taught: tuple[object, object]) -> None:
    seen: list[tuple[int, int]] = []
    result = measured(taught, on_progress=lambda *done: seen.append(done))
    for item, example in zip(result.items, ITEMS, strict=True):
        alone = [judge_program(program, example.tests, LIMITS).status for program in item.programs]
        assert list(item.statuses) == alone
        assert item.correct == alone.count("passed")
    assert result.items[0].correct >= 1, "it was taught this"
    assert result.items[1].correct == 0
    for k in (1, 3):
        assert result.pass_at[k] == pytest.approx(pass_at_k(6, result.items[0].correct, k) / 2)
    assert sum(result.statuses.values()) == 12
    assert seen[-1] == (24, 24)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert CodeResult.model_validate_json(result.model_dump_json()) == result


def test_the_same_seed_gives_the_same_samples_and_another_does_not(taught: tuple[object, object]) -> None:
    first, again, other = (measured(taught, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert first.items == again.items
    assert first.items != other.items


def test_an_almost_cold_sampling_says_one_thing(taught: tuple[object, object]) -> None:
    result = measured(taught, temperature=0.01)
    assert set(result.items[0].programs) == {PROGRAM}
    assert result.pass_at == {1: 0.5, 3: 0.5}
    similar = 1 - (1 / len(PROGRAM)) / 2
    assert result.nearness == pytest.approx(
        {"exact_program": 0.5, "abstracted_match": 1, "edit_similarity": similar, "parses": 1}
    )


def test_it_reads_as_any_other_evaluation(taught: tuple[object, object]) -> None:
    result = measured(taught)
    several = result.as_evaluation(1, 3)
    shares = tuple(item.correct / 6 for item in result.items)
    assert (several.metric, several.value, several.samples, several.outcomes) == ("pass@1", shares[0] / 2, 2, None)
    assert several.scores == pytest.approx(shares)
    assert (several.low, several.high) == mean_interval(shares) != (0.0, shares[0])
    three, *near = several.beside
    assert (three.metric, three.value) == ("pass@3", result.pass_at[3])
    assert {each.metric: each.value for each in near} == pytest.approx(result.nearness)
    for each, example in zip(result.items, ITEMS, strict=True):
        similar = [edit_similarity(program, example.completion) for program in each.programs]
        assert each.nearness["edit_similarity"] == pytest.approx(sum(similar) / 6)


def test_one_program_each_is_the_greedy_one_and_right_or_wrong(taught: tuple[object, object]) -> None:
    seen: list[tuple[int, int]] = []
    result = measured(taught, temperature=0, samples=1, at=(1,), on_progress=lambda *done: seen.append(done))
    assert [item.programs for item in result.items] == [(PROGRAM,), (PROGRAM,)]
    assert (seen[0][1], seen[-1]) == (4, (4, 4))
    single = result.as_evaluation(1)
    assert (single.value, single.outcomes, single.answers) == (0.5, (1, 0), (PROGRAM, PROGRAM))
    assert (single.low, single.high) == wilson_interval(1, 2)
    outcomes = {each.metric: each.outcomes for each in single.beside}
    near = {"exact_program": (1, 0), "abstracted_match": (1, 1), "parses": (1, 1)}
    assert outcomes == {"edit_similarity": None, **near}


def test_the_registry_knows_what_comes_beside() -> None:
    assert tuple(NEARNESS) == policy.NEARNESS


def test_the_interval_narrows_with_items_and_holds_the_value() -> None:
    items = tuple(
        CodeItem(programs=("",) * 4, statuses=("failed",) * 4, correct=n % 5, nearness=dict.fromkeys(NEARNESS, 0.0))
        for n in range(100)
    )
    value = sum(pass_at_k(4, n % 5, 2) for n in range(100)) / 100
    result = CodeResult(
        items=items, pass_at={2: value}, isolation="audit", seconds=1.0, dataset_fingerprint="x"
    ).as_evaluation(2)
    spread = (sum((pass_at_k(4, n % 5, 2) - value) ** 2 for n in range(100)) / 100) ** 0.5 / 10
    assert result.low < value < result.high
    assert result.stderr == pytest.approx(spread, rel=0.1)
    assert result.high - result.low == pytest.approx(2 * 1.96 * spread, rel=0.15)


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {}, "no examples"),
        ([ITEMS[0], Example("x", "y", place="a.jsonl line 2")], {}, "a.jsonl line 2 has no tests"),
        (ITEMS, {"samples": 2, "at": (1, 3)}, "pass@3 cannot be told from 2 samples"),
        (ITEMS, {"at": ()}, "pass@0"),
        (ITEMS, {"temperature": 0}, "10 greedy programs are one and the same"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(examples, options, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        evaluate_code(None, None, examples, prompt_format=None, max_new_tokens=EOS, **options)
