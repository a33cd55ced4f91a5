"""Prompt and prefix tuning against a base model that is fed the same by hand, with generation and odd calls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DynamicCache

from infra.errors import InvalidInput
from tests.tiny_models import (
    VOCABULARY,
    tiny_bert,
    tiny_gemma3,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_tokenizer,
    tiny_vit,
)
from tests.training.methods.backbones import BACKBONES, logits, train
from training.methods.catalog import get_method
from training.methods.contract import AttachContext, stored_tensors
from training.methods.soft_prompt import SoftPromptAdapted

DECODERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3_text": tiny_gemma3}
BATCH = BACKBONES["llama"].batch()
IDS, MASK = BATCH["input_ids"], BATCH["attention_mask"]
P = 3


def attach(method: str, model: nn.Module, context: AttachContext | None = None, **options: Any) -> SoftPromptAdapted:
    config = get_method(method).config_type(**{"virtual_tokens": P} | options)
    return get_method(method).attach(model, config, context or AttachContext())


@pytest.mark.parametrize("backbone", DECODERS)
def test_prompt_tuning_is_a_longer_input(backbone: str) -> None:
    adapted, bare = attach("prompt-tuning", DECODERS[backbone]()), DECODERS[backbone]()
    prompt = adapted.tensors()["prompt_embeddings"].expand(len(IDS), -1, -1)
    embeddings = torch.cat([prompt, bare.get_input_embeddings()(IDS)], dim=1)
    mask = torch.cat([MASK.new_ones(len(IDS), P), MASK], dim=1)
    expected = logits(bare, {"inputs_embeds": embeddings, "attention_mask": mask})[:, P:]
    assert_close(logits(adapted.model, BATCH), expected, atol=1e-6, rtol=1e-6)


def test_an_encoder_decoder_is_prompted_at_its_encoder() -> None:
    adapted, bare = attach("prompt-tuning", tiny_t5()), tiny_t5()
    batch = BACKBONES["t5"].batch()
    prompt = adapted.tensors()["prompt_embeddings"].expand(len(IDS), -1, -1)
    by_hand = {
        "inputs_embeds": torch.cat([prompt, bare.shared(IDS)], dim=1),
        "attention_mask": torch.cat([MASK.new_ones(len(IDS), P), MASK], dim=1),
        "decoder_input_ids": batch["decoder_input_ids"],
    }
    assert_close(logits(adapted.model, batch), logits(bare, by_hand), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("backbone", DECODERS)
def test_prefix_tuning_is_a_cache_that_is_already_there(backbone: str, projection: bool) -> None:
    adapted, bare = attach("prefix-tuning", DECODERS[backbone](), projection=projection), DECODERS[backbone]()
    train(adapted, BATCH)
    tensors = adapted.tensors()
    prefix = tensors["prompt_embeddings"]  # [p, 2Ld]: key and value of layer 0, key and value of layer 1, …
    if projection:
        hidden = tensors["projection.embedding.weight"] @ tensors["projection.transform.0.weight"].T
        hidden = torch.tanh(hidden + tensors["projection.transform.0.bias"])
        made = hidden @ tensors["projection.transform.2.weight"].T + tensors["projection.transform.2.bias"]
        assert_close(prefix, made, atol=1e-6, rtol=1e-6)
    heads, size = {"llama": (2, 8), "gpt2": (4, 8), "gemma3_text": (1, 16)}[backbone]
    cache = DynamicCache(config=bare.config)
    for layer in range(2):
        key, value = (
            prefix[:, (2 * layer + which) * heads * size :][:, : heads * size]
            .reshape(1, P, heads, size)
            .transpose(1, 2)
            .repeat(len(IDS), 1, 1, 1)
            for which in (0, 1)
        )
        cache.update(key, value, layer)
    mask = torch.cat([MASK.new_ones(len(IDS), P), MASK], dim=1)
    expected = logits(bare, {"input_ids": IDS, "attention_mask": mask, "past_key_values": cache})
    assert_close(logits(adapted.model, BATCH), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize("backbone", [*DECODERS, "t5"])
def test_generation_follows_the_logits(method: str, backbone: str) -> None:
    model = BACKBONES[backbone].build()
    model.generation_config.eos_token_id = None
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    bare = model.generate(**options)
    adapted = attach(method, model)
    train(adapted, BACKBONES[backbone].batch(), steps=2, rate=0.1)
    made = adapted.model.generate(**options)
    assert torch.equal(made, _greedily(adapted.model, backbone, 4))
    with adapted.disabled():
        assert torch.equal(adapted.model.generate(**options), bare)


def _greedily(model: nn.Module, backbone: str, steps: int) -> Tensor:
    is_pair = backbone == "t5"
    made = torch.zeros(len(IDS), 1, dtype=torch.long) if is_pair else IDS
    for _ in range(steps):
        batch = {"input_ids": IDS, "decoder_input_ids": made} if is_pair else {"input_ids": made}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        made = torch.cat([made, logits(model, batch)[:, -1:].argmax(-1)], dim=1)
    return made


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_logits_to_keep_counts_the_callers_positions(method: str) -> None:
    adapted = attach(method, tiny_llama())
    whole = logits(adapted.model, BATCH)
    assert_close(logits(adapted.model, BATCH | {"logits_to_keep": 2}), whole[:, -2:])
    keep = torch.tensor([1, 4])
    assert_close(logits(adapted.model, BATCH | {"logits_to_keep": keep}), whole[:, keep])


def test_labels_give_the_loss_of_the_callers_positions() -> None:
    adapted = attach("prompt-tuning", tiny_llama())
    whole = logits(adapted.model, BATCH)
    expected = torch.nn.functional.cross_entropy(whole[:, :-1].reshape(-1, VOCABULARY), IDS[:, 1:].reshape(-1))
    labels = IDS.clone()
    labels[:, 0] = -100  # the base alone has nothing to predict its first token from; a prompt has
    with torch.no_grad():
        assert_close(adapted.model(**BATCH, labels=labels).loss, expected)


def test_hidden_states_have_the_bases_shapes() -> None:
    adapted = attach("prompt-tuning", tiny_llama())
    with torch.no_grad():
        outputs = adapted.model(**BATCH, output_hidden_states=True)
    assert all(hidden.shape[:2] == IDS.shape for hidden in outputs.hidden_states)


def test_packed_examples_are_refused_by_prompt_tuning() -> None:
    adapted = attach("prompt-tuning", tiny_llama())
    with pytest.raises(InvalidInput, match="position ids"):
        adapted.model(**BATCH, position_ids=torch.arange(7).expand(2, -1))
    with adapted.disabled():
        adapted.model(**BATCH, position_ids=torch.arange(7).expand(2, -1))


def test_a_prompt_starts_as_its_options_say() -> None:
    words = tiny_gemma3().get_input_embeddings()
    everything = words(torch.arange(VOCABULARY)).detach()
    sampled = attach("prompt-tuning", tiny_gemma3()).tensors()["prompt_embeddings"]
    assert all((everything == row).all(dim=1).any() for row in sampled)
    noise = attach("prompt-tuning", tiny_gemma3(), init="random").tensors()["prompt_embeddings"]
    assert noise.abs().max() <= 0.5 and noise.std() > 0.2
    tokenizer = tiny_tokenizer()
    context = AttachContext(processor=tokenizer)
    text = attach("prompt-tuning", tiny_gemma3(), context, init="text", init_text="ab").tensors()["prompt_embeddings"]
    assert torch.equal(text, everything[tokenizer("aba")["input_ids"]])
    with pytest.raises(InvalidInput, match="tokenizer"):
        attach("prompt-tuning", tiny_gemma3(), init="text", init_text="ab")
    for wrong in ({"init": "text"}, {"init_text": "ab"}):
        with pytest.raises(ValueError, match="init_text"):
            get_method("prompt-tuning").config_type(**wrong)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_a_prompt_longer_than_the_models_positions_is_refused(method: str) -> None:
    with pytest.raises(InvalidInput, match="virtual_tokens 256 leaves no room in the 256 positions of Llama"):
        attach(method, tiny_llama(), virtual_tokens=256)


def test_a_projected_prefix_of_peft_goes_on_as_a_plain_one(tmp_path: Path) -> None:
    adapted = attach("prefix-tuning", tiny_llama(), projection_size=8)
    adapted.model.save_pretrained(tmp_path)  # peft throws the MLP away
    assert stored_tensors(tmp_path).keys() == {"prompt_embeddings"}
    loaded = get_method("prefix-tuning").load(tiny_llama(), tmp_path)
    assert_close(logits(loaded.model, BATCH), logits(adapted.model, BATCH), atol=1e-6, rtol=1e-6)
    assert sum(parameter.numel() for parameter in loaded.trainable().values()) == 2 * P * 2 * 16


def test_a_model_without_the_right_inputs_is_refused() -> None:
    with pytest.raises(InvalidInput, match="reads no tokens"):
        attach("prompt-tuning", tiny_vit())
    with pytest.raises(InvalidInput, match="keeps no keys and values"):
        attach("prefix-tuning", tiny_bert())
