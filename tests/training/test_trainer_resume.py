"""A training that was stopped, killed or damaged goes on to the very bits that it would have come to."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infra.errors import Conflict, Interrupted, RegraftError
from tests.tiny_models import tiny_tokenizer
from tests.training.tiny_training import EXAMPLES, HELD_OUT, OPTIONS, copied, fresh, quiet, run, same_bits
from training.checkpoints import checkpoints_directory, discard, exclusive
from training.data.encoding import encode
from training.options import TrainingOptions
from training.progress import OnEvent, TrainingEvent
from training.state_file import read_state, write_state

REPOSITORY = Path(__file__).parents[2]


def options(**changed: object) -> TrainingOptions:
    return TrainingOptions.model_validate({**OPTIONS.model_dump(), **changed})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    adapted, outcome = run(tmp_path_factory.mktemp("uninterrupted"))
    assert outcome.steps == 20
    return copied(adapted)


def steps_on_disk(workdir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints_directory(workdir).glob("step-*"))


def raise_at(step: int) -> OnEvent:
    def listen(event: TrainingEvent) -> None:
        if event.step == step:
            raise RuntimeError("the power is gone")

    return listen


def signal_at(step: int, number: signal.Signals, times: int = 1) -> OnEvent:
    def listen(event: TrainingEvent) -> None:
        if event.step == step:
            for _ in range(times):
                signal.raise_signal(number)  # in this thread; two of os.kill may become one

    return listen


# Three steps an epoch: step 5 is within one, 15 is the end of one.
@pytest.mark.parametrize("crash", [8, 17])
def test_a_crashed_training_resumes_to_the_same_bits(tmp_path, uninterrupted, crash) -> None:
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path, on_event=raise_at(crash))
    adapted, outcome = run(tmp_path)
    assert outcome.resumed_from == crash // 5 * 5
    assert [step for step, _ in outcome.losses] == list(range(1, 21))
    assert same_bits(adapted.tensors(), uninterrupted)


@pytest.mark.parametrize("method", ["rslora", "dora", "s2ft", "paca", "ia3", "prompt-tuning", "prefix-tuning", "full"])
def test_every_method_resumes_to_the_same_bits(tmp_path, method) -> None:
    chosen = options(steps=5, checkpoint_every=2)
    whole, _ = run(tmp_path / "whole", chosen, fresh(method))
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "crashed", chosen, fresh(method), on_event=raise_at(3))
    resumed, outcome = run(tmp_path / "crashed", chosen, fresh(method))
    assert outcome.resumed_from == 2
    assert same_bits(resumed.tensors(), whole.tensors())
    assert not same_bits(resumed.tensors(), fresh(method).tensors())


def test_a_training_killed_mid_run_resumes_to_the_same_bits(tmp_path, uninterrupted) -> None:
    command = [sys.executable, "-m", "tests.training.tiny_training", str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line.split()[0]) == 12:
                process.kill()
    assert process.returncode == -signal.SIGKILL
    adapted, outcome = run(tmp_path)
    assert outcome.resumed_from == 10
    assert same_bits(adapted.tensors(), uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, uninterrupted, number) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as error:
        run(tmp_path, on_event=signal_at(7, number))  # step 7 has ended when it is told: step 8 is the current one
    assert "after step 8 of 20" in error.value.what
    assert "it goes on after step 8" in error.value.remedy
    assert steps_on_disk(tmp_path)[-1] == 8
    assert signal.getsignal(number) is before
    adapted, outcome = run(tmp_path)
    assert outcome.resumed_from == 8
    assert same_bits(adapted.tensors(), uninterrupted)


def test_a_second_interrupt_stops_at_once(tmp_path, uninterrupted) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_event=signal_at(7, signal.SIGINT, times=2))
    assert steps_on_disk(tmp_path) == [5]
    assert same_bits(run(tmp_path)[0].tensors(), uninterrupted)


def test_a_half_written_checkpoint_is_removed_and_a_damaged_one_passed_over(tmp_path, uninterrupted) -> None:
    with pytest.raises(RuntimeError):
        run(tmp_path, on_event=raise_at(12))
    directory = checkpoints_directory(tmp_path)
    assert steps_on_disk(tmp_path) == [5, 10]
    half = directory / ".writing-step-00000011"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    damaged = directory / "step-00000010" / "adapter.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    adapted, outcome = run(tmp_path)
    assert outcome.resumed_from == 5
    assert not half.exists()
    assert same_bits(adapted.tensors(), uninterrupted)


def test_early_stopping_survives_a_crash(tmp_path) -> None:
    opposite = encode([(f"{n}+0", "=zzzz</s>") for n in range(3)], tiny_tokenizer(), max_length=32)
    chosen = options(steps=200, validate_every=2, early_stopping=4, learning_rate=3e-2, checkpoint_every=3)
    whole, expected = run(tmp_path / "whole", chosen, validation=opposite)
    assert expected.stopped_early
    with pytest.raises(RuntimeError):
        run(tmp_path / "crashed", chosen, validation=opposite, on_event=raise_at(expected.best_step + 5))
    resumed, outcome = run(tmp_path / "crashed", chosen, validation=opposite)
    assert outcome.resumed_from is not None
    assert outcome.validation_losses == expected.validation_losses
    assert (outcome.best_step, outcome.steps, outcome.stopped_early) == (expected.best_step, expected.steps, True)
    assert same_bits(resumed.tensors(), whole.tensors())
    again, outcome = run(tmp_path / "crashed", chosen, validation=opposite)
    assert outcome.resumed_from == outcome.steps == expected.steps
    assert same_bits(again.tensors(), whole.tensors())


def test_a_finished_training_is_found_finished_until_its_checkpoints_are_discarded(tmp_path, uninterrupted) -> None:
    run(tmp_path)
    told: list[TrainingEvent] = []
    adapted, outcome = run(tmp_path, on_event=told.append)
    assert (outcome.resumed_from, outcome.steps, told) == (20, 20, [])
    assert same_bits(adapted.tensors(), uninterrupted)
    with exclusive(tmp_path), pytest.raises(Conflict):
        discard(tmp_path)
    discard(tmp_path)
    assert not checkpoints_directory(tmp_path).exists()
    assert run(tmp_path)[1].resumed_from is None


@pytest.mark.parametrize("changed", ["options", "seed", "data", "method"])
def test_checkpoints_of_another_training_are_not_resumed(tmp_path, changed) -> None:
    run(tmp_path, options(steps=5))
    different = {
        "options": {"options": options(steps=5, learning_rate=2e-2)},
        "seed": {"seed": 4},
        "data": {"examples": EXAMPLES[:-1]},
        "method": {"adapted": fresh(rank=2)},
    }[changed]
    with pytest.raises(Conflict, match="of another training"):
        run(tmp_path, **{"options": options(steps=5), **different})
    assert steps_on_disk(tmp_path) == [5]


def test_a_second_training_in_the_same_directory_is_refused_with_the_pid(tmp_path) -> None:
    with exclusive(tmp_path), pytest.raises(Conflict, match=f"process {os.getpid()}"):
        run(tmp_path)
    run(tmp_path, options(steps=1))


def test_a_full_disk_is_a_clear_error_and_the_earlier_checkpoint_stays(tmp_path, monkeypatch, uninterrupted) -> None:
    real = os.fsync

    def full(descriptor: int) -> None:
        if (checkpoints_directory(tmp_path) / ".writing-step-00000010").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RegraftError, match="No space is left on the disk") as error:
        run(tmp_path)
    assert "checkpoint of step 10; the one of step 5 is intact" in error.value.what
    assert "resumes after step 5" in error.value.remedy
    monkeypatch.undo()
    assert steps_on_disk(tmp_path) == [5]
    assert not list(checkpoints_directory(tmp_path).glob(".writing-*"))
    assert same_bits(run(tmp_path)[0].tensors(), uninterrupted)


def test_checkpoints_hold_the_adapter_alone_and_no_pickle(tmp_path) -> None:
    adapted, _ = run(tmp_path, options(steps=5, validate_every=5, early_stopping=1), validation=HELD_OUT)
    (directory,) = checkpoints_directory(tmp_path).glob("step-*")
    names = {path.name for path in directory.iterdir()}
    assert names == {
        "adapter.safetensors",
        "best.safetensors",
        "state.safetensors",
        "trainer_state.json",
        "checkpoint.json",
    }
    adapter_bytes = sum(tensor.numel() * 4 for tensor in adapted.tensors().values())
    assert (directory / "adapter.safetensors").stat().st_size < adapter_bytes + 8192


def test_a_state_file_gives_back_what_it_was_given(tmp_path) -> None:
    state = {0: {"a": torch.tensor([1.5], dtype=torch.bfloat16), "b": (1, None, [True, "x", 0.1])}, "n": 2**70}
    write_state(state, tmp_path / "state.safetensors")
    found = read_state(tmp_path / "state.safetensors")
    assert torch.equal(found[0].pop("a"), state[0].pop("a"))
    assert found == state
    with pytest.raises(TypeError, match="holds a function"):
        write_state({"f": quiet}, tmp_path / "state.safetensors")
