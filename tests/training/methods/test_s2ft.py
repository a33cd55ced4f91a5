"""S²FT against full fine-tuning of whole heads and channels, and against the paper's permuted model."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from infra.errors import CorruptArtifact, InvalidInput
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tests.training.methods.backbones import BACKBONES, logits, loss, train
from tests.training.methods.plain_lora import stock_lora
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.injected import InjectedAdapted

S2FT = get_method("s2ft")
SPARSE = {"output": 0.25, "down": 0.1}
DENSE = {"output": 0.4, "down": 0.3, "value": 0.6, "up": 0.2}
BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "t5": tiny_t5}


def attached(model: nn.Module, calibration: Any = None, name: str = "default", **options: object) -> InjectedAdapted:
    return S2FT.attach(model, S2FT.config_type(**options), AttachContext(seed=3, calibration=calibration), name)


def indices(adapted: InjectedAdapted) -> dict[str, list[int]]:
    return {place: slot.indices.tolist() for place, slot in adapted.slots().items()}


def columns(model: nn.Module, place: str) -> Tensor:
    """The layer's weight, one column an input."""
    layer = model.get_submodule(place)
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def part(matrix: Tensor, slot: Any) -> Tensor:
    """What of a matrix like W the slot trains."""
    return matrix[:, slot.indices] if hasattr(slot, "delta") else matrix[slot.indices]


def delta(slot: Any) -> nn.Parameter:
    return slot.delta if hasattr(slot, "delta") else slot.delta_rows


@pytest.mark.parametrize("backbone", BUILDERS)
def test_the_gradient_is_that_of_the_chosen_columns_and_rows(backbone: str) -> None:
    build, batch = BUILDERS[backbone], BACKBONES[backbone].batch()
    adapted, full = attached(build(), **DENSE), build()
    assert torch.equal(logits(adapted.model, batch), logits(full, batch))
    loss(adapted.model, batch).backward()
    loss(full, batch).backward()
    kinds = set()
    for place, slot in adapted.slots().items():
        layer = full.get_submodule(place)
        gradient = layer.weight.grad.T if isinstance(layer, Conv1D) else layer.weight.grad
        assert_close(delta(slot).grad, part(gradient, slot), atol=1e-5, rtol=1e-4)
        kinds.add(place.rpartition(".")[2])
    assert len(kinds) >= (2 if backbone == "bert" else 3)  # BERT calls three of the four "dense"


def test_heads_are_whole_and_channels_single_in_the_numbers_that_the_ratios_say() -> None:
    chosen = indices(attached(tiny_llama(), **DENSE))
    of = {
        role: [(p, i) for p, some in chosen.items() if role in p for i in some] for role in ("o_p", "v_p", "down", "up")
    }
    assert len(of["down"]) == int(0.3 * 2 * 48) and len(of["up"]) == int(0.2 * 2 * 48)
    for role, heads in (("o_p", int(0.4 * 2 * 4)), ("v_p", int(0.6 * 2 * 2))):  # four query heads, two key-value heads
        units = {(place, index // 8) for place, index in of[role]}
        assert len(units) == heads and len(of[role]) == heads * 8


def test_a_fused_layers_values_are_its_last_third() -> None:
    chosen = indices(attached(tiny_gpt2(), output=0, down=0, value=1))
    assert chosen == {f"transformer.h.{layer}.attn.c_attn": list(range(64, 96)) for layer in (0, 1)}


def test_only_layers_with_something_chosen_are_wrapped() -> None:
    adapted = attached(tiny_llama(layers=6), output=0.001, down=0)
    assert len(adapted.slots()) == len(adapted.layers()) == 1


def test_the_papers_model_has_the_papers_number_of_parameters() -> None:
    """LLaMA-2-7B: 53 heads and 7045 channels of 4096."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32))
    assert S2FT.count(model, S2FT.config_type()) == 53 * 128 * 4096 + 7045 * 4096


def test_ten_steps_are_those_of_the_permuted_model() -> None:
    """The paper's build: the chosen heads and channels moved to the front, that slice of W trained in place."""
    config = tiny_llama().config
    config.num_key_value_heads = 4
    batch = BACKBONES["llama"].batch()

    def build() -> LlamaForCausalLM:
        torch.manual_seed(5)
        return LlamaForCausalLM(config)

    adapted, permuted = attached(build(), **SPARSE), build()
    slices = {}
    for number, layer in enumerate(permuted.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for place, inner, outer, size in (
            ("self_attn.o_proj", (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj, 32),
            ("mlp.down_proj", (mlp.gate_proj, mlp.up_proj), mlp.down_proj, 48),
        ):
            first = indices(adapted).get(f"model.layers.{number}.{place}", [])
            order = first + [index for index in range(size) if index not in first]
            with torch.no_grad():
                for module in inner:
                    module.weight.copy_(module.weight[order])
                outer.weight.copy_(outer.weight[:, order])
            if first:
                slices[outer] = nn.Parameter(outer.weight[:, : len(first)].detach().clone())
    assert_close(logits(permuted, batch), logits(build(), batch), atol=1e-5, rtol=1e-5)

    mine = torch.optim.AdamW(adapted.trainable().values(), lr=0.01, weight_decay=0)
    theirs = torch.optim.AdamW(slices.values(), lr=0.01, weight_decay=0)
    for step in range(10):
        adapted.model.zero_grad()
        permuted.zero_grad()
        values = loss(adapted.model, batch), loss(permuted, batch)
        for value in values:
            value.backward()
        for layer, trained in slices.items():
            trained.grad = layer.weight.grad[:, : trained.shape[1]]
        mine.step()
        theirs.step()
        with torch.no_grad():
            for layer, trained in slices.items():
                layer.weight[:, : trained.shape[1]] = trained
        assert values[0].item() == pytest.approx(values[1].item(), rel=1e-4, abs=1e-4), step
    assert (logits(permuted, batch) - logits(build(), batch)).abs().max() > 1e-2


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_what_is_not_chosen_keeps_every_bit(backbone: str) -> None:
    build = BUILDERS[backbone]
    adapted = attached(build(), **DENSE)
    train(adapted, BACKBONES[backbone].batch(), steps=4)
    merged, bare, slots = adapted.merge(), build(), adapted.slots()
    for name, parameter in merged.named_parameters():
        place = name.removesuffix(".weight")
        changed = parameter != bare.get_parameter(name)
        if place in slots:
            changed = changed.T if isinstance(bare.get_submodule(place), Conv1D) else changed
            expected = torch.zeros_like(changed)
            if hasattr(slots[place], "delta"):
                expected[:, slots[place].indices] = True
            else:
                expected[slots[place].indices] = True
            assert not (changed & ~expected).any() and part(changed, slots[place]).float().mean() > 0.9
        else:
            assert not changed.any()


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_the_same_as_a_plain_lora_of_as_many_ranks(backbone: str) -> None:
    build, batch = BUILDERS[backbone], BACKBONES[backbone].batch()
    adapted, base = attached(build(), **DENSE), build()
    train(adapted, batch)
    before = logits(base, batch)
    pairs = {place: slot.low_rank(columns(base, place)) for place, slot in adapted.slots().items()}
    for place, (A, B) in pairs.items():
        assert A.shape[0] == B.shape[1] == len(adapted.slots()[place].indices)
        assert A.dtype == B.dtype == torch.float32
    shown = logits(adapted.model, batch)
    assert_close(logits(stock_lora(base, pairs), batch), shown, atol=1e-5, rtol=1e-5)
    assert (shown - before).abs().max() > 1e-2


def test_adapters_of_disjoint_channels_merge_in_either_order_to_the_same_bits(tmp_path) -> None:
    batch = BACKBONES["llama"].batch()
    for choose in ("smallest", "largest"):
        adapted = attached(tiny_llama(), **SPARSE, selection="weight", choose=choose)
        train(adapted, batch)
        adapted.save(tmp_path / choose)
    weights = []
    for order in (("smallest", "largest"), ("largest", "smallest")):
        model = tiny_llama()
        chosen = []
        for name in order:
            adapted = S2FT.load(model, tmp_path / name)
            chosen.append({(place, index) for place, some in indices(adapted).items() for index in some})
            model = adapted.merge()
        assert chosen[0] and not chosen[0] & chosen[1]
        weights.append(model.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


# -- selection by score ------------------------------------------------------------------------------------------------


def expected_choice(scores: Mapping[str, Tensor], count: int, largest: bool) -> dict[str, list[int]]:
    """The units of the most extreme scores of a pool, by plain sorting."""
    ranked = sorted(
        ((v.item(), place, unit) for place, s in scores.items() for unit, v in enumerate(s)), reverse=largest
    )
    found: dict[str, list[int]] = {}
    for _, place, unit in ranked[:count]:
        found.setdefault(place, []).append(unit)
    return {place: sorted(units) for place, units in found.items()}


def observed(model: nn.Module, place: str, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Mean absolute input feature of a layer over the unmasked positions, batches alike."""
    means = []
    for batch in batches:
        seen = []
        handle = model.get_submodule(place).register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # noqa: B023
        logits(model, {name: t for name, t in batch.items() if name != "labels"})
        handle.remove()
        rows = [seen[0][row, at] for row in range(2) for at in range(7) if batch["attention_mask"][row, at]]
        means.append(torch.stack(rows).abs().mean(dim=0))
    return torch.stack(means).mean(dim=0)


@pytest.mark.parametrize("choose", ["smallest", "largest"])
@pytest.mark.parametrize("selection", ["weight", "activation", "weight-activation", "gradient"])
def test_channels_and_heads_are_chosen_by_their_score(selection: str, choose: str) -> None:
    batches = [dict(batch) for batch in BACKBONES["llama"].calibration()]
    batches[1]["input_ids"] = (batches[1]["input_ids"] + 7) % 250 + 3
    batches[1]["labels"] = batches[1]["labels"].clamp(min=-100)
    adapted = attached(tiny_llama(), lambda: iter(batches), **SPARSE, selection=selection, choose=choose)
    model = tiny_llama().eval()
    for batch in batches:
        model(**batch).loss.backward()
    for part_name, size, count in (("self_attn.o_proj", 8, int(0.25 * 8)), ("mlp.down_proj", 1, int(0.1 * 96))):
        scores = {}
        for place in (f"model.layers.{layer}.{part_name}" for layer in (0, 1)):
            weight = model.get_submodule(place).weight
            units = weight.shape[1] // size
            norms = torch.stack([weight[:, u * size : (u + 1) * size].norm() for u in range(units)])
            sizes = observed(model, place, batches).view(units, size).mean(dim=1)
            gradients = torch.stack([weight.grad[:, u * size : (u + 1) * size].norm() for u in range(units)])
            scores[place] = {
                "weight": norms, "activation": sizes, "weight-activation": norms * sizes, "gradient": gradients
            }[selection]  # fmt: skip
        wanted = expected_choice(scores, count, choose == "largest")
        found = {p: sorted({i // size for i in some}) for p, some in indices(adapted).items() if p.endswith(part_name)}
        assert found == wanted


@pytest.mark.parametrize("selection", ["activation", "gradient"])
def test_calibration_sees_the_bare_base_and_leaves_no_trace(selection: str) -> None:
    data = BACKBONES["llama"].calibration
    alone = indices(attached(tiny_llama(), data, **SPARSE, selection=selection))
    first = attached(tiny_llama().train(), **SPARSE)
    train(first, BACKBONES["llama"].batch(), rate=0.5)
    second = attached(first.model, data, "second", **SPARSE, selection=selection)
    assert indices(second) == alone
    assert all(module.training and not module._forward_hooks for module in second.model.modules())
    assert all(parameter.grad is None for parameter in second.model.parameters())
    assert second.trainable().keys() == {
        name for name, _ in second.model.named_parameters() if ".slots.second." in name
    }


def test_a_kept_choice_is_taken_without_running_the_model() -> None:
    class Kept:
        def get(self, what: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            told.append(what)
            return {
                "model.layers.1.mlp.down_proj": torch.arange(9),
                "model.layers.0.self_attn.o_proj": torch.arange(16),
            }

    told: list[Mapping[str, Any]] = []
    config = S2FT.config_type(**SPARSE, selection="gradient")
    adapted = S2FT.attach(tiny_llama(), config, AttachContext(starts=Kept()))
    assert indices(adapted)["model.layers.1.mlp.down_proj"] == list(range(9))
    assert told[0]["method"] == "s2ft" and told[0]["selection"] == "gradient"


@pytest.mark.parametrize("calibration", [None, list])
@pytest.mark.parametrize("selection", ["activation", "weight-activation", "gradient"])
def test_selection_by_data_needs_data(selection: str, calibration: Any) -> None:
    model = tiny_llama()
    with pytest.raises(InvalidInput, match="needs calibration data"):
        attached(model, calibration, selection=selection)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_an_architecture_without_known_layers_is_refused() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    with pytest.raises(
        InvalidInput, match=r"the 'output' layers of ModuleDict, whose linear modules are first, second"
    ):
        attached(model)


def test_heads_that_do_not_fit_the_configuration_are_refused() -> None:
    model = tiny_llama()
    model.config.head_dim = 5
    with pytest.raises(InvalidInput, match=r"cannot tell the heads of .*o_proj: 32 features, heads of 5"):
        attached(model)
    attached(model, output=0, down=0.1)


def test_a_fused_layer_of_unequal_parts_is_refused() -> None:
    model = tiny_gpt2()
    model.transformer.h[1].attn.c_attn = Conv1D(48, 32)
    with pytest.raises(InvalidInput, match=r"cannot tell the heads of transformer\.h\.1\.attn\.c_attn"):
        attached(model, value=0.5)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing would train"):
        S2FT.config_type(output=0, down=0)


def test_a_file_without_one_of_the_layers_is_refused(tmp_path) -> None:
    attached(tiny_llama(), **DENSE).save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if "layers.1.mlp.down_proj" not in name}
    save_file(tensors, path)
    with pytest.raises(CorruptArtifact, match=r"trained weights, .* expected"):
        S2FT.load(tiny_llama(), tmp_path)
