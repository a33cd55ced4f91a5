"""Adapters that merge entry by entry: where they are measured from, and what is stored whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from infra.errors import InvalidInput
from tests.tiny_models import tiny_llama, tiny_tokenizer
from tests.training.merging.adapters import PREFIX, lora, vectors, write
from training.merging.adapter import Adapter
from training.merging.dare import Dare
from training.merging.ema import Ema
from training.merging.entries import PRODUCTS, TRAINED_BASE
from training.merging.linear import Linear, Sum
from training.merging.merge import merge
from training.merging.slerp import Slerp
from training.merging.ties import Ties
from training.methods.catalog import CATALOG, get_method
from training.methods.contract import AttachContext

HEAD = f"{PREFIX}score.weight"


def with_head(adapter: Adapter, value: float, dtype: torch.dtype = torch.float32) -> Adapter:
    tensors = {**adapter.tensors, HEAD: torch.full((3, 4), value, dtype=dtype)}
    return Adapter(adapter.name, {**adapter.config, "modules_to_save": ["score"]}, tensors)


def test_bottlenecks_are_measured_from_zero() -> None:
    shapes = {"layers.0.down": (2, 4), "layers.0.up": (4, 2), "layers.0.bias": (4,)}
    a, b = (vectors(name, seed, shapes) for seed, name in enumerate("ab"))
    merged = merge([a, b], Linear(weights=(2, -0.5)))
    for key in shapes:
        assert_close(merged.tensors[key], 2 * a.tensors[key] - 0.5 * b.tensors[key])


def test_factors_that_multiply_are_measured_from_one() -> None:
    a, b = (vectors(name, seed, {f"{PREFIX}k_proj.ia3_l": (5, 1)}, kind="IA3") for seed, name in enumerate("ab"))
    made = merge([a, b], Sum()).tensors[f"{PREFIX}k_proj.ia3_l"]
    assert_close(made, *[a.tensors[f"{PREFIX}k_proj.ia3_l"] + b.tensors[f"{PREFIX}k_proj.ia3_l"] - 1])
    ones = Adapter("ones", a.config, {key: torch.ones_like(tensor) for key, tensor in a.tensors.items()})
    for method in (Sum(), Ties(density=1)):
        assert_close(dict(merge([a, ones], method).tensors), dict(a.tensors))


def test_every_method_that_trains_the_base_is_measured_from_it() -> None:
    changing = {get_method(name).peft_type for name in CATALOG if get_method(name).card.changes_base}
    assert changing <= set(TRAINED_BASE)


@pytest.mark.parametrize("name", ["ia3", "ssf", "boft", "road", "ln-tuning", "llm-adapters", "scaling-sft", "full"])
def test_fresh_adapters_merge_into_one_that_changes_nothing(name: str, tmp_path: Path) -> None:
    method = get_method(name)
    options: dict[str, Any] = {"ssf": {"init_std": 0.0}, "boft": {"block_size": 4}, "road": {"group_size": 8}}.get(
        name, {}
    )
    if name == "road":
        options["targets"] = ["q_proj", "v_proj"]
    if name == "llm-adapters":
        options = {"placement": "parallel", "bottleneck": 8, "init": "mam"}
    config = method.config_type(**options)
    fresh = []
    for seed in range(2):
        context = AttachContext(seed=seed, processor=tiny_tokenizer(), total_steps=10)
        adapted = method.attach(tiny_llama(), config, context)
        fresh.append(Adapter(str(seed), adapted.adapter_config(), adapted.tensors()))
    base = dict(tiny_llama().state_dict())
    tensors = merge(fresh, Sum(scale=3.0), base).tensors
    model = method.attach(tiny_llama(), config, AttachContext(total_steps=10))
    if name != "scaling-sft":  # whose fresh adapters have different masks
        model.restore(tensors)
        ids = torch.arange(3, 30)[None]
        assert_close(model.model(ids).logits, tiny_llama()(ids).logits, rtol=1e-4, atol=1e-4)
    else:
        loaded = method.load(tiny_llama(), write(Adapter("merged", fresh[0].config, tensors), tmp_path / "merged"))
        assert_close(loaded.tensors(), dict(tensors))
        assert not any(tensor.any() for key, tensor in tensors.items() if key.endswith("values"))


# -- the base's own values ---------------------------------------------------------------------------------------------


def fine_tuned(name: str, seed: int, **config: Any) -> Adapter:
    return vectors(name, seed, {"layer.weight": (3, 4), "layer.bias": (3,)}, kind="REGRAFT_FULL", **config)


def test_fine_tuned_models_average_without_the_base_and_add_up_with_it() -> None:
    a, b = fine_tuned("a", 0), fine_tuned("b", 1)
    base = dict(vectors("", 2, {"layer.weight": (3, 4), "layer.bias": (3,)}).tensors)
    for key, start in base.items():
        x, y = a.tensors[key], b.tensors[key]
        assert_close(merge([a, b], Linear()).tensors[key], (x + y) / 2)
        assert_close(merge([a, b], Linear(), base).tensors[key], (x + y) / 2)
        assert_close(merge([a, b], Ema(momentum=0.25)).tensors[key], 0.25 * x + 0.75 * y)
        assert_close(merge([a, b], Sum(), base).tensors[key], x + y - start)
        agree = (x - start).sign() == (y - start).sign()
        made = merge([a, b], Ties(density=1), base).tensors[key]
        assert_close(made[agree], ((x + y) / 2)[agree])
    for method in (Sum(), Linear(weights=(0.5, 0.6)), Ties(), Dare(), Slerp()):
        with pytest.raises(InvalidInput, match=r"layer\.weight is stored whole"):
            merge([a, b], method)


def test_heads_that_agree_stay_and_others_are_averaged_or_refused() -> None:
    a, b = lora("a", 0), lora("b", 1)
    for method in (Sum(), Ties()):
        assert torch.equal(merge([with_head(a, 3), with_head(b, 3)], method).tensors[HEAD], torch.full((3, 4), 3.0))
    different = [with_head(a, 3), with_head(b, 5)]
    mean = merge(different, Linear(weights=(0.25, 0.75)))
    assert_close(mean.tensors[HEAD], torch.full((3, 4), 4.5))
    assert mean.config["modules_to_save"] == ["score"]
    for method in (Sum(), Ties(), Slerp()):
        with pytest.raises(InvalidInput, match="base model at hand"):
            merge(different, method)
    base = {"score.weight": torch.full((3, 4), 2.0)}
    assert_close(merge(different, Sum(), base).tensors[HEAD], torch.full((3, 4), 6.0))


@pytest.mark.parametrize("kind", ["LORA", "IA3"])
def test_a_head_that_only_one_has_is_its_own_under_a_sum(kind: str) -> None:
    x, y = (lora("x", 0), lora("y", 1))
    if kind == "IA3":
        x, y = (vectors(name, seed, {f"{PREFIX}k_proj.ia3_l": (5, 1)}, kind=kind) for seed, name in enumerate("xy"))
    for a, b in ((with_head(x, 3), y), (x, with_head(y, 3))):
        merged = merge([a, b], Sum())
        assert_close(merged.tensors[HEAD], torch.full((3, 4), 3.0))
        assert merged.config["modules_to_save"] == ["score"]
        with pytest.raises(InvalidInput, match=r"score\.weight is stored whole"):
            merge([a, b], Linear())
        base = {"score.weight": torch.full((3, 4), 2.0)}
        assert_close(merge([a, b], Linear(), base).tensors[HEAD], torch.full((3, 4), 2.5))


def test_whole_numbers_stay_where_they_agree_and_are_refused_where_not() -> None:
    def adapter(name: str, *indices: int) -> Adapter:
        tensors: dict[str, Tensor] = {
            "q.delta": torch.full((4, 2), float(len(name))),
            "q.indices": torch.tensor(indices),
        }
        return Adapter(name, {"peft_type": "REGRAFT_PACA"}, tensors)

    merged = merge([adapter("a", 0, 2), adapter("bbb", 0, 2)], Linear())
    assert merged.tensors["q.indices"].tolist() == [0, 2]
    assert_close(merged.tensors["q.delta"], torch.full((4, 2), 2.0))
    with pytest.raises(InvalidInput, match="holds whole numbers, differs"):
        merge([adapter("a", 0, 2), adapter("bbb", 1, 2)], Linear())


def test_settings_that_give_the_numbers_their_meaning_must_agree() -> None:
    a = vectors("a", 0, {"q.fourierft_spectrum": (5,)}, kind="FOURIERFT", random_loc_seed=1, init_weights=True)
    b = vectors("b", 1, {"q.fourierft_spectrum": (5,)}, kind="FOURIERFT", random_loc_seed=2, init_weights=False)
    with pytest.raises(InvalidInput, match="random_loc_seed is 1 in one, 2 in the other"):
        merge([a, b], Linear())
    merge([a, Adapter("b", {**b.config, "random_loc_seed": 1}, b.tensors)], Linear())


def test_products_are_refused_and_prompts_have_only_means() -> None:
    for kind in PRODUCTS:
        with pytest.raises(InvalidInput, match="product of what they store"):
            merge([vectors(name, 0, {"x": (3,)}, kind=kind) for name in "ab"], Linear())
    prompts = [
        vectors(name, seed, {"prompt_embeddings": (3, 4)}, kind="PROMPT_TUNING") for seed, name in enumerate("ab")
    ]
    mean = merge(prompts, Linear()).tensors["prompt_embeddings"]
    assert_close(mean, sum(each.tensors["prompt_embeddings"] for each in prompts) / 2)
    with pytest.raises(InvalidInput, match="prompt_embeddings is stored whole"):
        merge(prompts, Sum())


def test_rank_and_energy_are_for_loras() -> None:
    a, b = (vectors(name, seed, {"x": (3,)}) for seed, name in enumerate("ab"))
    for method in (Linear(rank=2), Ties(energy=0.5)):
        with pytest.raises(InvalidInput, match="rank and energy are for LoRAs"):
            merge([a, b], method)
