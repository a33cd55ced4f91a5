"""Calibration against sums by hand, and against a model that is calibrated by construction."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import InvalidInput
from tests.tiny_models import tiny_llama, tiny_tokenizer
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.calibration import BINS, brier_score, calibration_error, reliability, softmax
from training.evaluation.evaluate import evaluate
from training.evaluation.likelihood import log_likelihoods

CHOICES = [Example(f"is {n} even?", "yes" if n % 2 == 0 else "no", ("yes", "no", "maybe")) for n in range(24)]


def test_the_calibration_error_is_the_sum_by_hand() -> None:
    # bins of width 1/15: 0.95 and 0.96 share one, (0.9333, 1]; 0.60 lies on the edge and belongs to (0.5333, 0.6]
    confidences, right = [0.95, 0.96, 0.60, 0.58, 0.10], [1, 0, 1, 1, 0]
    by_hand = (2 * abs(0.5 - 0.955) + 2 * abs(1.0 - 0.59) + 1 * abs(0.0 - 0.10)) / 5
    assert calibration_error(confidences, right) == pytest.approx(by_hand)
    assert [b.items for b in reliability(confidences, right)] == [1, 2, 2]


def test_bins_of_equal_mass_hold_equally_many() -> None:
    confidences = np.linspace(0.9, 1.0, 60)
    right = np.arange(60) % 2
    bins = reliability(confidences, right, equal_mass=True)
    assert [b.items for b in bins] == [4] * BINS
    by_hand = np.abs(confidences.reshape(15, 4).mean(axis=1) - right.reshape(15, 4).mean(axis=1)).mean()
    assert calibration_error(confidences, right, equal_mass=True) == pytest.approx(by_hand)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.booleans())
def test_every_item_is_in_one_bin_and_the_error_is_a_share(items: list[tuple[float, bool]], equal_mass: bool) -> None:
    confidences, right = [c for c, _ in items], [float(r) for _, r in items]
    assert sum(b.items for b in reliability(confidences, right, equal_mass=equal_mass)) == len(items)
    assert 0.0 <= calibration_error(confidences, right, equal_mass=equal_mass) <= 1.0 + 1e-9


def test_a_calibrated_model_has_almost_no_error_and_an_overconfident_one_its_excess() -> None:
    generator = np.random.default_rng(0)
    confidences = generator.uniform(0.2, 0.9, 40_000)
    right = generator.random(40_000) < confidences
    assert calibration_error(confidences, right) < 0.015
    assert calibration_error(confidences + 0.1, right) == pytest.approx(0.1, abs=0.01)


def test_the_brier_score_is_briers() -> None:
    assert brier_score([0.7, 0.2, 0.1], right=0) == pytest.approx(0.3**2 + 0.2**2 + 0.1**2)
    assert brier_score([1.0, 0.0], right=1) == 2.0


def test_softmax_survives_likelihoods_of_long_texts() -> None:
    assert softmax([-2000.0, -2000.0 + math.log(3)]) == pytest.approx([0.25, 0.75])


def test_multiple_choice_brings_its_calibration_from_the_likelihoods_of_its_choices() -> None:
    form, model = PromptFormat(tiny_tokenizer()), tiny_llama()
    result = evaluate(model, form.tokenizer, CHOICES, metric="multiple_choice", prompt_format=form)
    assert [other.metric for other in result.beside] == ["ece", "ece_equal_mass", "brier"]
    error, equal_mass, brier = result.beside

    def ids(text: str) -> list[int]:
        return list(form.tokenizer(text, add_special_tokens=False)["input_ids"])

    probabilities = []
    for example in CHOICES:
        pairs = [(ids(form.prompt(example.prompt)), ids(f" {choice}")) for choice in example.choices]
        likelihoods = np.exp(log_likelihoods(model, pairs))
        probabilities.append(likelihoods / likelihoods.sum())
    confidences = [p.max() for p in probabilities]
    assert [confidence for confidence, _ in error.components] == pytest.approx(confidences, abs=1e-4)
    assert [right for _, right in error.components] == list(result.outcomes)
    wanted = [
        sum((p - (c == e.completion)) ** 2 for p, c in zip(ps, e.choices, strict=True))
        for ps, e in zip(probabilities, CHOICES, strict=True)
    ]
    assert brier.scores == pytest.approx(wanted, abs=1e-3)
    assert brier.value == pytest.approx(np.mean(wanted), abs=1e-3)
    assert brier.low <= brier.value <= brier.high
    assert error.low is None and equal_mass.samples == len(CHOICES)


def test_multiple_choice_without_choices_is_refused() -> None:
    form = PromptFormat(tiny_tokenizer())
    with pytest.raises(InvalidInput, match="not multiple choice"):
        evaluate(tiny_llama(), form.tokenizer, [Example("a", "b")], metric="multiple_choice", prompt_format=form)
