"""LoRAs of every shape for property tests, on the layers of tiny models that have no weights."""

from functools import cache

import torch
from hypothesis import strategies as st
from torch import nn

from tests.tiny_models import tiny_gpt2, tiny_llama
from training.interchange.lora_layers import LoraLayer, LoraLayers
from training.methods.targets import linear_modules, shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def bare_model(kind: str) -> nn.Module:
    return {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind]().to("meta")


@st.composite
def loras(draw: st.DrawFn, kind: str = "llama", whole_scales: bool = False) -> dict[str, LoraLayer]:
    """Some layers of a model, each with a rank, dtype and scale of its own, or all with the same."""
    there = linear_modules(bare_model(kind))
    places = draw(st.lists(st.sampled_from(sorted(there)), min_size=1, max_size=5, unique=True))
    seed = draw(st.integers(0, 2**31))
    dtype = draw(st.sampled_from(DTYPES))
    scale = st.sampled_from([0.5, 1.0, 2.0]) if whole_scales else st.sampled_from([0.3, 1.0, 2.0, 20.0 / 3, 16.0])
    one = draw(st.none() | st.tuples(st.integers(1, 6), scale))
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for place in places:
        m, n = shape(there[place])
        rank, factor = one or (draw(st.integers(1, 6)), draw(scale))
        A = torch.randn(rank, n, generator=generator).to(dtype)
        layers[place] = LoraLayer(A, torch.randn(m, rank, generator=generator).to(dtype), factor)
    return layers


def assert_same(found: LoraLayers, expected: LoraLayers) -> None:
    """The very factors, and the scale to float64's precision (α = s·r is what some formats store)."""
    assert found.keys() == expected.keys()
    for place, layer in expected.items():
        assert torch.equal(found[place].A, layer.A) and found[place].A.dtype == layer.A.dtype
        assert torch.equal(found[place].B, layer.B) and found[place].B.dtype == layer.B.dtype
        assert abs(found[place].scale - layer.scale) <= 1e-6 * layer.scale
