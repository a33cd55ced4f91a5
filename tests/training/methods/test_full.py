"""Full fine-tuning: switching, storing and moving all of a model's tensors."""

from pathlib import Path

import pytest
import torch
from torch import nn

from infra.errors import InvalidInput
from tests.tiny_models import tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, train
from training.methods.catalog import get_method
from training.methods.contract import AttachContext, stored_tensors
from training.methods.full import METHOD, FullConfig

BATCH = BACKBONES["llama"].batch()


def test_what_is_stored_loads_into_a_plain_model(tmp_path: Path) -> None:
    adapted = METHOD.attach(tiny_gpt2(), FullConfig(), AttachContext())
    train(adapted, BATCH)
    adapted.save(tmp_path)
    plain = tiny_gpt2()
    missing = plain.load_state_dict(stored_tensors(tmp_path), strict=False).missing_keys
    assert missing == ["lm_head.weight"]  # tied: stored once
    assert torch.equal(logits(plain, BATCH), logits(adapted.model, BATCH))


def test_running_statistics_belong_to_the_adapter() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    model = build()
    first = METHOD.attach(model, FullConfig(), AttachContext(), "first")
    model.train()(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    assert first.tensors()["1.running_mean"].abs().sum() > 0
    assert first.tensors()["1.num_batches_tracked"] == 1
    with first.disabled():
        assert model[1].running_mean.abs().sum() == 0
    METHOD.attach(model, FullConfig(), AttachContext(), "second")
    assert model[1].running_mean.abs().sum() == 0


def test_switching_survives_a_change_of_dtype() -> None:
    model = tiny_llama()
    first = METHOD.attach(model, FullConfig(), AttachContext(), "first")
    train(first, BATCH)
    second = METHOD.attach(model, FullConfig(), AttachContext(), "second")
    model.to(torch.bfloat16)
    train(second, BATCH)
    before = logits(model, BATCH)
    first.activate()
    assert not torch.equal(logits(model, BATCH), before)
    second.activate()
    assert torch.equal(logits(model, BATCH), before)
    first.activate()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(tensor.dtype == torch.bfloat16 for tensor in first.tensors().values() if tensor.is_floating_point())


def test_gradients_do_not_follow_to_another_adapter() -> None:
    model = tiny_llama()
    first = METHOD.attach(model, FullConfig(), AttachContext(), "first")
    METHOD.attach(model, FullConfig(), AttachContext(), "second")
    model(**BATCH).logits.sum().backward()
    first.activate()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_with_peft_layers_is_refused() -> None:
    adapted = get_method("lora").attach(tiny_llama(), get_method("lora").config_type(), AttachContext())
    for model in (adapted.model, adapted.model.get_base_model()):
        with pytest.raises(InvalidInput, match="carries peft adapters"):
            METHOD.attach(model, FullConfig(), AttachContext())
