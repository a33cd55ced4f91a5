"""Where two adapters answer differently, both together decide."""

from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_llama, tiny_tokenizer
from tests.training.migration.test_labelling import INPUTS, teacher
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.migration.labelling import label
from training.migration.second_opinion import Opinion, differing, halves, likelihoods, settled, store, stored

FORM = PromptFormat(tiny_tokenizer(), "Say something.")


def log_probability(model: torch.nn.Module, text: str, answer: str) -> float:
    """Token by token, in float64."""
    prompt, said = (
        FORM.tokenizer(each, add_special_tokens=False)["input_ids"]
        for each in (FORM.prompt(text), FORM.completion(answer))
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + said])).logits[0].double()
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(rows.gather(1, torch.tensor(said)[:, None]).sum())


@pytest.mark.parametrize("number", [0, 1, 2, 7, 100])
def test_halves_part_all_places_at_random(number: int) -> None:
    one, other = halves(number, 3)
    assert sorted(one + other) == list(range(number)) and len(one) == number // 2
    assert one == sorted(one) and other == sorted(other)
    assert halves(number, 3) == (one, other)
    assert number < 100 or halves(number, 4) != (one, other)


def test_likelihoods_are_those_of_the_answer_to_its_end() -> None:
    model = teacher(0).model.eval()
    pairs = [(INPUTS[0], "1"), (INPUTS[0], "12"), (INPUTS[1], "something else")]
    expected = [log_probability(model, *pair) for pair in pairs]
    assert likelihoods(model, FORM, pairs) == pytest.approx(expected, abs=1e-3)


def test_only_another_answer_is_an_opinion(tmp_path: Path) -> None:
    model = teacher(0).model.eval()
    own = {each.prompt: each.completion for each in label(model, FORM, INPUTS, longest=40).examples}
    same, other = list(own)[:2]
    examples = [Example(text, own[text] if text == same else "old") for text in INPUTS]
    places = [examples.index(next(e for e in examples if e.prompt == text)) for text in (same, other)]
    (found,) = differing(model, FORM, examples, places, longest=40, kept_in=tmp_path / "answers.jsonl")
    assert (found.place, found.answer) == (places[1], own[other])
    assert found.of_old == pytest.approx(log_probability(model, other, "old"), abs=1e-3)
    assert found.of_own == pytest.approx(log_probability(model, other, own[other]), abs=1e-3)
    nothing = differing(model, FORM, examples, places[1:], longest=0, kept_in=tmp_path / "none.jsonl")
    assert nothing == [], "an answer that is none changes none"


def test_the_answer_that_both_find_more_probable_is_learnt() -> None:
    model = tiny_llama(seed=5).eval()
    examples = [Example(text, "old") for text in INPUTS[:4]]
    behind = log_probability(model, INPUTS[1], "old") - log_probability(model, INPUTS[1], "new")
    opinions = [
        Opinion(1, "new", -5.0, -5.0 + behind + 0.01),
        Opinion(
            2,
            "new",
            -5.0,
            -5.0 + log_probability(model, INPUTS[2], "old") - log_probability(model, INPUTS[2], "new") - 0.01,
        ),
    ]
    found = settled(model, FORM, examples, opinions)
    assert [each.completion for each in found] == ["old", "new", "old", "old"]
    assert [each.prompt for each in found] == INPUTS[:4]
    assert settled(model, FORM, examples, []) == examples


def test_opinions_are_kept(tmp_path: Path) -> None:
    opinions = [Opinion(3, "drei ✓", -1.5, -0.25)]
    store(tmp_path / "opinions.json", opinions)
    assert stored(tmp_path / "opinions.json") == opinions
