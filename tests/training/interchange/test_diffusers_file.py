"""diffusers' LoRA files: names with dots, the scale in the metadata, beside the layer, or nowhere."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from infra.errors import BaseModelMismatch, CorruptArtifact, InvalidInput
from tests.training.interchange.strategies import assert_same, bare_model, loras
from training.interchange.diffusers_file import METADATA, layers_from_diffusers, layers_to_diffusers
from training.interchange.lora_layers import LoraLayers

Q = "model.layers.0.self_attn.q_proj"


@settings(max_examples=50)
@given(loras())
def test_what_is_written_is_read_again(layers: LoraLayers) -> None:
    metadata, tensors = layers_to_diffusers(layers, bare_model("llama"), "unet")
    assert all(name.startswith("unet.") for name in tensors)
    assert_same(layers_from_diffusers(metadata, tensors, bare_model("llama")), layers)


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("text_encoder.", "lora_A", "lora_B"),
        ("", "lora_A", "lora_B"),
        ("base_model.model.", "lora_A", "lora_B"),
        ("transformer.", "lora.down", "lora.up"),
    ],
)
def test_a_scale_stands_beside_the_layer_or_is_one(prefix: str, down: str, up: str) -> None:
    tensors = {f"{prefix}{Q}.{down}.weight": torch.ones(4, 32), f"{prefix}{Q}.{up}.weight": torch.ones(32, 4)}
    assert layers_from_diffusers({}, tensors, bare_model("llama"))[Q].scale == 1.0
    tensors[f"{prefix}{Q}.alpha"] = torch.tensor(2.0)
    assert layers_from_diffusers({}, tensors, bare_model("llama"))[Q].scale == 0.5


def test_diffusers_reads_the_config_that_is_written() -> None:
    read = pytest.importorskip("diffusers.utils.state_dict_utils")
    layers = {Q: next(iter(layers_from_diffusers({}, file(), bare_model("llama")).values()))}
    metadata, tensors = layers_to_diffusers(layers, bare_model("llama"))
    assert json.loads(metadata[METADATA])["text_encoder.r"] == 2
    assert read.convert_unet_state_dict_to_peft(tensors).keys() == tensors.keys()  # nothing left to rename


def file(**changed: Tensor) -> dict[str, Tensor]:
    return {f"unet.{Q}.lora_A.weight": torch.ones(2, 32), f"unet.{Q}.lora_B.weight": torch.ones(32, 2)} | changed


@pytest.mark.parametrize(
    ("metadata", "changed", "part", "kind", "told"),
    [
        ({}, {"text_encoder.x.lora_A.weight": torch.ones(2, 3)}, None, InvalidInput, "several parts"),
        ({}, {}, "transformer", InvalidInput, "no part transformer; it holds unet"),
        ({}, {"unet.x.lora_magnitude_vector": torch.ones(2)}, None, InvalidInput, "it stores x.lora_magnitude_vector"),
        ({}, {"unet.x.lora_A.weight": torch.ones(2, 3)}, None, CorruptArtifact, "one factor of the two"),
        ({METADATA: "{"}, {}, None, CorruptArtifact, "is not JSON"),
        ({METADATA: "[1]"}, {}, None, CorruptArtifact, "not a JSON object"),
        ({METADATA: '{"unet.r": 3, "unet.lora_alpha": 3}'}, {}, None, CorruptArtifact, "the config says 3"),
        ({METADATA: '{"unet.r": 2, "unet.lora_alpha": 3, "unet.use_dora": true}'}, {}, None, InvalidInput, "a DoRA"),
        (
            {},
            {"unet.x.lora_A.weight": torch.ones(2, 3), "unet.x.lora_B.weight": torch.ones(3, 2)},
            None,
            BaseModelMismatch,
            "no linear layer x",
        ),
    ],
)
def test_what_is_no_plain_lora_of_this_base_is_refused(
    metadata: dict[str, str], changed: dict[str, Any], part: str | None, kind: type[Exception], told: str
) -> None:
    with pytest.raises(kind, match=told):
        layers_from_diffusers(metadata, file(**changed), bare_model("llama"), part)
