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
from training.methods.plain_lora import decomposed, write_plain_lora

OPTIONS = {case.method: case.options for case in reversed(CASES)}
BATCH = BACKBONES["llama"].batch()


def trained(name: str, backbone: str = "llama", **options: object) -> Adapted:
    method = get_method(name)
    context = AttachContext(calibration=BACKBONES[backbone].calibration, total_steps=10)
    adapted = method.attach(BACKBONES[backbone].build(), method.config_type(**OPTIONS[name] | options), context)
    train(adapted, BATCH)
    return adapted


OF_LOW_RANK = ["s2ft", "paca", "lora-xs", "lora-sb", "loldu", "vera", "vb-lora", "gralora", "adalora"]
ON_LLAMA = ["loha", "lokr", "hra", "miss", "delora", "hydra"]  # on GPT-2 none, or, hydra, with a change of biases


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        *((name, backbone) for name in OF_LOW_RANK for backbone in ("llama", "gpt2")),
        *((name, "llama") for name in ON_LLAMA),
    ],
)
def test_stock_peft_loads_it_and_gives_the_same_logits(tmp_path: Path, name: str, backbone: str) -> None:
    adapted = trained(name, backbone)
    bare: nn.Module = {"llama": tiny_llama, "gpt2": tiny_gpt2}[backbone]()
    untouched = logits(bare, BATCH)
    write_plain_lora(adapted, tmp_path / "lora")
    stock = PeftModel.from_pretrained(bare, tmp_path / "lora")
    torch.testing.assert_close(logits(stock, BATCH), logits(adapted.model, BATCH), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits(stock, BATCH), untouched, atol=1e-3)


@pytest.mark.parametrize("name", ["lora", "rslora", "pissa", "corda", "eva", "lora-ga", "ist"])
def test_what_is_stored_as_a_lora_goes_out_as_it_is(tmp_path: Path, name: str) -> None:
    adapted = trained(name)
    write_plain_lora(adapted, tmp_path / "lora")
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(stock, BATCH), logits(adapted.model, BATCH), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("scaling-sft", {}, "its method's update is not one of low rank"),
        ("compacter", {}, "its method's update is not one of low rank"),
        ("full", {}, "it trains the base's own weights"),
        ("dora", {}, "its update of model.layers.0.self_attn.q_proj is not of low rank"),
        ("oft", {}, "its update of model.layers.0.self_attn.q_proj is not of low rank"),
        ("ln-tuning", {}, "it changes model.layers.0.input_layernorm, which is no linear layer"),
        ("prompt-tuning", {}, "it changes no weight of a linear layer"),
        ("hydra", {"bias": True}, "it also changes the bias"),
    ],
)
def test_what_no_lora_can_say_is_refused(tmp_path: Path, name: str, options: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        write_plain_lora(trained(name, **options), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("rank", [1, 7, 40, 70])
def test_a_product_is_decomposed_at_its_own_rank(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    m, n = 150, 200
    update = torch.randn(m, rank, generator=generator).double() @ torch.randn(rank, n, generator=generator).double()
    pair = decomposed(update)
    assert pair is not None
    A, B = pair
    assert A.shape == (rank, n)
    assert B.shape == (m, rank)
    torch.testing.assert_close(B @ A, update, atol=1e-4, rtol=0)


def test_a_rank_that_saves_nothing_is_not_decomposed() -> None:
    assert decomposed(torch.eye(20, 30, dtype=torch.float64)) is None  # 20·(20 + 30) > 20·30
    assert decomposed(torch.randn(150, 200, generator=torch.Generator().manual_seed(0))) is None


def test_no_change_has_rank_zero() -> None:
    pair = decomposed(torch.zeros(6, 8))
    assert pair is not None
    assert [tuple(factor.shape) for factor in pair] == [(0, 8), (6, 0)]


def test_another_adapter_on_the_model_stays_out_of_it(tmp_path: Path) -> None:
    adapted = trained("loha")
    method = get_method("loha")
    other = method.attach(adapted.model, method.config_type(**OPTIONS["loha"]), AttachContext(seed=5), "other")
    train(other, BATCH)
    adapted.activate()
    write_plain_lora(adapted, tmp_path / "lora")
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(stock, BATCH), logits(adapted.model, BATCH), atol=2e-5, rtol=1e-4)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for place, told in ((tmp_path, "is not empty"), (tmp_path / "mine.txt", "is not a directory")):
        with pytest.raises(Conflict, match=told):
            write_plain_lora(trained("paca"), place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_branch_behind_a_layer_with_a_bias_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"it also changes the bias of transformer\.h\.0\.mlp\.c_proj"):
        write_plain_lora(trained("hydra", "gpt2"), tmp_path / "lora")
