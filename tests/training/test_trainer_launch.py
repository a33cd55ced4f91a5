"""From a recipe to a trained adapter, on one process and on two."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from infra.errors import Interrupted, InvalidInput
from infra.settings import get_settings
from tests.tiny_models import save_tiny_llama
from tests.training.tiny_training import copied, same_bits
from training.base_models import LoadedBase, load_base
from training.checkpoints import checkpoints_directory
from training.data.example import Example
from training.engine import _Milestones
from training.interruption import Interruption
from training.options import MethodChoice
from training.progress import TrainingEvent
from training.recipe import Recipe, recipe_from
from training.trainer import train_recipe

TRAIN = [Example(f"{first}+{second}", str(first + second)) for first in range(4) for second in range(4)]
VALIDATION = [Example("7+7", "14"), Example("9+9", "18"), Example("5+8", "13")]


@pytest.fixture
def base(tmp_path, monkeypatch) -> LoadedBase:
    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    torch.set_num_threads(1)
    yield load_base(f"path:{save_tiny_llama(tmp_path / 'base')}", cache=tmp_path / "home" / "base_models")
    get_settings.cache_clear()


def recipe(**training: object) -> Recipe:
    content = {
        "steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "validate_every": 3,
        "checkpoint_every": 4,
        **training,
    }
    return Recipe.model_validate(
        {"adapter": "sums", "base": "path:base", "method": "lora", "data": {"file": "sums.jsonl"}, "training": content}
    )


def test_a_recipe_is_formatted_encoded_attached_and_trained_reproducibly(tmp_path, base) -> None:
    told: list[TrainingEvent] = []
    adapted, outcome = train_recipe(recipe(), base, TRAIN, VALIDATION, workdir=tmp_path / "1", on_event=told.append)
    again = load_base(base.reference, cache=tmp_path / "home" / "base_models")
    second, _ = train_recipe(recipe(), again, TRAIN, VALIDATION, workdir=tmp_path / "2", on_event=told.append)
    assert outcome.steps == 6
    assert outcome.losses[-1][1] < outcome.losses[0][1]
    assert [step for step, _ in outcome.validation_losses] == [3, 6]
    # two digits or one, a space and the end mark after each prompt
    assert outcome.labelled_tokens == 3 * sum(len(example.completion) + 2 for example in TRAIN)
    assert same_bits(adapted.tensors(), second.tensors())


def test_a_too_long_example_is_refused_before_anything_is_attached(tmp_path, base) -> None:
    with pytest.raises(InvalidInput, match=r"Example 16 is 302 tokens long; training.max_length allows 100"):
        train_recipe(
            recipe(max_length=100),
            base,
            [*TRAIN[:15], Example("x" * 292, "13")],
            [],
            workdir=tmp_path / "run",
            on_event=print,
        )
    assert not any(parameter.requires_grad is False for parameter in base.model.parameters())


def test_two_processes_train_what_one_does_and_stop_and_resume_together(tmp_path, base) -> None:
    """One process with the double batch; two processes; two processes interrupted and resumed."""
    cache = tmp_path / "home" / "base_models"
    told: list[TrainingEvent] = []
    single, shared = (
        recipe(steps=40, learning_rate=1e-3, validate_every=20, checkpoint_every=50, **change)
        for change in ({"batch_size": 8}, {"batch_size": 4, "processes": 2})
    )
    alone, one = train_recipe(single, base, TRAIN, VALIDATION, workdir=tmp_path / "1", on_event=told.append)
    losses = [(event.step, pytest.approx(event.loss, abs=1e-5)) for event in told]
    told.clear()

    both, two = train_recipe(
        shared, load_base(base.reference, cache=cache), TRAIN, VALIDATION, workdir=tmp_path / "2", on_event=told.append
    )
    assert [(event.step, event.loss) for event in told] == losses
    assert [loss for _, loss in two.validation_losses] == pytest.approx([x for _, x in one.validation_losses], abs=1e-5)
    assert (two.labelled_tokens, two.tokens) == (one.labelled_tokens, one.tokens)
    expected, bits = copied(alone), copied(both)
    for name, tensor in bits.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0, msg=name)

    def interrupt(event: TrainingEvent) -> None:
        if event.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    third = load_base(base.reference, cache=cache)
    with pytest.raises(Interrupted, match=r"after step \d+ of 40"):
        train_recipe(shared, third, TRAIN, VALIDATION, workdir=tmp_path / "3", on_event=interrupt)
    assert len(list(checkpoints_directory(tmp_path / "3").glob("step-*"))) == 1
    resumed, outcome = train_recipe(shared, third, TRAIN, VALIDATION, workdir=tmp_path / "3", on_event=told.append)
    assert 0 < outcome.resumed_from < outcome.steps == 40
    assert same_bits(copied(resumed), bits)


def test_two_processes_train_the_same_layers_in_turn(tmp_path, base) -> None:
    """IST freezes other layers in every step, by draws and losses on which the processes must agree."""
    method = MethodChoice(name="ist", rank=4, dropout=0.0, active=0.5, probe_every=2)
    trained = []
    for options in ({"batch_size": 8}, {"batch_size": 4, "processes": 2}):
        chosen = recipe(learning_rate=1e-3, **options).model_copy(update={"method": method})
        again = load_base(base.reference, cache=tmp_path / "home" / "base_models")
        workdir = tmp_path / str(options["batch_size"])
        trained.append(train_recipe(chosen, again, TRAIN, VALIDATION, workdir=workdir, on_event=lambda event: None)[0])
    expected, both = (copied(adapted) for adapted in trained)
    for name, tensor in both.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ia3", "prefix-tuning"))]
)
def test_a_base_that_is_split_over_two_processes_trains_the_same_adapter(tmp_path, base, method) -> None:
    """Of three validation examples the second process has but one."""
    whole, split = (
        recipe(
            steps=6, learning_rate=1e-3, batch_size=1, checkpoint_every=50, processes=2, shard_base=shard
        ).model_copy(update={"method": MethodChoice(name=method)})
        for shard in (False, True)
    )
    expected, one = train_recipe(whole, base, TRAIN, VALIDATION, workdir=tmp_path / "1", on_event=lambda event: None)
    again = load_base(base.reference, cache=tmp_path / "home" / "base_models")
    adapted, two = train_recipe(split, again, TRAIN, VALIDATION, workdir=tmp_path / "2", on_event=lambda event: None)
    assert [loss for _, loss in two.losses] == pytest.approx([loss for _, loss in one.losses], abs=1e-5)
    assert [x for _, x in two.validation_losses] == pytest.approx([x for _, x in one.validation_losses], abs=1e-5)
    tensors = expected.tensors()
    for name, tensor in adapted.tensors().items():
        torch.testing.assert_close(tensor, tensors[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_a_training_on_a_split_base_stops_and_resumes_to_the_same_bits(tmp_path, base) -> None:
    chosen = recipe(steps=30, batch_size=4, early_stopping=9, processes=2, shard_base=True)

    def interrupt(event: TrainingEvent) -> None:
        if event.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"after step \d+ of 30"):
        train_recipe(chosen, base, TRAIN, VALIDATION, workdir=tmp_path / "1", on_event=interrupt)
    resumed, outcome = train_recipe(
        chosen, base, TRAIN, VALIDATION, workdir=tmp_path / "1", on_event=lambda event: None
    )
    assert 0 < outcome.resumed_from < 30
    again = load_base(base.reference, cache=tmp_path / "home" / "base_models")
    straight, _ = train_recipe(chosen, again, TRAIN, VALIDATION, workdir=tmp_path / "2", on_event=lambda event: None)
    assert same_bits(copied(resumed), copied(straight))


def test_a_method_that_needs_the_whole_base_does_not_have_it_split() -> None:
    content = recipe(processes=2).as_stored()
    with pytest.raises(InvalidInput, match=r"training\.shard_base does not go with 'dora'"):
        recipe_from(content, "r.yaml", {"method": "dora", "training.shard_base": True})
    with pytest.raises(InvalidInput, match="shard_base needs more than one of processes"):
        recipe_from(content, "r.yaml", {"training.processes": 1, "training.shard_base": True})


def test_an_error_in_a_worker_is_the_parents_error(tmp_path, base) -> None:
    chosen = recipe(processes=2, learning_rate=1e30, max_grad_norm=1e30, validate_every=None)
    with pytest.raises(Exception, match=r"of step \d is (nan|inf)") as error:
        train_recipe(chosen, base, TRAIN, [], workdir=tmp_path / "run", on_event=lambda event: None)
    assert "training.learning_rate" in error.value.remedy


def test_a_signal_that_comes_after_all_have_agreed_is_for_the_next_step(monkeypatch) -> None:
    """Else one process would save, and wait for another that reads the next batch."""
    interruption = Interruption()
    milestones = _Milestones(interruption, validates=False)
    arguments = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    state = SimpleNamespace(global_step=1, max_steps=9)

    def agree(asked: torch.Tensor, op: object) -> None:
        del asked, op  # nobody was asked yet; then this process is
        interruption.requested = True

    monkeypatch.setattr("training.engine.dist.all_reduce", agree)
    control = TrainerControl()
    milestones.on_step_end(arguments, state, control)
    assert not control.should_save and not control.should_training_stop
    milestones.on_step_end(arguments, state, control)
    assert control.should_save and control.should_training_stop
