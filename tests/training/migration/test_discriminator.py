"""A discriminator: one token is learnt, both kinds count alike, and it tells apart what can be told apart."""

import random
from pathlib import Path

import pytest
import torch

from infra.errors import InvalidInput
from tests.tiny_models import tiny_llama, tiny_tokenizer
from training.adapter_files import attach_stored, write_adapter
from training.migration.discriminator import (
    Discriminator,
    Judged,
    Question,
    better_than_chance,
    judged,
    train_discriminator,
)
from training.migration.options import DiscriminatorOptions
from training.options import TrainingOptions
from training.progress import TrainingEvent

OPTIONS = DiscriminatorOptions(training=TrainingOptions(steps=100, batch_size=16, learning_rate=1e-2))


def quiet(event: TrainingEvent) -> None:
    del event


def texts(letters: str, number: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(letters, k=rng.randint(6, 12))) for _ in range(number)]


def test_the_question_is_the_papers_and_one_token_is_learnt() -> None:
    tokenizer = tiny_tokenizer()
    question = Question(tokenizer, "object counting")
    asked = tokenizer.decode(question.prompt("I have a pear."))
    assert asked == (
        "Answer in as few words as possible.\n\n"
        "Q: I have a pear.\nIs the above question from the object counting dataset?\nA: "
    )
    assert [tokenizer.decode([token]) for token in (question.yes, question.no)] == ["y", "n"]  # the space is of both
    example = question.example("I have a pear.", real=True)
    assert [label for label in example.labels if label != -100] == [question.yes] == [example.input_ids[-1]]
    assert question.example("x", real=False).labels[-1] == question.no


def test_margins_are_the_difference_of_the_two_log_probabilities() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    inputs = texts("abc", 5)
    question = Question(tokenizer, "letters")
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([question.prompt(text)])).logits[0, -1] for text in inputs]
    expected = torch.stack([row[question.yes] - row[question.no] for row in rows])
    found = torch.tensor(Discriminator(model, tokenizer, "letters").margins(inputs))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_it_learns_to_tell_inputs_apart_and_comes_back_from_disk(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    bare = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    real, written = texts("abcdef", 60), texts("uvwxyz", 90, seed=1)
    adapted, found = train_discriminator(
        model, tokenizer, "letters", real, written, OPTIONS, seed=0, workdir=tmp_path / "work", on_event=quiet
    )
    assert found.samples == 12
    assert found.balanced_accuracy > 0.9
    assert found.real_kept > 0.9 > 0.1 > found.written_kept
    with adapted.disabled():
        again = tiny_llama()
        assert all(torch.equal(bare[name], tensor) for name, tensor in again.state_dict().items())
    write_adapter(
        tmp_path / "kept",
        adapted.save,
        method_name="lora",
        base_identity="a" * 64,
        base_reference="x",
        recipe={},
        metrics={},
    )
    loaded = attach_stored(tiny_llama(), tmp_path / "kept", base_identity="a" * 64)
    margins = Discriminator(adapted.model, tokenizer, "letters").margins(real[:4])
    assert Discriminator(loaded.model, tokenizer, "letters").margins(real[:4]) == pytest.approx(margins, abs=1e-4)


def test_what_cannot_be_told_apart_is_judged_as_chance(tmp_path: Path) -> None:
    both = texts("abc", 200)
    _, found = train_discriminator(
        tiny_llama(), tiny_tokenizer(), "l", both[::2], both[1::2], OPTIONS, seed=0, workdir=tmp_path, on_event=quiet
    )
    assert 0.2 < found.balanced_accuracy < 0.8


def test_balanced_accuracy_counts_each_kind_by_itself() -> None:
    class Stub(Discriminator):
        def margins(self, inputs, on_progress=None):  # type: ignore[no-untyped-def]
            return [1.0 if "r" in text else -1.0 for text in inputs]

    stub = Stub(tiny_llama(), tiny_tokenizer(), "x")
    found = judged(stub, ["r", "r", "r", "w"], ["w", "r", "w", "w", "w", "w", "w", "w"])
    assert found == Judged((0.75 + 7 / 8) / 2, 0.75, 1 / 8, 4, found.temperature)


def test_a_discriminator_has_to_be_clearly_better_than_chance() -> None:
    assert better_than_chance(0.7, 30)
    assert not better_than_chance(0.6, 30)
    assert better_than_chance(0.6, 150)
    assert not better_than_chance(0.5, 10_000) and not better_than_chance(1.0, 1)


def test_too_few_inputs_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(InvalidInput, match="2 real and 50 written inputs are too few"):
        train_discriminator(
            model, tiny_tokenizer(), "l", ["a", "b"], ["c"] * 50, OPTIONS, seed=0, workdir=tmp_path, on_event=quiet
        )
    assert not hasattr(model, "peft_config")
