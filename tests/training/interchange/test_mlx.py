"""MLX adapters, against mlx-lm's layer in plain NumPy, and against mlx-lm itself where it is installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file
from torch import Tensor

from infra.errors import BaseModelMismatch, CorruptArtifact, InvalidInput
from tests.tiny_models import tiny_gemma3, tiny_llama
from tests.training.interchange.strategies import bare_model, loras
from training.interchange.lora_layers import LoraLayer, LoraLayers, fold
from training.interchange.mlx import layers_from_mlx, layers_to_mlx

Q = "model.layers.1.self_attn.q_proj"


def mlx_lora_linear(x: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """What mlx-lm's LoRALinear adds to Wx."""
    return scale * ((x @ a) @ b)


def numpy(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


@settings(max_examples=50)
@given(loras())
def test_every_layer_adds_in_mlx_what_it_adds_in_peft(layers: LoraLayers) -> None:
    config, tensors = layers_to_mlx(layers, bare_model("llama"))
    parameters = config["lora_parameters"]
    generator = np.random.default_rng(0)
    assert len(tensors) == 2 * len(layers)
    for place, layer in layers.items():
        a, b = (numpy(tensors[f"{place}.lora_{side}"]) for side in "ab")
        assert a.shape[1] == b.shape[0] == parameters["rank"]
        x = generator.standard_normal((3, a.shape[0]))
        expected = x @ numpy(layer.update()).T
        np.testing.assert_allclose(mlx_lora_linear(x, a, b, parameters["scale"]), expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=50)
@given(loras(whole_scales=True))
def test_what_is_written_is_read_again_mixed_ranks_included(layers: LoraLayers) -> None:
    config, tensors = layers_to_mlx(layers, bare_model("llama"))
    read = layers_from_mlx(json.loads(json.dumps(config)), tensors, bare_model("llama"))
    assert read.keys() == layers.keys()
    for place, layer in layers.items():
        assert read[place].rank == layer.rank
        assert torch.equal(read[place].update(), layer.update())


@settings(max_examples=50)
@given(loras())
def test_mlx_lm_would_adapt_every_layer_that_is_stored(layers: LoraLayers) -> None:
    config, _ = layers_to_mlx(layers, bare_model("llama"))
    keys, blocks = config["lora_parameters"]["keys"], 2
    adapted = {f"model.layers.{n}.{key}" for n in range(blocks - config["num_layers"], blocks) for key in keys}
    assert layers.keys() <= adapted | set(keys)


def adapter(**changed: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}
    tensors = {f"{Q}.lora_a": torch.ones(32, 2), f"{Q}.lora_b": torch.ones(2, 32)}
    return config | changed.get("config", {}), tensors | changed.get("tensors", {})


@pytest.mark.parametrize(
    ("changed", "kind", "told"),
    [
        ({"config": {"fine_tune_type": "dora"}}, InvalidInput, "'dora'"),
        ({"config": {"fine_tune_type": "full"}}, InvalidInput, "'full'"),
        ({"config": {"lora_parameters": None}}, CorruptArtifact, "no lora_parameters"),
        ({"config": {"lora_parameters": {"rank": 2}}}, CorruptArtifact, "no finite number"),
        ({"config": {"lora_parameters": {"rank": 3, "scale": 1.0}}}, CorruptArtifact, "the config says 3"),
        ({"tensors": {f"{Q}.m": torch.ones(32)}}, InvalidInput, "it stores"),
        ({"tensors": {"model.embed_tokens.lora_a": torch.ones(259, 2)}}, InvalidInput, "the embeddings"),
        ({"tensors": {f"{Q}.lora_a": torch.ones(4, 32, 2)}}, InvalidInput, "as experts"),
        ({"tensors": {"model.layers.0.x.lora_a": torch.ones(32, 2)}}, CorruptArtifact, "one factor"),
        ({"tensors": {f"{Q}.lora_a": torch.ones(31, 2)}}, BaseModelMismatch, "is 32 × 32; the adapter's is 32 × 31"),
    ],
)
def test_what_is_no_plain_lora_of_this_base_is_refused(
    changed: dict[str, Any], kind: type[Exception], told: str
) -> None:
    with pytest.raises(kind, match=told):
        layers_from_mlx(*adapter(**changed), bare_model("llama"))


def test_a_layer_that_mlx_has_not_under_this_name_is_refused() -> None:
    layer = {"lm_head": LoraLayer(torch.ones(1, 32), torch.ones(259, 1))}
    assert layers_to_mlx(layer, tiny_llama())[0]["lora_parameters"]["keys"] == ["lm_head"]
    with pytest.raises(InvalidInput, match="no layer lm_head to adapt"):
        layers_to_mlx(layer, tiny_gemma3())  # tied
    with pytest.raises(InvalidInput, match=r"no layer transformer\.h\.0\.attn\.c_proj"):
        layers_to_mlx(
            {"transformer.h.0.attn.c_proj": LoraLayer(torch.ones(1, 32), torch.ones(32, 1))}, bare_model("gpt2")
        )


def test_mlx_lm_itself_answers_as_we_do(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    llama = pytest.importorskip("mlx_lm.models.llama")
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    shapes = {Q: (32, 32, 2, 0.5), "model.layers.0.mlp.down_proj": (32, 48, 3, 2.0), "lm_head": (259, 32, 1, 1.0)}
    layers = {
        place: LoraLayer(torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator) / 5, scale)
        for place, (m, n, r, scale) in shapes.items()
    }
    config, tensors = layers_to_mlx(layers, model)
    save_file(tensors, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    told = model.config.to_dict() | {"rope_theta": 10000.0}
    theirs = llama.Model(llama.ModelArgs.from_dict(told))
    theirs.load_weights([(name, mx.array(tensor.numpy())) for name, tensor in model.state_dict().items()], strict=True)
    utils.load_adapters(theirs, str(tmp_path))
    theirs.eval()
    ids = torch.arange(3, 20).unsqueeze(0)
    fold(layers, model)
    with torch.no_grad():
        ours = model(ids).logits
    np.testing.assert_allclose(np.array(theirs(mx.array(ids.numpy()))), ours.numpy(), atol=2e-4, rtol=1e-3)
