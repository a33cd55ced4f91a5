"""LoRA and its relatives against their equations, written out by hand."""

import json
from math import sqrt
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from infra.errors import CorruptArtifact, InvalidInput
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, train
from training.methods.catalog import get_method
from training.methods.contract import CONFIG_FILE, AttachContext
from training.methods.peft_method import PeftAdapted

BATCH = BACKBONES["llama"].batch()


def trained(method: str, model: nn.Module, **options: object) -> PeftAdapted:
    adapted = get_method(method).attach(model, get_method(method).config_type(**options), AttachContext(seed=3))
    train(adapted, BATCH, steps=3)
    return adapted


def by_hand(adapted: PeftAdapted, bare: nn.Module, scale: float) -> dict[str, Tensor]:
    """The base's weights with the update added, from the stored tensors alone."""
    state, weights = adapted.tensors(), dict(bare.state_dict())
    for key in [key for key in state if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        A, B, W = (
            state[key].double(),
            state[key.replace("lora_A", "lora_B")].double(),
            weights[f"{name}.weight"].double(),
        )
        stored_transposed = type(bare.get_submodule(name)).__name__ == "Conv1D"
        W = (W.T if stored_transposed else W) + scale * (B @ A)  # [m, n]
        magnitude = state.get(key.replace("lora_A.weight", "lora_magnitude_vector"))
        if magnitude is not None:
            W = magnitude.double()[:, None] * W / W.pow(2).sum(dim=1, keepdim=True).sqrt()
        weights[f"{name}.weight"] = (W.T if stored_transposed else W).float()
    return weights


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])
@pytest.mark.parametrize(
    ("method", "options", "scale"),
    [
        ("lora", {"rank": 4, "alpha": 12}, 3.0),
        ("lora", {"rank": 4}, 1.0),
        ("rslora", {"rank": 4, "alpha": 12}, 12 / sqrt(4)),
        ("dora", {"rank": 4, "alpha": 12, "dropout": 0.0}, 3.0),
        ("dora", {"rank": 4, "dropout": 0.0}, 2.0),
    ],
)
def test_the_forward_pass_is_the_papers_equation(build: type, method: str, options: dict, scale: float) -> None:
    adapted, bare = trained(method, build(), **options), build()
    before = logits(bare, BATCH)
    bare.load_state_dict(by_hand(adapted, build(), scale))
    assert_close(logits(adapted.model, BATCH), logits(bare, BATCH), atol=2e-5, rtol=1e-4)
    assert (logits(bare, BATCH) - before).abs().max() > 1e-2


def test_all_linear_is_every_linear_layer_but_the_output_embeddings() -> None:
    adapted = trained("lora", tiny_gpt2(), rank=2)
    sites = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in adapted.tensors()}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sites == {f"transformer.h.{layer}.{part}" for layer in (0, 1) for part in parts}
    assert adapted.adapter_config()["target_modules"] == ["c_attn", "c_fc", "c_proj"]


def test_merging_into_a_tied_head_leaves_the_input_embeddings() -> None:
    adapted = trained("lora", tiny_gpt2(), rank=2, targets=("lm_head",))
    merged = adapted.merge()
    assert_close(logits(merged, BATCH), logits(adapted.model, BATCH), atol=2e-5, rtol=1e-4)
    assert torch.equal(merged.get_input_embeddings().weight, tiny_gpt2().get_input_embeddings().weight)
    assert merged.config.tie_word_embeddings is False


def test_dropout_is_off_in_evaluation() -> None:
    adapted = trained("lora", tiny_llama(), rank=2, dropout=0.9)
    assert torch.equal(logits(adapted.model, BATCH), logits(adapted.model, BATCH))
    adapted.model.train()
    assert not torch.equal(logits(adapted.model, BATCH), logits(adapted.model, BATCH))


@pytest.mark.parametrize("name", ["", "a.b", "weight", "0", "lora", "keys", "layers"])
def test_a_name_that_would_be_confused_with_the_models_own_is_refused(name: str) -> None:
    model = tiny_llama()
    with pytest.raises(InvalidInput, match="cannot name an adapter"):
        get_method("lora").attach(model, get_method("lora").config_type(), AttachContext(), name)
    assert not hasattr(model, "peft_config")


def test_the_injected_model_without_its_wrapper_is_refused() -> None:
    model = tiny_llama()
    trained("lora", model, rank=2)
    with pytest.raises(InvalidInput, match="carries adapters already"):
        get_method("lora").attach(model, get_method("lora").config_type(), AttachContext(), "second")
    adapted_layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert adapted_layers  # and the first is still there


def test_another_peft_type_cannot_join() -> None:
    adapted = trained("lora", tiny_llama(), rank=2)
    with pytest.raises(InvalidInput, match="carries LORA adapters"):
        get_method("ia3").attach(adapted.model, get_method("ia3").config_type(), AttachContext(), "second")
    assert adapted.model.active_adapter == "default"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tiny_gpt2, r"peft cannot put it on LlamaForCausalLM .*c_attn"),
        (lambda: tiny_llama(layers=1), r"do not fit adapter 'third': base_model.model.model.layers.1.*is missing"),
    ],
    ids=["other layers", "fewer layers"],
)
def test_the_active_adapter_stays_active_when_another_fails_to_load(tmp_path: Path, build: type, message: str) -> None:
    lora = get_method("lora")
    trained("lora", build(), rank=2).save(tmp_path)
    first = trained("lora", tiny_llama(), rank=2)
    second = lora.attach(first.model, lora.config_type(rank=3), AttachContext(), "second")
    trainable = second.trainable().keys()
    with pytest.raises(CorruptArtifact, match=message):
        lora.load(second.model, tmp_path, "third")
    assert second.model.active_adapter == "second" and set(second.model.peft_config) == {"default", "second"}
    assert second.trainable().keys() == trainable
    assert not any("third" in name for name in second.model.state_dict())


def test_a_nan_is_not_merged() -> None:
    adapted = trained("lora", tiny_llama(), rank=2)
    adapted.restore({name: torch.full_like(tensor, torch.nan) for name, tensor in adapted.tensors().items()})
    with pytest.raises(Exception, match="cannot be merged: NaNs"):
        adapted.merge()


def test_a_lora_of_peft_with_patterns_and_embeddings_loads(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], rank_pattern={"layers.0.self_attn.q_proj": 5}
    )
    stock = peft.get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    stock.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = get_method("lora").load(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded.model, BATCH), logits(stock, BATCH))


@pytest.mark.parametrize("change", [{"init_lora_weights": "pissa"}, {"bias": "all"}])
def test_a_lora_that_changes_the_base_itself_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    trained("lora", tiny_llama(), rank=2).save(tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidInput, match="changes the base model itself"):
        get_method("lora").load(tiny_llama(), tmp_path)


def test_each_relative_loads_its_own_kind_only(tmp_path: Path) -> None:
    for method in ("lora", "rslora", "dora"):
        trained(method, tiny_llama(), rank=2).save(tmp_path / method)
        for other in {"lora", "rslora", "dora"} - {method}:
            with pytest.raises(CorruptArtifact, match=f"not '{other}'"):
                get_method(other).load(tiny_llama(), tmp_path / method)
