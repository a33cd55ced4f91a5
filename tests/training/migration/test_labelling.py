"""Labels come from the teacher, in its own prompt format, and from nobody else."""

from pathlib import Path

import pytest

from infra.errors import InvalidInput
from tests.tiny_models import tiny_llama, tiny_tokenizer
from tests.training.methods.backbones import BACKBONES, train
from training.data.prompting import PromptFormat
from training.evaluation.generation import greedy_answers
from training.methods.catalog import get_method
from training.methods.contract import Adapted, AttachContext
from training.migration import labelling
from training.migration.labelling import label

FORM = PromptFormat(tiny_tokenizer(), "Say something.")
INPUTS = [f"input number {number}" for number in range(11)]


def teacher(seed: int) -> Adapted:
    method = get_method("lora")
    adapted = method.attach(tiny_llama(), method.config_type(rank=4), AttachContext(seed=seed))
    train(adapted, BACKBONES["llama"].batch(), steps=3 + seed, rate=0.05)
    return adapted


def test_the_answers_are_the_teachers_greedy_ones() -> None:
    one, other = teacher(0), teacher(1)
    asked = [FORM.tokenizer(FORM.prompt(text), add_special_tokens=False)["input_ids"] for text in INPUTS]
    expected = greedy_answers(
        one.model, FORM.tokenizer, asked, max_new_tokens=24, ends={2}, stop_strings=FORM.stop_strings
    )
    kept = {text: answer for text, answer in zip(INPUTS, expected, strict=True) if 0 < len(answer) <= 20}
    found = label(one.model, FORM, INPUTS, longest=20)
    assert {example.prompt: example.completion for example in found.examples} == kept
    assert len(found.examples) + found.empty + found.run_on == len(INPUTS)
    assert found != label(other.model, FORM, INPUTS, longest=20), "another teacher, other labels"


def test_answers_that_are_none_are_counted_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "greedy_answers", lambda *_, **__: ["", "ok", "much too long an answer"])
    found = label(tiny_llama(), FORM, INPUTS[:3], longest=10)
    assert [(example.prompt, example.completion) for example in found.examples] == [(INPUTS[1], "ok")]
    assert (found.empty, found.run_on) == (1, 1)


def test_labelling_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "CHUNK", 4)
    model, path = teacher(0).model, tmp_path / "labels.jsonl"
    whole = label(model, FORM, INPUTS, longest=20)
    answered: list[int] = []

    def dies(done: int, wanted: int) -> None:
        answered.append(done)
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(model, FORM, INPUTS, longest=20, kept_in=path, on_progress=dies)
    with path.open("a") as file:
        file.write('["input numb')  # killed while it was writing
    assert label(model, FORM, INPUTS, longest=20, kept_in=path, on_progress=lambda *at: answered.append(at[0])) == whole
    assert answered == [0, 4, 8, 8, 11]
    assert len(path.read_text().splitlines()) == len(INPUTS)
    with pytest.raises(InvalidInput, match="answers to other inputs"):
        label(model, FORM, INPUTS[::-1], longest=20, kept_in=path)
