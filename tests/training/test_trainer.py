"""What the trainer optimises, and that it honours options and the method's hooks."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from infra.errors import InvalidInput, RegraftError
from tests.tiny_models import PAD, tiny_llama, tiny_tokenizer
from tests.training.tiny_training import EXAMPLES, HELD_OUT, OPTIONS, fresh, run, same_bits
from training.data.batching import Padding
from training.data.encoding import encode
from training.device import base_dtype
from training.methods.contract import Adapted
from training.options import TrainingOptions
from training.progress import TrainingEvent, TrainingOutcome
from training.trainer import total_steps


def options(**changed: object) -> TrainingOptions:
    return TrainingOptions.model_validate({**OPTIONS.model_dump(), **changed})


def assert_close(first: Adapted, second: Adapted, tolerance: float) -> None:
    for name, tensor in first.tensors().items():
        torch.testing.assert_close(tensor, second.tensors()[name], atol=tolerance, rtol=0, msg=name)


def own_mean_loss(model: nn.Module, examples: list) -> float:
    """The model's own loss, example by example, averaged over tokens."""
    total, count = 0.0, 0
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        judged = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * judged
        count += judged
    return total / count


def test_training_equals_a_hand_written_loop_with_the_models_own_loss(tmp_path) -> None:
    few = EXAMPLES[:8]  # one batch, so that order does not matter
    trained, outcome = run(
        tmp_path, options(steps=12, warmup_steps=0, weight_decay=0.1), fresh(dropout=0.0), examples=few
    )
    by_hand = fresh(dropout=0.0)
    optimizer = torch.optim.AdamW(by_hand.trainable().values(), lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 12))
        loss = by_hand.model(**Padding(PAD)(few)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.trainable().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [step for step, _ in outcome.losses] == list(range(1, 13))
    assert [loss for _, loss in outcome.losses] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.1
    assert_close(trained, by_hand, 1e-4)


def test_accumulating_over_two_halves_equals_the_whole_batch(tmp_path) -> None:
    whole, first = run(tmp_path / "8", options(batch_size=8), fresh(dropout=0.0))
    halves, second = run(tmp_path / "4", options(batch_size=4, gradient_accumulation=2), fresh(dropout=0.0))
    assert [loss for _, loss in first.losses] == pytest.approx([loss for _, loss in second.losses], abs=1e-5)
    assert_close(whole, halves, 1e-4)
    assert (first.tokens, first.labelled_tokens) == (second.tokens, second.labelled_tokens)


@pytest.mark.parametrize("change", [{"packing": True, "max_length": 24}, {"gradient_checkpointing": True}])
def test_packing_and_gradient_checkpointing_change_nothing(tmp_path, change) -> None:
    plain, _ = run(tmp_path / "plain", adapted=fresh(dropout=0.0))
    other, _ = run(tmp_path / "other", options(**change), fresh(dropout=0.0))
    assert_close(plain, other, 1e-4)


def test_bfloat16_learns_nearly_the_same_and_leaves_the_model_in_float32(tmp_path) -> None:
    exact, first = run(tmp_path / "32")
    rounded, second = run(tmp_path / "16", options(precision="bfloat16"))
    assert [loss for _, loss in first.losses] == pytest.approx([loss for _, loss in second.losses], rel=2e-2)
    assert not same_bits(exact.tensors(), rounded.tensors())
    hidden = rounded.model(input_ids=torch.tensor([[4, 5]]), output_hidden_states=True).hidden_states[1]
    assert not torch.equal(hidden, hidden.bfloat16().float())  # autocast is off again


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_packing_is_refused_where_packed_examples_would_see_each_other(tmp_path, method) -> None:
    with pytest.raises(InvalidInput, match=r"Packing would change what is learned|cannot take position ids") as error:
        run(tmp_path, options(packing=True), fresh(method))
    assert "packing: false" in error.value.remedy


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path) -> None:
    first, _ = run(tmp_path / "1")
    torch.manual_seed(99)
    second, _ = run(tmp_path / "2")
    third, _ = run(tmp_path / "3", seed=4)
    assert same_bits(first.tensors(), second.tensors())
    assert not same_bits(first.tensors(), third.tensors())


def test_only_the_adapter_changes_and_the_surroundings_are_left_as_they_were(tmp_path) -> None:
    adapted = fresh()
    trained_names = set(adapted.trainable())
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    uses_cache, states = (
        adapted.model.config.use_cache,
        (torch.get_rng_state(), random.getstate(), np.random.get_state()),
    )
    run(tmp_path, adapted=adapted)
    changed = {name for name, tensor in adapted.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained_names
    assert uses_cache
    assert adapted.model.config.use_cache
    assert not adapted.model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2][1])


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: 0.5 * (1 + math.cos(math.pi * done))),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(tmp_path, schedule, share) -> None:
    rates: list[float] = []
    run(
        tmp_path,
        options(schedule=schedule, steps=10, warmup_steps=4),
        on_event=lambda event: rates.append(event.learning_rate),
    )
    warm = [1e-2 * step / 4 for step in range(4)]
    assert rates == pytest.approx(warm + [1e-2 * share(step / 6) for step in range(6)], abs=1e-9)


def test_events_and_outcome_tell_what_happened(tmp_path) -> None:
    events: list[TrainingEvent] = []
    _, outcome = run(tmp_path, options(epochs=2.0, steps=None), on_event=events.append)
    assert outcome.steps == 6 == total_steps(options(epochs=2.0, steps=None), len(EXAMPLES))
    assert [event.step for event in events] == list(range(1, 7))
    assert {event.total_steps for event in events} == {6}
    assert outcome.tokens == 2 * sum(len(example.input_ids) for example in EXAMPLES)
    assert outcome.labelled_tokens == 2 * sum(label != -100 for example in EXAMPLES for label in example.labels)
    assert events[-1].eta_seconds == 0
    assert all(event.tokens_per_second > 0 for event in events)
    assert outcome.peak_memory_bytes > 10**7
    assert (outcome.resumed_from, outcome.stopped_early, outcome.best_step) == (None, False, None)
    assert TrainingOutcome.stored(outcome.as_stored()) == outcome


@pytest.mark.parametrize(("number", "change"), [(1, {}), (17, {"gradient_accumulation": 2}), (20, {"epochs": 1.5})])
def test_total_steps_is_what_the_engine_does(tmp_path, number, change) -> None:
    chosen = options(**{"steps": None, "epochs": 2.0, "batch_size": 4, **change})
    _, outcome = run(tmp_path, chosen, examples=EXAMPLES[:number])
    assert outcome.steps == total_steps(chosen, number)


def test_the_validation_loss_is_the_models_own_mean_over_tokens(tmp_path) -> None:
    events: list[TrainingEvent] = []
    adapted, outcome = run(
        tmp_path, options(steps=7, validate_every=3, batch_size=2), validation=HELD_OUT, on_event=events.append
    )
    assert [step for step, _ in outcome.validation_losses] == [3, 6, 7]
    assert outcome.validation_losses[-1][1] == pytest.approx(own_mean_loss(adapted.model, HELD_OUT), abs=1e-5)
    told = [(event.step, event.validation_loss) for event in events if event.validation_loss is not None]
    assert told == list(outcome.validation_losses)


def test_early_stopping_ends_the_training_and_restores_the_best(tmp_path) -> None:
    opposite = encode([(f"{n}+0", "=zzzz</s>") for n in range(3)], tiny_tokenizer(), max_length=32)
    adapted, outcome = run(
        tmp_path, options(steps=200, validate_every=2, early_stopping=3, learning_rate=3e-2), validation=opposite
    )
    losses = dict(outcome.validation_losses)
    best = min(losses, key=losses.__getitem__)
    assert outcome.stopped_early
    assert outcome.steps == best + 6 < 200
    assert outcome.best_step == best
    assert own_mean_loss(adapted.model, opposite) == pytest.approx(losses[best], abs=1e-5)


def test_a_loss_that_is_no_number_is_an_error_that_names_the_step(tmp_path) -> None:
    with pytest.raises(RegraftError, match=r"of step \d+ is (nan|inf)") as error:
        run(tmp_path, options(learning_rate=1e30, warmup_steps=0, max_grad_norm=1e30))
    assert "learning_rate" in error.value.remedy
    poisoned = fresh()
    next(iter(poisoned.trainable().values())).data[0] = float("nan")
    with pytest.raises(RegraftError, match="The loss of step 1 is nan"):
        run(tmp_path / "poisoned", adapted=poisoned)
    assert not list((tmp_path / "poisoned").glob("checkpoints/step-*"))


def test_no_examples_and_validation_without_data_are_refused(tmp_path) -> None:
    with pytest.raises(InvalidInput, match="no example to train on"):
        run(tmp_path, examples=[])
    with pytest.raises(InvalidInput, match="no validation examples"):
        run(tmp_path, options(validate_every=2))


class Hooked(Adapted):
    """Trains one bias, with every hook of the contract in use."""

    def __init__(self) -> None:
        self.model = tiny_llama().requires_grad_(False)
        self.model.lm_head.bias = nn.Parameter(torch.zeros(self.model.config.vocab_size))
        self.name = "hooked"
        self.heard: list[str] = []

    def tensors(self):
        return {"bias": self.model.lm_head.bias.detach()}

    def restore(self, tensors) -> None:
        self.model.lm_head.bias.data.copy_(tensors["bias"])

    def adapter_config(self):
        return {}

    def activate(self) -> None:
        pass

    def disabled(self):
        raise AssertionError

    def callbacks(self):
        heard = self.heard

        class Listener(TrainerCallback):
            def on_step_end(self, args, state, control, optimizer=None, **others):
                heard.append(f"step {state.global_step} {type(optimizer.optimizer).__name__}")

        return [Listener()]

    def extra_loss(self, outputs, batch):
        assert outputs.logits.shape[-1] == self.model.config.vocab_size
        return 3.0 * self.model.lm_head.bias.sum()

    def transform_batch(self, batch):
        return {**batch, "input_ids": batch["input_ids"].clamp(max=9)}

    def optimizer(self, learning_rate, weight_decay):
        return torch.optim.SGD(self.trainable().values(), lr=learning_rate)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_callbacks_extra_loss_batch_transform_and_optimiser_of_the_method_are_honoured(tmp_path, accumulation) -> None:
    adapted, by_hand = Hooked(), Hooked()
    chosen = options(
        steps=2, batch_size=8 // accumulation, gradient_accumulation=accumulation, schedule="constant", warmup_steps=0
    )
    run(tmp_path, chosen.model_copy(update={"max_grad_norm": 1e9}), adapted, examples=EXAMPLES[:8])
    bias = by_hand.model.lm_head.bias
    for _ in range(2):
        loss = by_hand.model(**by_hand.transform_batch(Padding(PAD)(EXAMPLES[:8]))).loss + 3.0 * bias.sum()
        (gradient,) = torch.autograd.grad(loss, bias)
        bias.data -= 1e-2 * gradient
    assert adapted.heard == ["step 1 SGD", "step 2 SGD"]
    torch.testing.assert_close(adapted.tensors()["bias"], bias.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prompt-tuning", "prefix-tuning"])
def test_a_bfloat16_base_trains_a_float32_adapter_to_about_the_same(tmp_path, method) -> None:
    config = {"dropout": 0.0} if method == "lora" else {}
    _, expected = run(tmp_path / "float32", adapted=fresh(method, **config))
    halved = fresh(method, dtype=torch.bfloat16, **config)
    adapted, outcome = run(tmp_path / "bfloat16", options(precision="bfloat16"), halved)
    assert {tensor.dtype for tensor in adapted.tensors().values()} == {torch.float32}
    frozen = [parameter for parameter in adapted.model.parameters() if not parameter.requires_grad]
    assert frozen
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    assert [x for _, x in outcome.losses] == pytest.approx([x for _, x in expected.losses], rel=5e-2)


def test_base_weights_are_bfloat16_on_a_gpu_unless_they_train() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert base_dtype(cpu) == base_dtype(cpu, "bfloat16") == torch.float32
    assert base_dtype(gpu) == base_dtype(gpu, "bfloat16") == torch.bfloat16
    assert base_dtype(gpu, "float32") == base_dtype(gpu, trained=True) == torch.float32


def test_a_lack_of_gpu_memory_is_told_with_what_to_do(tmp_path) -> None:
    def at_step(event: TrainingEvent) -> None:
        if event.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. If reserved but unallocated …")

    with pytest.raises(RegraftError, match=r"(?s)memory after step 2: .* 2 GiB\.\nHalve training.batch_size"):
        run(tmp_path, on_event=at_step)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_learns_what_the_cpu_does(tmp_path) -> None:
    _, expected = run(tmp_path / "cpu", adapted=fresh(dropout=0.0))
    for precision, tolerance in (("float32", 1e-3), ("auto", 5e-2)):  # auto: bfloat16
        adapted, outcome = run(tmp_path / precision, options(precision=precision), fresh(device="cuda", dropout=0.0))
        assert all(tensor.is_cuda for tensor in adapted.tensors().values())
        assert [x for _, x in outcome.losses] == pytest.approx([x for _, x in expected.losses], rel=tolerance)


def test_fsdp_is_refused_rather_than_wrong(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InvalidInput, match="ACCELERATE_USE_FSDP is set"):
        run(tmp_path)


def test_training_learns(tmp_path) -> None:
    adapted = fresh(rank=8, dropout=0.0)
    before = own_mean_loss(adapted.model, EXAMPLES)
    run(tmp_path, options(steps=80, learning_rate=2e-2), adapted)
    assert own_mean_loss(adapted.model, EXAMPLES) < before - 1.5
