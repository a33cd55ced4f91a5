"""Merges that are no merges, caught before anything is left behind."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from infra.errors import NotMergeable
from tests.tiny_models import tiny_gemma3, tiny_llama, tiny_tokenizer, tiny_vit
from tests.training.methods.backbones import BACKBONES, logits, train
from training.merged_model import stored_dtype, write_merged_model
from training.methods.catalog import get_method
from training.methods.contract import Adapted, AttachContext
from training.methods.peft_method import PeftAdapted

BATCH = BACKBONES["llama"].batch()


def trained(model: nn.Module, name: str = "lora", batch: Any = BATCH, **options: Any) -> Adapted:
    method = get_method(name)
    adapted = method.attach(model, method.config_type(**options), AttachContext(total_steps=10))
    train(adapted, batch)
    return adapted


def test_a_merge_tells_what_was_proven(tmp_path: Path) -> None:
    proof = write_merged_model(trained(tiny_llama()), tiny_tokenizer(), tmp_path / "model")
    assert (proof.changed, proof.untouched, proof.dtype) == (14, (), "float32")
    assert proof.difference is not None
    assert proof.difference.largest < 1e-4 and proof.difference.top1 == 1
    assert proof.base_bytes <= proof.size_bytes < 1.1 * proof.base_bytes


@pytest.mark.parametrize(
    ("name", "options"), [("pissa", {"rank": 4}), ("full", {}), ("dora", {}), ("s2ft", {}), ("ln-tuning", {})]
)
def test_every_kind_of_method_proves_itself(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    proof = write_merged_model(trained(tiny_llama(), name, **options), None, tmp_path / "model")
    assert proof.changed and not proof.untouched


def test_pixels_are_probed_too(tmp_path: Path) -> None:
    proof = write_merged_model(trained(tiny_vit(), batch=BACKBONES["vit"].batch()), None, tmp_path / "model")
    assert proof.difference is not None and proof.difference.positions == 4


def test_a_layer_whose_update_is_zero_is_named(tmp_path: Path) -> None:
    adapted = trained(tiny_llama())
    layer = adapted.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    nn.init.zeros_(layer.lora_B["default"].weight)
    proof = write_merged_model(adapted, None, tmp_path / "model")
    assert proof.untouched == ("model.layers.1.mlp.up_proj",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_s_own_dtype_and_ties_and_shards_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_gemma3().to(dtype).save_pretrained(tmp_path / "base")
    assert stored_dtype(tmp_path / "base") is dtype
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = trained(base)
    write_merged_model(adapted, None, tmp_path / "model", dtype=dtype, shard_size="20KB")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert "lm_head.weight" not in index["weight_map"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("model", "base")]
    assert sizes[0] < 1.2 * sizes[1]  # headers of several files


def broken(adapted: Adapted, merge: Callable[[Any], nn.Module], monkeypatch: pytest.MonkeyPatch) -> Adapted:
    honest = type(adapted).merge
    monkeypatch.setattr(PeftAdapted, "merge", lambda self: merge(honest(self)))
    return adapted


def _base(merged: Any) -> nn.Module:
    del merged
    return tiny_llama()


def _half(merged: Any) -> nn.Module:
    base = tiny_llama().state_dict()
    with torch.no_grad():
        for name, tensor in merged.named_parameters():
            tensor.copy_((tensor + base[name]) / 2)
    return merged


def _other_base(merged: Any) -> nn.Module:
    other = tiny_llama(seed=1)
    with torch.no_grad():
        for name, tensor in other.named_parameters():
            if "layers.0" in name:
                tensor.copy_(merged.get_parameter(name))
    return other


def _one_layer_missed(merged: Any) -> nn.Module:
    with torch.no_grad():
        merged.model.layers[0].mlp.down_proj.weight.copy_(tiny_llama().model.layers[0].mlp.down_proj.weight)
    return merged


@pytest.mark.parametrize("merge", [_base, _half, _other_base, _one_layer_missed])
def test_what_is_not_the_adapter_on_its_base_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: Callable[[Any], nn.Module]
) -> None:
    adapted = broken(trained(tiny_llama()), merge, monkeypatch)
    with pytest.raises(NotMergeable, match=r"the proof failed: its logits differ from the unmerged ones"):
        write_merged_model(adapted, None, tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_an_update_that_the_dtype_rounds_away_is_refused(tmp_path: Path) -> None:
    adapted = trained(tiny_llama(), targets=("q_proj",))
    with torch.no_grad():
        for name, parameter in adapted.trainable().items():
            if "layers.0" in name:
                parameter.mul_(1e-4)
    write_merged_model(adapted, None, tmp_path / "float32")
    with pytest.raises(NotMergeable, match=r"bfloat16 rounds all of its update of model\.layers\.0\.self_attn\.q_proj"):
        write_merged_model(adapted, None, tmp_path / "model", dtype=torch.bfloat16)
    assert not (tmp_path / "model").exists()


def test_the_adapter_stays_as_it_was(tmp_path: Path) -> None:
    adapted = trained(tiny_gemma3(), targets=("lm_head", "q_proj"))
    before, tensors = logits(adapted.model, BATCH), copy.deepcopy(adapted.tensors())
    proof = write_merged_model(adapted, None, tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(logits(adapted.model, BATCH), before)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapted.tensors().items())
    assert proof.size_bytes > 1.2 * proof.base_bytes  # the head has parted from the embeddings
