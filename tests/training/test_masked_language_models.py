"""Encoders by a recipe: trained to fill in what is hidden, and judged by how well they do."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from infra.errors import InvalidInput
from infra.settings import get_settings
from tests.tiny_models import save_tiny_masked, tiny_bert, tiny_t5, tiny_tokenizer
from tests.training.tiny_training import same_bits
from training.adapter_files import attach_stored, write_adapter
from training.base_models import LoadedBase, load_base
from training.data.encoding import encode_masked
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.data.rows import Columns, to_examples
from training.evaluation.evaluate import evaluate
from training.objectives.of_model import is_masked_lm, objective_of
from training.options import MethodChoice
from training.recipe import Recipe
from training.trainer import train_recipe

TEXTS = [Example(f"{word * 3} {word}", "") for word in ("ab", "ba", "aab", "bba", "abab", "baba", "abb", "baa")]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    yield load(save_tiny_masked(tmp_path / "base"))
    get_settings.cache_clear()


def load(directory: Path) -> LoadedBase:
    return load_base(f"path:{directory}", cache=get_settings().base_models)


def recipe(name: str = "lora", **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "adapter": "language",
            "base": "path:base",
            "method": MethodChoice(name=name),
            "data": {"file": "texts.jsonl", "columns": {"text": "text"}},
            "training": {"steps": 60, "batch_size": 8, "learning_rate": 1e-2, **training},
        }
    )


def measured(model: Any, base: LoadedBase, examples: list[Example]) -> float:
    form = PromptFormat(base.tokenizer)
    return evaluate(model, base.tokenizer, examples, metric="perplexity", prompt_format=form).value


@pytest.mark.parametrize(("name", "left"), [("small-models-lrl", 0.5), ("lora", 0.5), ("prompt-tuning", 0.9)])
def test_a_recipe_trains_an_encoder_on_what_is_hidden(tmp_path: Path, base: LoadedBase, name: str, left: float) -> None:
    before = measured(base.model, base, TEXTS)
    adapted, outcome = train_recipe(recipe(name), base, TEXTS, [], workdir=tmp_path / "run", on_event=lambda _: None)
    assert outcome.steps == 60
    after = measured(adapted.model, base, TEXTS)
    assert after < before * left
    write_adapter(
        tmp_path / "stored",
        adapted.save,
        method_name=name,
        base_identity=base.identity.sha256,
        base_reference=base.reference,
        recipe=recipe(name).as_stored(),
        metrics={},
    )
    again = load(tmp_path / "base")
    loaded = attach_stored(again.model, tmp_path / "stored", base_identity=again.identity.sha256)
    assert measured(loaded.model, base, TEXTS) == pytest.approx(after, rel=1e-5)


def test_a_training_repeats_to_the_bit_and_the_seed_decides_what_is_hidden(tmp_path: Path, base: LoadedBase) -> None:
    def train(number: int, seed: int) -> dict[str, torch.Tensor]:
        chosen = recipe(steps=3).model_copy(update={"seed": seed})
        fresh = load(tmp_path / "base")
        return train_recipe(chosen, fresh, TEXTS, TEXTS[:2], workdir=tmp_path / str(number), on_event=lambda _: None)[
            0
        ].tensors()

    first = train(1, seed=0)
    assert same_bits(first, train(2, seed=0))
    assert not same_bits(first, train(3, seed=1))


def test_perplexity_is_that_of_the_hidden_tokens(base: LoadedBase) -> None:
    examples = [Example("what is hidden", "of this"), Example("x", ""), Example("a longer text than the others", "")]
    generator = torch.Generator().manual_seed(0)
    encoded = encode_masked([example.text for example in examples], base.tokenizer, max_length=99, generator=generator)
    losses, count = 0.0, 0
    for one in encoded:  # one by one: nothing is padded
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([one.input_ids])).logits[0]
        losses += cross_entropy(logits, torch.tensor(one.labels), reduction="sum").item()
        count += sum(label != -100 for label in one.labels)
    form = PromptFormat(base.tokenizer)
    found = evaluate(base.model, base.tokenizer, examples, metric="perplexity", prompt_format=form)
    assert found.value == pytest.approx(math.exp(losses / count), rel=1e-5)
    assert sum(found.tokens or ()) == count and found.samples == 3
    small = evaluate(base.model, base.tokenizer, examples, metric="perplexity", prompt_format=form, batch_tokens=1)
    assert small.losses == pytest.approx(found.losses, rel=1e-4)


@pytest.mark.parametrize(("metric", "shots"), [("exact_match", 0), ("multiple_choice", 0), ("perplexity", 2)])
def test_an_encoder_is_judged_by_nothing_else(base: LoadedBase, metric: Any, shots: int) -> None:
    with pytest.raises(InvalidInput, match="A masked language model is judged by the perplexity"):
        evaluate(
            base.model,
            base.tokenizer,
            TEXTS,
            metric=metric,
            shots=TEXTS[:shots],
            prompt_format=PromptFormat(base.tokenizer),
        )


def test_the_objective_follows_from_the_head(base: LoadedBase) -> None:
    assert is_masked_lm(base.model)
    for model in (tiny_t5(), tiny_bert()):
        with pytest.raises(InvalidInput, match=f"{type(model).__name__} is neither"):
            objective_of(model)


def test_a_text_that_is_too_long_for_the_encoder_is_named(tmp_path: Path, base: LoadedBase) -> None:
    long = Example("x" * 300, "", place="texts.jsonl line 9")
    with pytest.raises(InvalidInput, match=r"texts\.jsonl line 9 is 300 tokens long"):
        train_recipe(recipe(), base, [*TEXTS, long], [], workdir=tmp_path / "run", on_event=lambda _: None)


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path, base: LoadedBase) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(InvalidInput, match="has no mask token"):
        train_recipe(recipe(), load(tmp_path / "base"), TEXTS, [], workdir=tmp_path / "run", on_event=lambda _: None)


def test_a_column_of_plain_text_becomes_examples() -> None:
    rows = [("a.jsonl line 1", {"text": " one text "}), ("a.jsonl line 2", {"text": "another"})]
    assert [example.text for example in to_examples(rows, Columns(text="text"), "error")] == ["one text", "another"]
    with pytest.raises(InvalidInput, match=r"a\.jsonl line 3: text is empty"):
        to_examples([*rows, ("a.jsonl line 3", {"text": " "})], Columns(text="text"), "error")
    with pytest.raises(ValueError, match="give messages, or text, or prompt"):
        Columns(text="text", prompt="question")
