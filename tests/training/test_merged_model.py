"""Merged models on disk, loaded by transformers alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from infra.errors import Conflict, NotMergeable
from tests.tiny_models import tiny_gemma3, tiny_llama, tiny_t5
from tests.training.methods.backbones import BACKBONES, logits, train
from tests.training.methods.test_contract import CASES
from training.merged_model import write_merged_model
from training.methods.catalog import get_method
from training.methods.contract import Adapted, AttachContext

OPTIONS = {case.method: case.options for case in reversed(CASES)}


def trained(name: str, model: nn.Module, backbone: str = "llama", **options: Any) -> Adapted:
    method = get_method(name)
    context = AttachContext(calibration=BACKBONES[backbone].calibration, total_steps=10)
    adapted = method.attach(model, method.config_type(**OPTIONS[name] | options), context)
    train(adapted, BACKBONES[backbone].batch())
    return adapted


@pytest.mark.parametrize("name", ["lora", "pissa", "paca", "oft", "scaling-sft", "full", "ln-tuning"])
def test_transformers_loads_it_and_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    adapted, batch = trained(name, tiny_llama()), BACKBONES["llama"].batch()
    before = logits(adapted.model, batch)
    write_merged_model(adapted, None, tmp_path / "new" / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model")
    torch.testing.assert_close(logits(loaded, batch), before, atol=2e-5, rtol=1e-4)
    assert torch.equal(logits(adapted.model, batch), before)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_a_head_that_parts_from_the_embeddings_stays_apart(tmp_path: Path) -> None:
    adapted, batch = trained("lora", tiny_gemma3(), targets=("lm_head",)), BACKBONES["gemma3_text"].batch()
    assert adapted.model.config.tie_word_embeddings
    write_merged_model(adapted, None, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded, batch), logits(adapted.model, batch), atol=2e-5, rtol=1e-4)
    assert adapted.model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("prefix-tuning", "cannot be merged"),
        ("compacter", "cannot be merged"),
        ("ssf", r"changes what LlamaForCausalLM does not store: model\.layers\.0\.self_attn\.q_proj\.bias"),
    ],
)
def test_what_no_plain_model_can_hold_is_refused(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(NotMergeable, match=told):
        write_merged_model(trained(name, tiny_llama()), None, tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_an_encoder_decoder_is_written_whole(tmp_path: Path) -> None:
    adapted, batch = trained("lora", tiny_t5(), "t5"), BACKBONES["t5"].batch()
    write_merged_model(adapted, None, tmp_path / "model")
    loaded = type(tiny_t5()).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded, batch), logits(adapted.model, batch), atol=2e-5, rtol=1e-4)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for place, told in ((tmp_path, "is not empty"), (tmp_path / "mine.txt", "is not a directory")):
        with pytest.raises(Conflict, match=told):
            write_merged_model(trained("lora", tiny_llama()), None, place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
