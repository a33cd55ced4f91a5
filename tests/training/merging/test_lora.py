"""Merged LoRAs: exact sums of the dense updates, in files that stock peft loads."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch.testing import assert_close

from tests.tiny_models import tiny_bert, tiny_llama
from tests.training.merging.adapters import PREFIX, SHAPES, lora, trained, updates, write
from training.merging.adapter import Adapter
from training.merging.ema import Ema
from training.merging.factors import Factors
from training.merging.linear import Linear, Sum
from training.merging.merge import merge
from training.merging.slerp import Slerp
from training.merging.ties import Ties
from training.methods.contract import stored_config, stored_tensors
from training.methods.lora import METHOD

SOME = {"model.layers.1.q_proj": (6, 5)}
MIXED = [
    lora("plain", 0, rank=2, alpha=4),
    lora("root", 1, rank=3, alpha=5, use_rslora=True),
    lora(
        "pattern",
        2,
        rank=1,
        alpha=2,
        ranks={"layers.1.q_proj": 4} | {"model.layers.1.q_proj": 4},
        alpha_pattern={"layers.1.q_proj": 3},
    ),
]


def dense_sum(adapters: list[Adapter], coefficients: list[float]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for c, adapter in zip(coefficients, adapters, strict=True):
        for place, update in updates(adapter).items():
            found[place] = found.get(place, torch.zeros_like(update)) + c * update
    return found


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.3, 0.5), (2.0, -1.5, 0.0)])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_sum_of_mixed_ranks_and_scales_is_exact(weights: tuple[float, ...], scale: float) -> None:
    merged = merge(MIXED, Linear(weights=weights, scale=scale))
    meant = dense_sum(MIXED, [scale * weight for weight in weights])
    made = updates(merged)
    assert made.keys() == meant.keys() == SHAPES.keys()
    for place in meant:
        assert_close(made[place], meant[place], rtol=0, atol=1e-6 * float(meant[place].abs().max()))
    assert merged.deviation.overall == 0
    ranks = {place: len(merged.tensors[f"{PREFIX}{place}.lora_A.weight"]) for place in SHAPES}
    assert ranks == {"model.layers.0.q_proj": 6, "model.layers.1.q_proj": 9, "model.layers.1.down_proj": 6}
    assert merged.config["r"] == merged.config["lora_alpha"] == 9
    assert not merged.config["use_rslora"]


def test_the_default_is_the_mean_and_the_sum_is_all_of_each() -> None:
    mean, total = updates(merge(MIXED, Linear())), updates(merge(MIXED, Sum()))
    for place in SHAPES:
        assert_close(3 * mean[place], total[place], rtol=1e-5, atol=1e-5)
        assert_close(total[place], dense_sum(MIXED, [1, 1, 1])[place], rtol=1e-5, atol=1e-5)


def test_averaging_the_factors_is_another_update_and_says_how_far_off() -> None:
    adapters = [lora("a", 0), lora("b", 1)]
    merged, meant = merge(adapters, Factors(weights=(0.5, 0.5))), dense_sum(adapters, [0.5, 0.5])
    off = [float((updates(merged)[place] - meant[place]).norm()) for place in meant]
    norms = [float(meant[place].norm()) for place in meant]
    assert all(each > 0.1 * norm for each, norm in zip(off, norms, strict=True))
    for place, each, norm in zip(meant, off, norms, strict=True):
        assert merged.deviation.by_place[place] == pytest.approx(each / norm, rel=1e-5)
    assert merged.deviation.overall == pytest.approx(math.hypot(*off) / math.hypot(*norms), rel=1e-5)


def test_a_layer_that_one_adapter_leaves_alone_is_no_change_of_it() -> None:
    everywhere, somewhere = lora("everywhere", 0), lora("somewhere", 1, rank=3, shapes=SOME)
    for order in ((everywhere, somewhere), (somewhere, everywhere)):
        made = updates(merge(order, Sum()))
        for place, meant in dense_sum([everywhere, somewhere], [1, 1]).items():
            assert_close(made[place], meant, rtol=1e-5, atol=1e-5)
    alone = "model.layers.0.q_proj"
    made = updates(merge([everywhere, somewhere], Slerp(t=0.25)))  # linear where one is zero
    assert_close(made[alone], 0.75 * updates(everywhere)[alone], rtol=1e-5, atol=1e-5)
    made = updates(merge([everywhere, somewhere], Ties(density=1)))  # the mean of those that have an entry there
    assert_close(made[alone], updates(everywhere)[alone], rtol=1e-5, atol=1e-5)


def test_layers_are_cut_each_by_itself_and_the_deviation_is_told() -> None:
    adapters = [lora("a", 0), lora("b", 1, rank=3)]
    meant = dense_sum(adapters, [0.5, 0.5])
    for options in ({"rank": 2}, {"energy": 0.9}):
        merged = merge(adapters, Linear(**options))
        for place, update in updates(merged).items():
            off = float((update - meant[place]).norm() / meant[place].norm())
            assert merged.deviation.by_place[place] == pytest.approx(off, rel=1e-4, abs=1e-6)
            assert off**2 <= 0.1 + 1e-6 or "rank" in options
        off = sum(float((updates(merged)[place] - meant[place]).norm()) ** 2 for place in meant)
        assert merged.deviation.overall**2 == pytest.approx(
            off / sum(float(meant[place].norm()) ** 2 for place in meant), rel=1e-4
        )
    assert merge(adapters, Linear(rank=2)).config["rank_pattern"] == {}


def test_a_full_rank_result_is_kept_as_far_as_the_ranks_together_go() -> None:
    adapters = [lora("a", 0, rank=1), lora("b", 1, rank=1)]
    merged = merge(adapters, Ties(density=0.5))
    assert merged.config["r"] == 2
    assert 0 < merged.deviation.overall < 1
    assert merge(adapters, Ties(density=0.5, rank=9)).deviation.overall < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_the_one_they_have_in_common(dtype: torch.dtype) -> None:
    a, b = (lora(name, seed, dtype=dtype) for seed, name in enumerate("ab"))
    merged = merge([a, b], Linear())
    assert {tensor.dtype for tensor in merged.tensors.values()} == {dtype}
    for place, meant in dense_sum([a, b], [0.5, 0.5]).items():  # products are of float64, rounded once
        assert_close(updates(merged)[place], meant, rtol=0, atol=4 * torch.finfo(dtype).eps * float(meant.norm()))
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    mixed = merge([a, lora("c", 2, dtype=other)], Linear())
    assert {tensor.dtype for tensor in mixed.tensors.values()} == {torch.float32}


def test_embeddings_and_convolutions_are_stacked_too() -> None:
    def adapter(name: str, seed: int, rank: int) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "embed.lora_embedding_A": (rank, 11),
            "embed.lora_embedding_B": (4, rank),
            "conv.lora_A.weight": (rank, 3, 2, 2),
            "conv.lora_B.weight": (5, rank, 1, 1),
        }
        tensors = {f"{PREFIX}{key}": torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["embed", "conv"]}
        return Adapter(name, config, tensors)

    a, b = adapter("a", 0, 1), adapter("b", 1, 2)
    for method in (Sum(), Sum(rank=3), Ties(density=1, rank=4)):
        merged = merge([a, b], method)
        r = merged.config["r"]
        assert merged.tensors[f"{PREFIX}conv.lora_A.weight"].shape == (r, 3, 2, 2)
        assert merged.tensors[f"{PREFIX}conv.lora_B.weight"].shape == (5, r, 1, 1)
    merged = merge([a, b], Sum())
    for pair in (("embed.lora_embedding_A", "embed.lora_embedding_B"), ("conv.lora_A.weight", "conv.lora_B.weight")):
        made, *parts = (
            each.tensors[PREFIX + pair[1]].flatten(1) @ each.tensors[PREFIX + pair[0]].flatten(1)
            for each in (merged, a, b)
        )
        assert_close(made, 2 * (parts[0] + parts[1]))


# -- stock peft --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Linear(), Sum(energy=0.8), Slerp(t=0.3), Ties(rank=5), Ema()])
@pytest.mark.parametrize("regex", [False, True])
def test_stock_peft_loads_the_result(method: Any, regex: bool, tmp_path: Path) -> None:
    first = trained(0, rank=3, alpha=5, targets=["q_proj", "down_proj"])
    second = trained(1, rank=2, targets=r"model\.layers\.1\..*(q_proj|v_proj)" if regex else ["q_proj", "v_proj"])
    merged = merge([first, second], method)
    model = PeftModel.from_pretrained(tiny_llama(), write(merged, tmp_path / "merged"))
    found = updates(merged)
    layers = {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert layers.keys() == found.keys()
    for name, layer in layers.items():
        assert_close(layer.get_delta_weight("default").double(), found[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj", "o_proj"], "exclude_modules": r".*(layers\.0\..*|o_proj)"},
        {"target_modules": r"model\.layers\.1\..*(q_proj|v_proj)"},
    ],
)
def test_layers_that_peft_was_told_in_other_ways_come_out_by_name(targets: dict[str, Any], tmp_path: Path) -> None:
    first = trained(0, rank=3, targets=r"model\.layers\.1\..*down_proj")
    second = trained(1, rank=2, targets=r"model\.layers\.1\..*(q_proj|v_proj)")
    second = Adapter("second", {**second.config, **targets}, second.tensors)
    PeftModel.from_pretrained(tiny_llama(), write(second, tmp_path / "second"))  # it is what peft takes for these
    merged = merge([second, first], Sum())
    model = PeftModel.from_pretrained(tiny_llama(), write(merged, tmp_path / "merged"))
    layers = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert layers == updates(merged).keys() == {**updates(first), **updates(second)}.keys()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_the_merged_model_computes_with_the_sum(weights: tuple[float, float], tmp_path: Path) -> None:
    adapters = [trained(0, rank=3, alpha=5), trained(1, rank=2, targets=["q_proj", "v_proj"])]
    merged = write(merge(adapters, Linear(weights=weights)), tmp_path / "merged")
    plain = tiny_llama()
    with torch.no_grad():
        for place, update in dense_sum(adapters, list(weights)).items():
            plain.get_submodule(place).weight += update.float()
    ids = torch.arange(3, 40)[None]
    stock = PeftModel.from_pretrained(tiny_llama(), merged)
    assert_close(stock(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    loaded = METHOD.load(tiny_llama(), merged)
    assert_close(loaded.model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_classifier_and_biases_that_peft_stores_whole_load_again(bias: str, tmp_path: Path) -> None:
    adapters = []
    for seed in range(2):
        config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], bias=bias)
        model = get_peft_model(tiny_bert(), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)
        model.save_pretrained(tmp_path / str(seed))
        folder = tmp_path / str(seed)
        adapters.append(Adapter(str(seed), stored_config(folder), stored_tensors(folder)))
    merged = merge(adapters, Linear(weights=(0.25, 0.75)))
    again = PeftModel.from_pretrained(tiny_bert(), write(merged, tmp_path / "merged"))
    whole = [key for key in merged.tensors if "lora_" not in key]
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= set(whole)
    state = get_peft_model_state_dict(again)
    for key in whole:
        assert_close(state[key], 0.25 * adapters[0].tensors[key] + 0.75 * adapters[1].tensors[key])
    base = dict(tiny_bert().state_dict())
    total = merge(adapters, Sum(), base)  # every whole tensor's own value in the base is found
    for key in whole:
        name = key.removeprefix(PREFIX)
        for wrapper in (".base_layer", ".original_module", ".modules_to_save"):
            name = name.replace(wrapper, "")
        assert_close(total.tensors[key], sum(each.tensors[key] for each in adapters) - base[name])
