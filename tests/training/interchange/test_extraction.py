"""A LoRA out of a whole model, and what cannot come out of it."""

import copy

import pytest
import torch
from torch import nn

from infra.errors import BaseModelMismatch, InvalidInput
from tests.tiny_models import tiny_gemma3, tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits
from training.interchange.extraction import extracted
from training.interchange.lora_layers import LoraLayer, fold
from training.interchange.truncation import Keep

BATCH = BACKBONES["llama"].batch()


def tuned(base: nn.Module, *, everything: bool = False) -> nn.Module:
    """The base with other linear weights, by an update of rank 3; or all its tensors, at full rank."""
    generator, model = torch.Generator().manual_seed(3), copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if everything:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 50)
            elif "attn" in name and parameter.ndim == 2:
                m, n = parameter.shape
                parameter.add_(torch.randn(m, 3, generator=generator) @ torch.randn(3, n, generator=generator) / 20)
    return model


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_gemma3], ids=lambda make: make.__name__)
@pytest.mark.parametrize("keep", [Keep(rank=3), Keep(energy=1 - 1e-6)], ids=["rank", "energy"])
def test_an_update_of_low_rank_comes_out_whole(make: type, keep: Keep) -> None:
    base, model = make(), tuned(make())
    layers, loss = extracted(base, model, keep)
    assert loss.total < 2e-3 and not loss.left_out
    assert {layer.rank for layer in layers.values()} == {3}
    assert all("attn" in place for place in layers)
    fold(layers, base)
    torch.testing.assert_close(logits(base, BATCH), logits(model, BATCH), atol=2e-4, rtol=1e-3)


def test_norms_and_embeddings_that_changed_are_left_out_and_listed() -> None:
    layers, loss = extracted(tiny_llama(), tuned(tiny_llama(), everything=True), Keep(rank=4))
    assert set(loss.left_out) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(
            f"model.layers.{n}.{norm}.weight"
            for n in (0, 1)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ),
    }
    assert all(0 < change < 1 for change in loss.left_out.values())
    assert "lm_head" in layers and 0 < loss.total < 1


def test_a_head_that_is_tied_goes_with_the_embeddings() -> None:
    layers, loss = extracted(tiny_gemma3(), tuned(tiny_gemma3(), everything=True), Keep(rank=4))
    assert "lm_head" not in layers
    assert "model.embed_tokens.weight" in loss.left_out


def test_another_model_is_refused() -> None:
    with pytest.raises(BaseModelMismatch, match="GPT2LMHeadModel, its base a LlamaForCausalLM"):
        extracted(tiny_llama(), tiny_gpt2(), Keep(rank=2))
    with pytest.raises(
        BaseModelMismatch, match=r"model.embed_tokens.weight is \(259, 32\) in the base and \(261, 32\)"
    ):
        extracted(tiny_llama(), tiny_llama(vocab_size=261), Keep(rank=2))
    with pytest.raises(BaseModelMismatch, match="missing"):
        extracted(tiny_llama(layers=2), tiny_llama(layers=1), Keep(rank=2))
    with pytest.raises(InvalidInput, match="nothing to extract"):
        extracted(tiny_llama(), tiny_llama(), Keep(rank=2))


def test_layers_are_told_apart_from_those_that_did_not_change() -> None:
    base, model = tiny_llama(), tiny_llama()
    fold({"model.layers.1.mlp.up_proj": LoraLayer(torch.ones(1, 32), torch.ones(48, 1))}, model)
    assert list(extracted(base, model, Keep(rank=1))[0]) == ["model.layers.1.mlp.up_proj"]


def test_a_model_that_was_stored_in_16_bits_has_changed_only_where_it_was_trained() -> None:
    rounded = tuned(tiny_llama()).to(torch.bfloat16).float()
    layers, loss = extracted(tiny_llama(), rounded, Keep(rank=3), torch.bfloat16)
    assert all("attn" in place for place in layers) and not loss.left_out
    _, seeming = extracted(tiny_llama(), rounded, Keep(rank=3))
    assert seeming.left_out
