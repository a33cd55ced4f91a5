"""A tiny LoRA training for the trainer's tests; run as a program, the same training in a process of its own."""

import os
import sys
import time
from pathlib import Path

import torch

from tests.tiny_models import PAD, tiny_llama, tiny_tokenizer
from training.data.batching import Padding
from training.data.encoding import Encoded, encode
from training.methods.catalog import get_method
from training.methods.contract import Adapted, AttachContext
from training.objectives.causal_lm import CausalLM
from training.options import TrainingOptions
from training.progress import OnEvent, TrainingEvent, TrainingOutcome
from training.trainer import train

PAIRS = [(f"{first}+{second}", f"={first + second}</s>") for first in range(4) for second in range(5)]
EXAMPLES: list[Encoded] = encode(PAIRS, tiny_tokenizer(), max_length=64)
HELD_OUT: list[Encoded] = encode(
    [("7+7", "=14</s>"), ("9+9", "=18</s>"), ("1+8", "=9</s>")], tiny_tokenizer(), max_length=64
)
# Twenty examples are two full batches and a part of one: epochs end within these trainings.
OPTIONS = TrainingOptions(steps=20, batch_size=8, learning_rate=1e-2, checkpoint_every=5, warmup_steps=2)


def quiet(event: TrainingEvent) -> None:
    del event


def fresh(
    method: str = "lora",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    steps: int | None = OPTIONS.steps,
    **config: object,
) -> Adapted:
    chosen = get_method(method)
    if method == "lora":
        config = {"rank": 4, "dropout": 0.1, **config}
    context = AttachContext(seed=0, total_steps=steps)
    return chosen.attach(tiny_llama().to(device, dtype), chosen.config_type(**config), context)


def run(
    workdir: Path,
    options: TrainingOptions = OPTIONS,
    adapted: Adapted | None = None,
    validation: list[Encoded] | None = None,
    examples: list[Encoded] | None = None,
    on_event: OnEvent = quiet,
    seed: int = 3,
) -> tuple[Adapted, TrainingOutcome]:
    torch.set_num_threads(1)
    adapted = adapted or fresh()
    outcome = train(
        adapted,
        CausalLM(),
        EXAMPLES if examples is None else examples,
        validation or [],
        options,
        padding=Padding(PAD),
        seed=seed,
        workdir=workdir,
        on_event=on_event,
    )
    return adapted, outcome


def copied(adapted: Adapted) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in adapted.tensors().items()}


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


if __name__ == "__main__":

    def slowly(event: TrainingEvent) -> None:
        print(event.step, os.getpid(), flush=True)
        time.sleep(0.05)

    run(Path(sys.argv[1]), on_event=slowly)
