"""Plain LoRAs in peft's layout, read as peft reads them."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from peft import PeftModel, get_peft_model

from infra.errors import BaseModelMismatch, CorruptArtifact, InvalidInput
from tests.tiny_models import tiny_gemma3, tiny_gpt2, tiny_llama
from tests.training.interchange.strategies import assert_same, bare_model, loras
from tests.training.methods.backbones import BACKBONES, logits
from training.interchange.as_lora import write_peft
from training.interchange.lora_layers import LoraLayer, LoraLayers, fold, layers_from_peft, layers_to_peft

BATCH = BACKBONES["llama"].batch()


@settings(max_examples=40)
@given(loras())
def test_what_is_written_is_read_again(layers: LoraLayers) -> None:
    config, tensors = layers_to_peft(layers, bare_model("llama"))
    assert_same(layers_from_peft(json.loads(json.dumps(config)), tensors), layers)


@settings(max_examples=4)
@given(loras(), loras("gpt2"))
def test_stock_peft_adds_exactly_these_updates(
    tmp_path_factory: pytest.TempPathFactory, on_llama: LoraLayers, on_gpt2: LoraLayers
) -> None:
    for layers, make in ((on_llama, tiny_llama), (on_gpt2, tiny_gpt2)):
        even = {place: LoraLayer(layer.A.float(), layer.B.float() / 10, layer.scale) for place, layer in layers.items()}
        directory = tmp_path_factory.mktemp("peft") / "lora"
        write_peft(even, make(), directory)
        stock, folded = PeftModel.from_pretrained(make(), directory), make()
        fold(even, folded)
        merged = stock.merge_and_unload()
        for place in layers:  # GPT-2's embeddings are left out: peft changes them with a head that is tied to them
            name = f"{place}.weight"
            torch.testing.assert_close(folded.get_parameter(name), merged.get_parameter(name), atol=1e-4, rtol=1e-4)


def trained_by_peft(**options: Any) -> tuple[PeftModel, dict[str, Any], dict[str, torch.Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), peft.LoraConfig(init_lora_weights=False, **options)).eval()
    config = {key: sorted(v) if isinstance(v, set) else v for key, v in model.peft_config["default"].to_dict().items()}
    return model, config, peft.get_peft_model_state_dict(model, save_embedding_layers=False)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
        {"r": 4, "rank_pattern": {r"model\.layers\.\d\.self_attn\.v_proj": 2}, "use_rslora": True},
    ],
    ids=str,
)
def test_ranks_and_scales_are_what_peft_makes_of_a_config(options: dict[str, Any]) -> None:
    model, config, tensors = trained_by_peft(target_modules=["q_proj", "v_proj"], **options)
    folded = tiny_llama()
    fold(layers_from_peft(config, tensors), folded)
    torch.testing.assert_close(logits(folded, BATCH), logits(model, BATCH), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_dora": True}, "it is a DoRA"),
        ({"bias": "lora_only"}, "it trains biases"),
        ({"modules_to_save": ["lm_head"]}, "modules whole"),
        ({"trainable_token_indices": [3]}, "single tokens"),
        ({"lora_bias": True}, "it trains biases"),
    ],
)
def test_what_is_more_than_two_factors_is_refused(options: dict[str, Any], told: str) -> None:
    _, config, tensors = trained_by_peft(target_modules=["q_proj"], **options)
    with pytest.raises(InvalidInput, match=told):
        layers_from_peft(config, tensors)


def test_damaged_files_are_refused() -> None:
    layers = {"model.layers.0.self_attn.q_proj": LoraLayer(torch.ones(2, 32), torch.ones(32, 2))}
    config, tensors = layers_to_peft(layers, bare_model("llama"))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

    def refused(told: str, kind: type[Exception] = CorruptArtifact, **changed: Any) -> None:
        given = {name: tensor for name, tensor in (tensors | changed.pop("tensors", {})).items() if tensor is not None}
        with pytest.raises(kind, match=told):
            layers_from_peft(config | changed, given)

    refused("one factor of the two", tensors={key: None})
    refused("no LoRA's", tensors={key: torch.ones(32, 3)})
    refused("dtype", tensors={key: torch.ones(32, 2, dtype=torch.int8)})
    refused("as a convolution", InvalidInput, tensors={key: torch.ones(32, 2, 1, 1)})
    refused("the config says 5", r=5)
    refused("lora_alpha: Input should be a finite number", InvalidInput, lora_alpha=float("nan"))
    refused("lora_alpha: give a number", InvalidInput, lora_alpha="4")
    refused("use_rslora: give true or false", InvalidInput, use_rslora="x")
    refused("no pattern", rank_pattern={"(": 3})
    refused("not a LoRA", InvalidInput, peft_type="IA3")
    refused("stores extra", InvalidInput, tensors={"extra": torch.ones(2)})
    with pytest.raises(InvalidInput, match="no factor"):
        layers_from_peft(config, {})


def test_a_layer_that_the_base_lacks_is_named(tmp_path: Path) -> None:
    layer = LoraLayer(torch.ones(2, 32), torch.ones(32, 2))
    with pytest.raises(BaseModelMismatch, match=r"no linear layer model\.layers\.7"):
        write_peft({"model.layers.7.self_attn.q_proj": layer}, bare_model("llama"), tmp_path / "lora")
    with pytest.raises(BaseModelMismatch, match=r"k_proj of LlamaForCausalLM is 16 × 32; the adapter's is 32 × 32"):
        write_peft({"model.layers.0.self_attn.k_proj": layer}, bare_model("llama"), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@settings(max_examples=40)
@given(loras())
def test_padding_and_another_scale_leave_the_update_what_it_was(layers: LoraLayers) -> None:
    for layer in layers.values():
        other = layer.rescaled(1.7).padded(layer.rank + 3)
        assert other.rank == layer.rank + 3
        torch.testing.assert_close(other.update(), layer.update(), atol=1e-5, rtol=1e-6)
        twice = layer.rescaled(layer.scale / 2)
        assert torch.equal(twice.update(), layer.update()) and twice.B.dtype == layer.B.dtype


def test_folding_into_a_tied_head_leaves_the_embeddings() -> None:
    model = tiny_gemma3()
    before = copy.deepcopy(model.model.embed_tokens.weight)
    fold({"lm_head": LoraLayer(torch.ones(1, 32), torch.ones(259, 1))}, model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    torch.testing.assert_close(model.lm_head.weight, before + 1)
