"""Sparse differences: sums over different masks, as `ComposableSft.compose` adds them on a model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.tiny_models import tiny_bert, tiny_llama
from tests.training.merging.adapters import write
from training.merging.adapter import Adapter
from training.merging.linear import Linear, Sum
from training.merging.merge import merge
from training.merging.slerp import Slerp
from training.merging.ties import Ties
from training.methods.composable_sft import METHOD, ComposableSftConfig
from training.methods.contract import AttachContext

KIND = {"peft_type": "REGRAFT_SCALING_SFT", "options": {"entries": 3}}


def sparse(name: str, indices: list[int], values: list[float], dtype: torch.dtype = torch.float32) -> Adapter:
    tensors = {"q.indices": torch.tensor(indices, dtype=torch.int32), "q.values": torch.tensor(values, dtype=dtype)}
    return Adapter(name, KIND, tensors)


def dense(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every difference as a vector of 300 · 300 entries."""
    found = {}
    for key, indices in tensors.items():
        if key.endswith("indices"):
            values = tensors[key.removesuffix("indices") + "values"]
            found[key] = torch.zeros(90_000, dtype=torch.float64).index_put((indices.long(),), values.double())
    return found


def test_overlapping_entries_add_up_and_the_rest_is_kept() -> None:
    a, b = sparse("a", [7, 1, 4], [1.0, 2.0, 3.0]), sparse("b", [4, 9], [10.0, 20.0])
    for order in ((a, b), (b, a)):
        merged = merge(order, Sum())
        assert merged.tensors["q.indices"].tolist() == [1, 4, 7, 9]
        assert merged.tensors["q.values"].tolist() == [2, 13, 1, 20]
        assert merged.tensors["q.indices"].dtype == torch.int32
        assert merged.config["options"]["entries"] == 4


def test_equal_masks_stay_as_they_are() -> None:
    a, b = sparse("a", [7, 1, 4], [1.0, 2.0, 3.0]), sparse("b", [7, 1, 4], [10.0, 20.0, 30.0])
    merged = merge([a, b], Linear(weights=(1, -1)))
    assert merged.tensors["q.indices"].tolist() == [7, 1, 4]
    assert merged.tensors["q.values"].tolist() == [-9, -18, -27]


def test_empty_masks_are_no_change() -> None:
    a, nothing = sparse("a", [7, 1], [1.0, 2.0]), sparse("nothing", [], [])
    assert merge([a, nothing], Sum()).tensors["q.values"].tolist() == [2, 1]
    assert len(merge([nothing, sparse("nor", [], [])], Sum()).tensors["q.values"]) == 0


@pytest.mark.parametrize("method", [Linear(weights=(0.3, -2)), Ties(density=0.5), Slerp(t=0.3)])
def test_every_rule_is_that_of_the_dense_differences(method: Linear | Ties | Slerp) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (
        sparse(
            name, torch.randperm(40, generator=generator)[:12].tolist(), torch.randn(12, generator=generator).tolist()
        )
        for name in "ab"
    )
    merged = merge([a, b], method)
    (made,), (x,), (y,) = (list(dense(dict(each.tensors)).values()) for each in (merged, a, b))
    union = merged.tensors["q.indices"].long()
    assert_close(made[union], method.entries("", ["a", "b"], torch.stack([x, y])[:, union]), rtol=1e-6, atol=1e-6)
    assert not made[torch.ones(90_000).index_fill(0, union, 0).bool()].any()


# -- LT-SFT ------------------------------------------------------------------------------------------------------------


def trained(seed: int, model: torch.nn.Module) -> Adapter:
    """A φ of 60 random entries, and random heads where there are any."""
    adapted = METHOD.attach(model, ComposableSftConfig(entries=60), AttachContext(seed=seed, total_steps=4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return Adapter(f"seed {seed}", adapted.adapter_config(), adapted.tensors())


def test_composing_stored_differences_is_composing_them_on_the_model(tmp_path: Path) -> None:
    a, b = trained(0, tiny_llama()), trained(1, tiny_llama())
    model = tiny_llama()
    first = METHOD.load(model, write(a, tmp_path / "a"), "a")
    second = METHOD.load(model, write(b, tmp_path / "b"), "b")
    theirs = METHOD.compose([first, second], "both")
    merged = {order: merge(each, Sum()) for order, each in {"ab": (a, b), "ba": (b, a)}.items()}
    for order, each in merged.items():
        assert_close(dict(each.tensors), theirs.tensors())
        assert each.config["options"]["entries"] == sum(len(t) for key, t in each.tensors.items() if "values" in key)
        loaded = METHOD.load(tiny_llama(), write(each, tmp_path / order))
        ids = torch.arange(3, 30)[None]
        assert_close(loaded.model(ids).logits, theirs.model(ids).logits)


def test_a_tasks_head_goes_with_it() -> None:
    task, language = trained(0, tiny_bert()), trained(1, tiny_bert())
    heads = {key for key in task.tensors if not key.endswith(("indices", "values"))}
    assert heads
    bodies = {key: tensor for key, tensor in language.tensors.items() if key not in heads}
    merged = merge([Adapter("language", language.config, bodies), task], Sum())
    for key in heads:
        assert torch.equal(merged.tensors[key], task.tensors[key])
