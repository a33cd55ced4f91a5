"""LN-tuning: which norms train, and in what precision."""

import pytest
import torch
from torch import nn

from infra.errors import InvalidInput
from tests.tiny_models import tiny_bert, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, train
from training.methods.contract import AttachContext
from training.methods.ln_tuning import METHOD


def test_exactly_the_norms_train_and_replacing_them_is_the_adapter() -> None:
    batch, bare = BACKBONES["llama"].batch(), tiny_llama()
    adapted = METHOD.attach(tiny_llama(), METHOD.config_type(), AttachContext())
    train(adapted, batch)
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in adapted.tensors().items()}
    norms = [f"model.layers.{i}.{kind}_layernorm" for i in (0, 1) for kind in ("input", "post_attention")]
    assert sorted(state) == sorted(f"{name}.ln_tuning_layers.weight" for name in [*norms, "model.norm"])
    with torch.no_grad():
        for name, tensor in state.items():
            bare.get_submodule(name.removesuffix(".ln_tuning_layers.weight")).weight.copy_(tensor)
    assert torch.equal(logits(bare, batch), logits(adapted.model, batch))


def test_small_steps_are_not_lost_beside_a_weight_of_bfloat16() -> None:
    adapted = METHOD.attach(tiny_llama().bfloat16(), METHOD.config_type(), AttachContext())
    before = {name: tensor.clone() for name, tensor in adapted.tensors().items()}
    train(adapted, BACKBONES["llama"].batch(), steps=1, rate=1e-4)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in adapted.tensors().items())
    merged = adapted.merge()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())


def test_norms_are_left_out_by_name_and_their_absence_is_told() -> None:
    config = METHOD.config_type(exclude=("embeddings.LayerNorm",))
    assert METHOD.count(tiny_bert(), METHOD.config_type()) - METHOD.count(tiny_bert(), config) == 64
    with pytest.raises(InvalidInput, match="has no norm"):
        METHOD.attach(nn.Sequential(nn.Linear(2, 2)), METHOD.config_type(), AttachContext())
