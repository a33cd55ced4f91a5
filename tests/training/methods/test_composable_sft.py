"""LT-SFT: the mask against brute force, the phases of a training, what is outside the mask, and sums of differences."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel

from infra.errors import Conflict, InvalidInput
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tests.training.methods.backbones import BACKBONES, logits, loss, train
from tests.training.tiny_training import run, same_bits
from training.methods.composable_sft import METHOD, ComposableSftAdapted, ComposableSftConfig
from training.methods.contract import AttachContext
from training.methods.injected import base_of
from training.methods.sparse_delta import largest
from training.options import TrainingOptions
from training.recipe import load_recipe

BATCH = BACKBONES["llama"].batch()


class Layer(nn.Module):
    """A model of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))
            self.layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def attach(model: nn.Module, total: int = 10, name: str = "default", **options: Any) -> ComposableSftAdapted:
    return METHOD.attach(model, ComposableSftConfig(**options), AttachContext(total_steps=total), name)


def indices(adapted: ComposableSftAdapted) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in adapted.tensors().items() if name.endswith("_indices")}


# -- the mask ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 30, 41])
@pytest.mark.parametrize("ties", [False, True])
def test_the_mask_is_the_largest_of_all_tensors_together(count: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    tensors = {
        name: torch.randn(shape, generator=generator) for name, shape in {"a": (4, 5), "b": (3,), "c": (6, 3)}.items()
    }
    if ties:
        tensors = {name: tensor.sign() * (tensor > 0.5) for name, tensor in tensors.items()}
    everything = torch.cat([tensor.view(-1) for tensor in tensors.values()]).abs()
    expected = torch.zeros(41, dtype=torch.bool)
    expected[everything.argsort(descending=True, stable=True)[:count]] = True
    masks = largest(tensors, count)
    assert all(masks[name].shape == tensor.shape for name, tensor in tensors.items())
    assert torch.equal(torch.cat([mask.view(-1) for mask in masks.values()]), expected)


def test_the_end_of_the_full_phase() -> None:
    model = tiny_bert()
    batch = BACKBONES["bert"].batch()
    before = logits(model, batch)
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = attach(model, entries=100)
    optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss(adapted.model, batch).backward()
        optimizer.step()
    moved = {
        (place, name): getattr(slot, name).detach().abs()
        for place, slot in adapted.dense.items()
        for name in slot.names
    }
    least = torch.cat([change.view(-1) for change in moved.values()]).sort(descending=True).values[99]
    (callback,) = adapted.callbacks()
    for step in range(1, 5):
        callback.on_step_end(None, _state(step), None, optimizer=optimizer)
    assert not adapted.masked
    assert not torch.equal(logits(model, batch), before)
    assert optimizer.state
    callback.on_step_end(None, _state(5), None, optimizer=optimizer)
    assert adapted.masked
    assert torch.equal(logits(model, batch), before)
    assert not optimizer.state
    assert all(torch.equal(adapted.dense[place].mask(name), change >= least) for (place, name), change in moved.items())
    (head,) = (slot for slot in adapted.slots().values() if slot not in adapted.dense.values())
    assert torch.equal(head.weight, held["classifier.weight"])
    assert torch.equal(head.bias, held["classifier.bias"])
    train(adapted, batch)
    assert not torch.equal(head.weight, held["classifier.weight"])  # the head has no mask


def _state(step: int) -> Any:
    return type("State", (), {"global_step": step})


def test_what_changes_and_what_does_not() -> None:
    adapted = attach(tiny_llama())
    assert not any("norm" in place or "lm_head" in place for place in adapted.slots())
    assert {"model.embed_tokens", "model.layers.1.mlp.down_proj"} < set(adapted.slots())
    assert "base_model.model.classifier.weight" in attach(tiny_bert()).tensors()
    model = tiny_t5()
    tied = attach(model)
    assert "shared" in tied.slots()
    assert "encoder.embed_tokens" not in tied.slots()
    assert base_of(model.encoder.embed_tokens) is not base_of(model.shared)
    assert model.encoder.embed_tokens.slots["default"] is model.shared.slots["default"]
    assert isinstance(model.lm_head, nn.Linear)  # untied by leaving it out


# -- a training --------------------------------------------------------------------------------------------------------


def options(**changed: Any) -> TrainingOptions:
    given = {"steps": 10, "batch_size": 4, "gradient_accumulation": 2, "learning_rate": 1e-2, "checkpoint_every": 2}
    return TrainingOptions(**given | changed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ComposableSftAdapted:
    chosen = options(weight_decay=0.5, max_grad_norm=0.1)
    adapted, _ = run(tmp_path_factory.mktemp("trained"), chosen, attach(tiny_llama(), entries=500, full_share=0.4))
    return adapted


def test_outside_the_mask_everything_is_as_it_was_in_spite_of_decay_and_clipping(trained: ComposableSftAdapted) -> None:
    before, after = tiny_llama().state_dict(), trained.merge().state_dict()
    places = {name.removeprefix("base_model.model."): t for name, t in indices(trained).items()}
    changed = 0
    for name, tensor in before.items():
        different = (after[name] != tensor).view(-1)
        allowed = torch.zeros_like(different)
        place, _, kind = name.rpartition(".")
        if f"{place}.{kind}_indices" in places:
            allowed[places[f"{place}.{kind}_indices"].long()] = True
        assert not (different & ~allowed).any()
        changed += int(different.sum())
    assert sum(len(t) for t in places.values()) == 500
    assert 450 < changed <= 500


def test_it_is_stored_as_k_entries_and_loads_to_the_same_bits(trained: ComposableSftAdapted, tmp_path: Path) -> None:
    trained.save(tmp_path)
    loaded = METHOD.load(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded.model, BATCH), logits(trained.model, BATCH))
    assert sum(parameter.numel() for parameter in loaded.trainable().values()) == 500
    assert same_bits(loaded.tensors(), trained.tensors())
    other = attach(tiny_llama(), entries=500)
    other.restore(trained.tensors())
    assert torch.equal(logits(other.model, BATCH), logits(trained.model, BATCH))
    assert same_bits(other.tensors(), trained.tensors())


def test_both_phases_run_through_the_whole_schedule(tmp_path: Path) -> None:
    rates: list[float] = []
    chosen = options(warmup_steps=2, gradient_accumulation=1)
    run(
        tmp_path,
        chosen,
        attach(tiny_llama(), full_share=0.4),
        on_event=lambda event: rates.append(event.learning_rate),
    )

    def cosine(part: float) -> float:  # of ten steps, two of which warm up
        step = part * 10
        return 1e-2 * (step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 8)))

    assert rates == pytest.approx([cosine(n / 4) for n in range(4)] + [cosine(n / 6) for n in range(6)])


@pytest.mark.parametrize("crash", [3, 5, 9])  # in the full phase, right after it, in the sparse phase
def test_a_crashed_training_resumes_to_the_same_bits(tmp_path: Path, crash: int) -> None:
    def fresh() -> ComposableSftAdapted:
        return attach(tiny_llama(), entries=500, full_share=0.4, l1=0.1)

    def stop(event: Any) -> None:
        if event.step == crash:
            raise RuntimeError("the power is gone")

    whole, _ = run(tmp_path / "whole", options(), fresh())
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "crashed", options(), fresh(), on_event=stop)
    resumed, outcome = run(tmp_path / "crashed", options(), fresh())
    assert outcome.resumed_from == (crash - 1) // 2 * 2
    assert same_bits(resumed.tensors(), whole.tensors())
    assert resumed.masked


def test_with_all_entries_the_sparse_phase_is_plain_fine_tuning() -> None:
    adapted = attach(tiny_llama(), density=1.0)
    adapted.rewind()
    plain = tiny_llama()
    changing = [module for name, module in plain.named_modules() if name in adapted.slots()]
    frozen = [p for p in plain.parameters() if not any(p is module.weight for module in changing)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for model, parameters in (
        (adapted.model, list(adapted.trainable().values())),
        (plain, [module.weight for module in changing]),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model, BATCH).backward()
            optimizer.step()
    assert_close(logits(adapted.model, BATCH), logits(plain, BATCH), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(plain, BATCH), logits(tiny_llama(), BATCH), atol=1e-2)


def test_in_the_sparse_phase_no_gradient_of_the_whole_weight_is_taken() -> None:
    adapted = attach(Layer(), entries=5)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    (slot,) = adapted.slots().values()

    def products() -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []

        class Products(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                    shapes.append(tuple(result.shape))
                return result

        with Products():
            adapted.model(x).square().sum().backward()
        return shapes

    assert (12, 12) in products()
    slot.weight.data.normal_()
    adapted.rewind()
    slot.weight.grad = None
    weight = adapted.layers()["layer"].base_layer.weight.detach().clone().requires_grad_()
    functional.linear(x, weight).square().sum().backward()
    assert (12, 12) not in products()
    assert_close(slot.weight.grad, weight.grad * slot.mask("weight"))


def test_a_loaded_adapter_trains_on_in_its_places(tmp_path: Path) -> None:
    adapted = attach(Layer(), entries=5)
    (slot,) = adapted.slots().values()
    slot.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    adapted.save(tmp_path)
    loaded = METHOD.load(Layer(), tmp_path)
    (slot,) = loaded.slots().values()
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    base = loaded.layers()["layer"].base_layer
    loaded.model(x).square().sum().backward()
    weight = (base.weight.detach() + slot.difference("weight", base.weight).detach()).requires_grad_()
    bias = (base.bias.detach() + slot.difference("bias", base.bias).detach()).requires_grad_()
    functional.linear(x, weight, bias).square().sum().backward()
    assert_close(slot.weight.values.grad, weight.grad.view(-1)[slot.weight.indices.long()])
    assert_close(slot.bias.values.grad, bias.grad[slot.bias.indices.long()])


def test_with_no_entries_only_the_head_trains() -> None:
    batch = BACKBONES["bert"].batch()
    adapted = attach(tiny_bert(), entries=0)
    adapted.rewind()
    train(adapted, batch)
    tensors = adapted.tensors()
    assert all(len(tensor) == 0 for tensor in indices(adapted).values())
    plain = tiny_bert()
    plain.classifier.load_state_dict(
        {name: tensors[f"base_model.model.classifier.{name}"] for name in ("weight", "bias")}
    )
    assert_close(logits(adapted.model, batch), logits(plain, batch))
    assert not torch.equal(logits(tiny_bert(), batch), logits(plain, batch))


def test_the_penalty_is_that_of_the_paper() -> None:
    model = tiny_bert()
    size = sum(parameter.numel() for parameter in model.parameters())
    adapted = attach(model, entries=300, l1=0.1)
    train(adapted, BACKBONES["bert"].batch())
    adapted.rewind()
    train(adapted, BACKBONES["bert"].batch())
    penalty = adapted.extra_loss(None, {})
    penalty.backward()
    expected = 0.0
    for place, slot in adapted.slots().items():
        for name in slot.names:
            change = getattr(slot, name).detach()
            change = change - getattr(base_of(model.get_submodule(place)), name) if place == "classifier" else change
            expected += change.abs().sum().item()
            assert_close(getattr(slot, name).grad, 0.1 / size * change.sign())
    assert penalty.item() == pytest.approx(0.1 / size * expected, rel=1e-5)
    assert attach(tiny_bert()).extra_loss(None, {}) is None


def test_the_penalty_does_not_depend_on_the_accumulation(tmp_path: Path) -> None:
    def after(name: str, **changed: Any) -> dict[str, Tensor]:
        chosen = options(steps=2, max_grad_norm=1e9, **changed)
        adapted = attach(tiny_llama(), density=1.0, l1=1e4)
        adapted.total_steps = None  # both steps of the first phase
        train(adapted, BATCH, steps=1)
        run(tmp_path / name, chosen, adapted)
        return adapted.checkpoint()

    whole, parts = after("whole", batch_size=8, gradient_accumulation=1), after("parts")
    for name, tensor in whole.items():
        assert_close(parts[name], tensor, atol=1e-4, rtol=1e-3)


# -- sums --------------------------------------------------------------------------------------------------------------


def pair(model: nn.Module, batch: dict[str, Tensor]) -> tuple[ComposableSftAdapted, ComposableSftAdapted]:
    """Two trained adapters on one model, whose masks overlap."""
    found = []
    for name, rate in (("language", 0.02), ("task", -0.03)):
        adapted = attach(model, name=name, entries=2000)
        train(adapted, batch, rate=abs(rate))
        adapted.rewind()
        train(adapted, batch, steps=3, rate=abs(rate))
        found.append(adapted)
    return found[0], found[1]


def test_a_sum_is_the_sum_of_the_differences_in_either_order_and_leaves_its_parts() -> None:
    model = tiny_llama()
    first, second = pair(model, BATCH)
    alone = {adapted.name: adapted.merge().state_dict() for adapted in (first, second)}
    both = METHOD.compose([first, second], "both")
    turned = METHOD.compose([second, first], "turned")
    assert same_bits(both.tensors(), turned.tensors())
    base, merged = tiny_llama().state_dict(), both.merge().state_dict()
    for name, tensor in base.items():
        expected = tensor + (alone["language"][name] - tensor) + (alone["task"][name] - tensor)
        assert_close(merged[name], expected, atol=1e-6, rtol=1e-6)
    counts = [sum(map(len, indices(adapted).values())) for adapted in (first, second, both)]
    assert counts[:2] == [2000, 2000]
    assert 2000 < counts[2] < 4000  # some entries are in both
    for adapted in (first, second):
        adapted.activate()
        assert_close(adapted.merge().state_dict(), alone[adapted.name], atol=0, rtol=0)
    with both.disabled():
        assert torch.equal(logits(model, BATCH), logits(tiny_llama(), BATCH))


def test_a_sum_is_an_adapter_like_any_other(tmp_path: Path) -> None:
    batch = BACKBONES["bert"].batch()
    first, second = pair(tiny_bert(), batch)
    both = METHOD.compose([first, second], "both")
    both.save(tmp_path)
    assert torch.equal(logits(METHOD.load(tiny_bert(), tmp_path).model, batch), logits(both.model, batch))
    head = "base_model.model.classifier.weight"
    assert torch.equal(both.tensors()[head], second.tensors()[head])
    assert not torch.equal(both.tensors()[head], first.tensors()[head])
    before = logits(both.model, batch)
    train(both, batch)
    assert not torch.equal(logits(both.model, batch), before)


def test_a_swapped_language_does_better_and_the_chosen_mask_beats_a_random_one() -> None:
    """Languages and tasks are sparse changes of a linear map; a task is learned on one language, used on another."""
    generator = torch.Generator().manual_seed(0)

    def secret() -> Tensor:
        change = torch.zeros(144)
        change[torch.randperm(144, generator=generator)[:12]] = 2.0
        return change.view(12, 12)

    base = Layer().layer.weight.detach()
    languages, task = [secret(), secret()], secret()

    def difference(start: Tensor, target: Tensor, random: bool = False) -> tuple[Tensor, float]:
        """φ from `start` to `target`, and the loss that is left."""
        model = Layer()
        model.layer.weight.data.copy_(start)
        adapted = attach(model, entries=14)
        slot = adapted.dense["layer"]
        for phase in range(2):
            optimizer = torch.optim.Adam(adapted.trainable().values(), lr=0.05)
            for step in range(120):
                x = torch.randn(32, 12, generator=torch.Generator().manual_seed(step))
                error = functional.mse_loss(model(x), x @ target.T)
                optimizer.zero_grad()
                error.backward()
                optimizer.step()
            if phase == 0:
                adapted.rewind()
                if random:
                    chosen = torch.randperm(144, generator=generator)[:14]
                    slot.weight_mask = torch.zeros(144, dtype=torch.bool).index_fill(0, chosen, True).view(12, 12)
        return slot.update(start), error.item()

    spoken = [difference(base, base + language)[0] for language in languages]
    learned, left = difference(base + spoken[0], base + languages[0] + task)
    wanted = base + languages[1] + task
    swapped = (base + spoken[1] + learned - wanted).square().sum()
    task_only = (base + learned - wanted).square().sum()
    assert swapped < 0.1 * task_only
    assert left < 0.1 * difference(base + spoken[0], base + languages[0] + task, random=True)[1]


# -- merging, and errors -----------------------------------------------------------------------------------------------


def test_a_merged_model_with_tied_embeddings_survives_storing(tmp_path: Path) -> None:
    adapted = attach(tiny_gpt2(), density=1.0)
    train(adapted, BATCH)
    merged = adapted.merge()
    assert not torch.equal(merged.lm_head.weight, merged.transformer.wte.weight)
    merged.save_pretrained(tmp_path)
    assert_close(logits(GPT2LMHeadModel.from_pretrained(tmp_path), BATCH), logits(adapted.model, BATCH))


def test_what_does_not_go_is_said(tmp_path: Path) -> None:
    for steps in (None, 1):
        with pytest.raises(InvalidInput, match="trains in two phases"):
            METHOD.attach(tiny_llama(), ComposableSftConfig(), AttachContext(total_steps=steps))
    model = Layer()
    with pytest.raises(InvalidInput, match="157 entries are to be kept, but only 156 may change"):
        attach(model, entries=157)
    assert isinstance(model.layer, nn.Linear)  # nothing was left on it
    with pytest.raises(InvalidInput, match="has no layer that 'composable-sft' could change"):
        attach(nn.Sequential(nn.LayerNorm(3)))
    adapted = attach(model)
    with pytest.raises(InvalidInput, match="on one model"):
        METHOD.compose([adapted, attach(Layer())], "sum")
    with pytest.raises(InvalidInput, match="on one model"):
        METHOD.compose([], "sum")
    with pytest.raises(Conflict, match="'default'"):
        METHOD.compose([adapted], "default")


def test_early_stopping_is_refused_in_the_recipe(tmp_path: Path) -> None:
    content = (
        "adapter: a\nbase: b\nmethod: composable-sft\ndata: {task: navigate}\n"
        "training: {validate_every: 2, early_stopping: 2}\n"
    )
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(InvalidInput, match="early_stopping does not go with 'composable-sft'"):
        load_recipe(tmp_path / "recipe.yaml")
