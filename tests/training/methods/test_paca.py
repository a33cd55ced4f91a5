"""PaCA against full fine-tuning of a few columns, written out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from infra.errors import CorruptArtifact, InvalidInput
from tests.tiny_models import tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, loss, train
from tests.training.methods.plain_lora import stock_lora
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.injected import InjectedAdapted

BATCH = BACKBONES["llama"].batch()
PACA = get_method("paca")


def attached(model: nn.Module, **options: object) -> InjectedAdapted:
    return PACA.attach(model, PACA.config_type(**options), AttachContext(seed=3))


def columns(model: nn.Module, place: str) -> Tensor:
    """The layer's weight, one column an input."""
    layer = model.get_submodule(place)
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def whole(build: Callable[[], nn.Module], adapted: InjectedAdapted) -> tuple[nn.Module, dict[str, Tensor]]:
    """A fresh model, and the gradient of all of each adapted weight at the start, as columns."""
    model = build()
    loss(model, BATCH).backward()
    gradients = {}
    for place in adapted.slots():
        layer = model.get_submodule(place)
        gradients[place] = layer.weight.grad.T if isinstance(layer, Conv1D) else layer.weight.grad
    return model, gradients


def test_a_fresh_adapter_leaves_every_bit_of_the_logits() -> None:
    assert torch.equal(logits(attached(tiny_llama()).model, BATCH), logits(tiny_llama(), BATCH))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_gradient_is_that_of_the_columns(build: Callable[[], nn.Module]) -> None:
    adapted = attached(build(), rank=4, alpha=12)
    loss(adapted.model, BATCH).backward()
    _, gradients = whole(build, adapted)
    for place, slot in adapted.slots().items():
        assert slot.indices.unique().shape == (4,)
        assert_close(slot.delta.grad, 3 * gradients[place][:, slot.indices], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("alpha", "times"), [(4, 1), (8, 4), (12, 9)])
def test_a_step_of_sgd_moves_the_columns_by_the_scale_squared_and_nothing_else(alpha: int, times: int) -> None:
    adapted = attached(tiny_llama(), rank=4, alpha=alpha)
    loss(adapted.model, BATCH).backward()
    torch.optim.SGD(adapted.trainable().values(), lr=0.01).step()
    merged = adapted.merge()
    model, gradients = whole(tiny_llama, adapted)
    for place, slot in adapted.slots().items():
        moved = torch.zeros_like(gradients[place])
        moved[:, slot.indices] = gradients[place][:, slot.indices]
        assert_close(columns(merged, place), columns(model, place) - 0.01 * times * moved, atol=1e-6, rtol=1e-5)


def test_other_columns_and_layers_keep_every_bit_and_the_chosen_ones_change() -> None:
    adapted = attached(tiny_llama(), rank=4, exclude=("k_proj",))
    train(adapted, BATCH, steps=4)
    merged, bare, slots = adapted.merge().state_dict(), tiny_llama().state_dict(), adapted.slots()
    assert len(slots) == 12
    for name, weight in merged.items():
        slot = slots.get(name.removesuffix(".weight"))
        changed = (weight != bare[name]).any(dim=0) if weight.ndim == 2 else weight != bare[name]
        chosen = [] if slot is None else slot.indices.tolist()
        assert changed.nonzero().flatten().tolist() == chosen


def test_twenty_steps_are_those_of_columns_trained_in_place_and_of_a_lora_with_a_frozen_choice() -> None:
    """The paper's form, s·P written into W after each step, and peft's LoRA with A one-hot."""
    adapted = attached(tiny_llama(), rank=4, alpha=8)
    slots = adapted.slots()

    in_place = tiny_llama()
    layers = {place: in_place.get_submodule(place) for place in slots}
    parts = {p: nn.Parameter(layer.weight[:, slots[p].indices].detach() / 2) for p, layer in layers.items()}

    pairs = {place: slot.low_rank(columns(in_place, place)) for place, slot in slots.items()}
    lora = stock_lora(tiny_llama(), {place: (2 * A, B) for place, (A, B) in pairs.items()})
    for name, parameter in lora.named_parameters():
        parameter.requires_grad_("lora_B" in name)

    optimisers = [
        torch.optim.Adam(chosen, lr=0.005)
        for chosen in (adapted.trainable().values(), parts.values(), [p for p in lora.parameters() if p.requires_grad])
    ]
    for step in range(20):
        losses = []
        for model, optimiser in zip((adapted.model, in_place, lora), optimisers, strict=True):
            model.zero_grad()
            value = loss(model, BATCH)
            value.backward()
            losses.append(value.item())
            if model is in_place:
                for place, part in parts.items():
                    part.grad = 2 * layers[place].weight.grad[:, slots[place].indices]
            optimiser.step()
            if model is in_place:
                with torch.no_grad():
                    for place, part in parts.items():
                        layers[place].weight[:, slots[place].indices] = 2 * part
        assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4, abs=1e-4), step


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_same_as_a_plain_lora(build: Callable[[], nn.Module]) -> None:
    adapted = attached(build(), rank=3, alpha=6)
    train(adapted, BATCH)
    base = build()
    before = logits(base, BATCH)
    pairs = {place: slot.low_rank(columns(base, place)) for place, slot in adapted.slots().items()}
    assert all(((A == 0) | (A == 1)).all() and (A.sum(dim=1) == 1).all() for A, _ in pairs.values())
    shown = logits(adapted.model, BATCH)
    assert_close(logits(stock_lora(base, pairs), BATCH), shown, atol=1e-5, rtol=1e-5)
    assert (shown - before).abs().max() > 1e-2


def test_every_column_is_full_fine_tuning_of_the_weight() -> None:
    adapted = attached(tiny_llama(), rank=32, targets=("q_proj",))
    loss(adapted.model, BATCH).backward()
    _, gradients = whole(tiny_llama, adapted)
    for place, slot in adapted.slots().items():
        assert slot.indices.tolist() == list(range(32))
        assert_close(slot.delta.grad, gradients[place], atol=1e-5, rtol=1e-4)


def test_layers_draw_their_columns_apart() -> None:
    draws = [
        tuple(slot.indices.tolist()) for slot in attached(tiny_llama(), targets=("q_proj", "k_proj")).slots().values()
    ]
    assert len(set(draws)) == 4


def test_a_rank_above_a_layers_inputs_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(InvalidInput, match=r"rank 33 is above the 32 columns of model\.layers\.0\.self_attn\.q_proj"):
        attached(model, rank=33)
    attached(model, rank=33, targets=("down_proj",))  # 48 inputs


def test_a_target_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInput, match="matches no module of LlamaForCausalLM"):
        attached(tiny_llama(), targets=("c_attn",))


def test_a_stored_rank_other_than_the_options_is_refused(tmp_path) -> None:
    attached(tiny_llama(), rank=4).save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"rank": 4', '"rank": 5'))
    with pytest.raises(CorruptArtifact, match="4 columns, but the options say 5"):
        PACA.load(tiny_llama(), tmp_path)
