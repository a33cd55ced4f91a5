"""Hydra against its equations, stock peft and the authors' parameter counts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import RobertaConfig, RobertaModel, ViTConfig, ViTModel

from infra.errors import InvalidInput
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, loss
from tests.training.methods.one_layer import OneLayer, fitted
from tests.training.methods.plain_lora import plain_lora, weight_of
from training.methods.catalog import get_method
from training.methods.contract import AttachContext

BATCH = BACKBONES["llama"].batch()


def biased(build: Any) -> Any:
    """The model with biases that are not zero, where it has any."""

    def make() -> nn.Module:
        model, generator = build(), torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.5, generator=generator)
        return model

    return make


BUILDS = pytest.mark.parametrize(
    "build", [tiny_llama, biased(tiny_gpt2), biased(tiny_bert)], ids=["llama", "gpt2", "bert"]
)
BIAS = pytest.mark.parametrize("bias", [False, True])


def attached(model: nn.Module, method: str = "hydra", **chosen: Any) -> Any:
    return get_method(method).attach(model, get_method(method).config_type(**chosen), AttachContext(seed=3))


def perturbed(adapted: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for slot in adapted.slots().values():
        for parameter in slot.parameters():
            parameter.data.normal_(0, 0.2, generator=generator)
    return adapted


def one_layer(m: int, n: int, bias: bool = True) -> tuple[OneLayer, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    W, b = torch.randn(m, n, generator=generator), torch.randn(m, generator=generator)
    return OneLayer(W, b if bias else None), W, b


@BUILDS
@BIAS
def test_the_forward_pass_is_the_papers_equation_and_folds(build: Any, bias: bool) -> None:
    adapted = perturbed(attached(build(), bias=bias, parallel_scale=0.5, sequential_scale=1.5))
    bare = build()
    before = logits(bare, BATCH)
    for name, slot in adapted.slots().items():
        layer: Any = bare.get_submodule(name)
        W0, b0 = weight_of(layer).double(), 0 if layer.bias is None else layer.bias.detach().double()
        p = {key: parameter.detach().double() for key, parameter in slot.named_parameters()}
        if not bias:
            p |= dict.fromkeys(("a_p", "c_p", "a_s", "c_s"), torch.zeros(()))
        M = torch.eye(len(W0)).double() + 1.5 * p["B_s"] @ p["A_s"]
        W = M @ W0 + 0.5 * p["B_p"] @ p["A_p"]
        b = M @ (b0 + torch.zeros(len(W0)).double())
        if bias:
            b = b + 0.5 * (p["B_p"] @ p["a_p"] + p["c_p"]) + 1.5 * (p["B_s"] @ p["a_s"] + p["c_s"])
        layer.weight = nn.Parameter((W if isinstance(layer, nn.Linear) else W.T).float())
        layer.bias = nn.Parameter(b.float())
    expected = logits(bare, BATCH)
    assert (expected - before).abs().max() > 1e-2
    assert_close(logits(adapted.model, BATCH), expected, atol=2e-5, rtol=1e-4)
    assert_close(logits(adapted.merge(), BATCH), expected, atol=2e-5, rtol=1e-4)
    assert not bias or all(adapted.merge().get_submodule(name).bias is not None for name in adapted.slots())


@BUILDS
@BIAS
def test_a_fresh_adapter_is_exactly_the_base(build: Any, bias: bool) -> None:
    assert torch.equal(logits(attached(build(), bias=bias).model, BATCH), logits(build(), BATCH))


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (tiny_llama, ["model.layers.{}.mlp.down_proj"]),
        (tiny_gpt2, ["transformer.h.{}.mlp.c_proj"]),
        (tiny_bert, ["bert.encoder.layer.{}.output.dense"]),
        (
            BACKBONES["t5"].build,
            ["encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"],
        ),
    ],
    ids=["llama", "gpt2", "bert", "t5"],
)
def test_it_sits_on_the_last_layer_of_each_feed_forward_block(build: Any, layers: list[str]) -> None:
    assert set(attached(build()).slots()) == {name.format(number) for name in layers for number in (0, 1)}


def test_the_counts_are_the_authors() -> None:
    hydra = get_method("hydra")
    with torch.device("meta"):
        roberta, vit = RobertaModel(RobertaConfig()), ViTModel(ViTConfig(), add_pooling_layer=False)
    assert hydra.count(roberta, hydra.config_type()) == 331_776
    config = hydra.config_type(parallel_rank=2, sequential_rank=2, bias=True, targets=("o_proj", "fc2"))
    assert hydra.count(vit, config) == 239_712


def test_the_parallel_branch_alone_is_a_lora_of_peft() -> None:
    adapted = perturbed(attached(tiny_llama(), parallel_scale=1.5))
    lora = attached(tiny_llama(), "lora", rank=4, alpha=6, targets=("down_proj",))
    state = {}
    for name, slot in adapted.slots().items():
        slot.B_s.data.zero_()
        state |= {
            f"base_model.model.{name}.lora_A.weight": slot.A_p,
            f"base_model.model.{name}.lora_B.weight": slot.B_p,
        }
    lora.restore(state)
    assert_close(logits(adapted.model, BATCH), logits(lora.model, BATCH), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_the_sequential_branch_reads_the_frozen_layers_output(bias: bool) -> None:
    """M = 2I and B_p·A_p = P: the output is 2·y₀ + Px, not 2(y₀ + Px), and y₀ has the layer's bias."""
    model, W, b = one_layer(5, 7, bias)
    adapted = attached(model, targets=("layer",), parallel_rank=2, sequential_rank=5)
    slot = perturbed(adapted).slots()["layer"]
    slot.A_s.data, slot.B_s.data = torch.eye(5), torch.eye(5)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    y0 = x @ W.T + b if bias else x @ W.T
    assert_close(adapted.model(x).logits, 2 * y0 + x @ (slot.B_p @ slot.A_p).T, atol=1e-5, rtol=1e-5)
    slot.B_p.data.zero_()
    assert_close(adapted.model(x).logits, 2 * y0, atol=1e-5, rtol=1e-5)


def test_a_recombined_output_is_learnt_with_fewer_parameters_than_a_lora() -> None:
    generator = torch.Generator().manual_seed(0)
    model, W, _ = one_layer(5, 20, bias=False)
    u, v, p, q = (torch.randn(size, generator=generator) for size in (5, 5, 5, 20))
    x = torch.randn(200, 20, generator=generator)
    labels = x @ (W + torch.outer(u, v @ W) + torch.outer(p, q)).T
    adapted = attached(model, targets=("layer",), parallel_rank=1, sequential_rank=1)
    lora = attached(one_layer(5, 20, bias=False)[0], "lora", rank=1)
    assert fitted(adapted, x, labels) < 1e-5 < 1e-1 < fitted(lora, x, labels)
    of_rank_2 = get_method("lora").count(OneLayer(W), get_method("lora").config_type(rank=2))
    assert sum(t.numel() for t in adapted.trainable().values()) == 35 < of_rank_2


def test_gradient_reaches_the_downs_after_the_first_step() -> None:
    adapted = attached(tiny_llama(), bias=True)
    optimiser = torch.optim.SGD(adapted.trainable().values(), lr=0.1)
    reached = []
    for _ in range(2):
        optimiser.zero_grad()
        loss(adapted.model, BATCH).backward()
        reached.append({name[-3:] for name, t in adapted.trainable().items() if t.grad.abs().max() > 0})
        optimiser.step()
    assert reached[0] == {"B_p", "B_s", "c_p", "c_s"}
    assert reached[1] == reached[0] | {"A_p", "A_s", "a_p", "a_s"}


def test_dropout_sits_between_down_and_up() -> None:
    model, W, b = one_layer(6, 6)
    adapted = attached(model, targets=("layer",), parallel_rank=6, sequential_rank=6, dropout=0.5)
    slot = perturbed(adapted).slots()["layer"]
    slot.A_p.data, slot.B_p.data = torch.eye(6), torch.eye(6)
    slot.B_s.data.zero_()
    x = torch.ones(50, 6)
    added = adapted.model.train()(x).logits - (x @ W.T + b)
    dropped = added.abs() < 1e-5
    assert 0.3 < dropped.float().mean() < 0.7
    assert_close(added[~dropped], torch.full_like(added[~dropped], 2.0), atol=1e-5, rtol=1e-5)
    assert_close(adapted.model.eval()(x).logits, x @ W.T + b + 1)


@BUILDS
@BIAS
def test_stock_peft_computes_the_export_once_the_bias_is_shifted(build: Any, bias: bool) -> None:
    adapted = perturbed(attached(build(), bias=bias, parallel_scale=0.5, sequential_scale=1.5))
    base, shifted = build(), False
    with torch.no_grad():
        for name, slot in adapted.slots().items():
            layer: Any = base.get_submodule(name)
            shift = slot.shift(weight_of(layer), layer.bias)
            if shift is not None:
                layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift)
                shifted = True
    assert shifted is (bias or build is not tiny_llama)  # a plain LoRA is all of it where there is no bias
    stock = plain_lora(base, adapted)
    assert_close(logits(stock, BATCH), logits(adapted.model, BATCH), atol=2e-5, rtol=1e-5)


class Nameless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("model", "chosen", "message"),
    [
        (
            tiny_llama(),
            {"parallel_rank": 33},
            r"parallel_rank 33 is above the size of .*down_proj, which is \(32, 48\)",
        ),
        (tiny_llama(), {"sequential_rank": 33}, "sequential_rank 33 is above the size of .*\n.*sequential_rank to 32"),
        (tiny_llama(), {"targets": ("down_porj",)}, "matches no module"),
        (Nameless(), {}, "hydra does not know which layers of Nameless are its targets.*\n.*first, second"),
    ],
    ids=["parallel", "sequential", "targets", "architecture"],
)
def test_what_cannot_be_adapted_is_told(model: nn.Module, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        attached(model, **chosen)
