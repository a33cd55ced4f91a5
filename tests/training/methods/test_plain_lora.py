"""Adapters of low rank, written as a plain LoRA, in stock peft's hands."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from infra.errors import Conflict, InvalidInput
from tests.tiny_models import tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, train
from tests.training.methods.test_contract import CASES
from training.methods.catalog import get_method
from training.methods.contract import Adapted, AttachContext
from training.methods.plain_lora import write_plain_lora

OPTIONS = {case.method: case.options for case in reversed(CASES)}
BATCH = BACKBONES["llama"].batch()


def trained(name: str, backbone: str = "llama", **options: object) -> Adapted:
    method = get_method(name)
    context = AttachContext(calibration=BACKBONES[backbone].calibration, total_steps=10)
    adapted = method.attach(BACKBONES[backbone].build(), method.config_type(**OPTIONS[name] | options), context)
    train(adapted, BATCH)
    return adapted


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["s2ft", "paca", "lora-xs", "lora-sb", "loldu", "hydra"])
def test_stock_peft_loads_it_and_gives_the_same_logits(tmp_path: Path, name: str, backbone: str) -> None:
    adapted = trained(name, backbone)
    bare: nn.Module = {"llama": tiny_llama, "gpt2": tiny_gpt2}[backbone]()
    if name == "hydra" and backbone == "gpt2":  # its layers have biases, which its sequential branch changes, were they
        assert not any(b.any() for n, b in bare.named_parameters() if n.endswith("c_proj.bias"))  # not zero here
    write_plain_lora(adapted, tmp_path / "lora")
    stock = PeftModel.from_pretrained(bare, tmp_path / "lora")
    torch.testing.assert_close(logits(stock, BATCH), logits(adapted.model, BATCH), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("scaling-sft", {}, "cannot write as a plain LoRA"),
        ("compacter", {}, "cannot write as a plain LoRA"),
        ("full", {}, "cannot write as a plain LoRA"),
        ("pissa", {}, "is stored as a LoRA already"),
        ("lora", {}, "is stored as a LoRA already"),
        ("hydra", {"bias": True}, "also changes the bias"),
    ],
)
def test_what_no_lora_can_say_is_refused(tmp_path: Path, name: str, options: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        write_plain_lora(trained(name, **options), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Conflict, match="is not empty"):
        write_plain_lora(trained("paca"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
