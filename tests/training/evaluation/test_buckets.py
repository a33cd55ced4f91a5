"""Length buckets: disjoint, within their limits, counted by the tokenizer of the model."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.suites import Prepared, in_parts
from infra.errors import InvalidInput
from tests.tiny_models import tiny_tokenizer
from tests.training.evaluation.test_evaluate import memorising
from training.data.example import Example, fingerprint
from training.data.prompting import PromptFormat
from training.evaluation.buckets import in_buckets, prompt_lengths
from training.evaluation.evaluate import evaluate
from training.evaluation.result import EvaluationResult, part
from training.evaluation.suite import Metric, Suite

TOKENIZER = tiny_tokenizer()
EXAMPLES = tuple(Example("word " * n, "yes", ("yes", "no")) for n in (1, 4, 9, 15, 2, 30))


def drawn(examples: tuple[Example, ...] = EXAMPLES) -> Prepared:
    return Prepared("notes/test", "multiple_choice", examples, (), "Answer.", None)


@given(
    st.lists(st.integers(1, 60), max_size=50),
    st.lists(st.integers(1, 50), min_size=1, max_size=5, unique=True).map(sorted),
)
def test_buckets_are_disjoint_and_hold_what_is_within_their_limits(lengths: list[int], limits: list[int]) -> None:
    buckets = in_buckets(lengths, limits)
    assert list(buckets) == list(pairwise([0, *limits]))
    for (low, high), places in buckets.items():
        assert all(low < lengths[place] <= high for place in places)
    assert sorted(place for places in buckets.values() for place in places) == [
        p for p, length in enumerate(lengths) if length <= limits[-1]
    ]


def test_a_prompt_is_as_long_as_the_model_reads_it() -> None:
    form = PromptFormat(TOKENIZER, "Answer.")
    shot = Example("1", "2")
    (length,) = prompt_lengths([EXAMPLES[0]], [shot], form)
    assert length == len(TOKENIZER(form.prompt(EXAMPLES[0].prompt, [shot]), add_special_tokens=False)["input_ids"])
    assert length > prompt_lengths([EXAMPLES[0]], [], form)[0]


def test_items_beyond_the_last_limit_are_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    found = in_parts(drawn(), Suite(name="notes/test", buckets=(40, 80, 120)), TOKENIZER)
    lengths = prompt_lengths(found.examples, (), PromptFormat(TOKENIZER, "Answer."))
    assert "notes/test: 1 of 6 items have more than 120 tokens" in caplog.text
    assert found.examples == EXAMPLES[:5]
    for title, (low, high) in {
        "notes/test[0-40]": (0, 40),
        "notes/test[40-80]": (40, 80),
        "notes/test[80-120]": (80, 120),
    }.items():
        assert found.parts[title] == tuple(p for p, length in enumerate(lengths) if low < length <= high) != ()


def test_limits_below_every_prompt_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no prompt has at most 3 tokens"):
        in_parts(drawn(), Suite(name="notes/test", buckets=(3,)), TOKENIZER)


@pytest.fixture(scope="module")
def taught() -> Any:
    """A model that knows the answers to half of the examples."""
    return memorising(list(EXAMPLES[:3]), PromptFormat(TOKENIZER, "Answer."))


@pytest.mark.parametrize("metric", ["exact_match", "multiple_choice", "perplexity", "rougeL", "chrf"])
def test_the_part_of_a_result_is_the_result_of_the_part(taught: Any, metric: Metric) -> None:
    def measured(examples: Sequence[Example]) -> EvaluationResult:
        form = PromptFormat(TOKENIZER, "Answer.")
        return evaluate(taught, TOKENIZER, examples, metric=metric, prompt_format=form, max_new_tokens=8)

    places = [1, 2, 4]
    some = [EXAMPLES[place] for place in places]
    found, alone = part(measured(EXAMPLES), places, fingerprint(some)), measured(some)
    assert alone.value > 0
    for mine, theirs in zip((found, *found.beside), (alone, *alone.beside), strict=True):
        assert (mine.metric, mine.samples, mine.outcomes) == (theirs.metric, theirs.samples, theirs.outcomes)
        assert (mine.answers, mine.tokens, mine.dataset_fingerprint) == (
            theirs.answers, theirs.tokens, theirs.dataset_fingerprint,
        )  # fmt: skip
        for numbers in ("value", "low", "high", "stderr", "scores", "components", "losses"):
            ours, wanted = (np.asarray(getattr(each, numbers), dtype=float) for each in (mine, theirs))
            np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-4, err_msg=f"{mine.metric} {numbers}")
