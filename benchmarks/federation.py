"""Ten clients of unlike data and of ranks 4 to 64: what the server makes of their LoRAs, and what each comes to alone.

A tiny Llama of width 64 is pretrained by this script itself on exercises with the tasks' symbols and on the tasks'
questions with wrong answers: it knows what inputs and answers look like, and nothing of the tasks. On it ten clients,
whose shares of each answer's examples are drawn from a Dirichlet distribution, learn a task in three rounds:

    stack      the exact mean of their updates, as FLoRA makes it
    average    of their factors, from a common start, padded with zeros, as FedAvg would
    alone      nobody hands anything in; each goes on with its own, for as many steps

Ranks, concentration and number of rounds are the defaults of `regraft federate`. Rate and steps are the same for all
three, and were set beforehand: at this rate one LoRA on all the data learns the task in 300 steps. Accuracy is on test
items of the whole task; of those alone the mean over the clients.

    python -m benchmarks.federation

Takes about ten minutes of one core. The results go to benchmarks/results and, as a table, to docs/federation.md.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory, gettempdir
from typing import Literal

import torch
from torch import Tensor

from benchmarks.method_quality import PROMPTED, judge
from benchmarks.planted import PLANTED, Planted
from benchmarks.results_file import Row, write
from benchmarks.table import insert
from benchmarks.tiny_bases import llama, pretrain
from infra.settings import get_settings
from training.base_models import LoadedBase, load_base
from training.data.encoding import encode
from training.data.prompting import PromptFormat
from training.federation.aggregation import Aggregation, added, aggregated
from training.federation.client import folded_base, train_client
from training.federation.options import FederationOptions
from training.federation.shards import shards
from training.federation.start import CommonStart
from training.interchange.lora_layers import layers_from_peft
from training.merging.adapter import Adapter
from training.recipe import Recipe, recipe_from

PAGE = Path(__file__).parents[1] / "docs" / "federation.md"
BEGIN = "<!-- results: python -m benchmarks.federation -->"
OPTIONS = FederationOptions()
TASKS = (PLANTED[2],)  # with five answers, equally many of each: two would leave clients with one of them
SEEDS = (0, 1, 2)
TRAIN, TEST = 2000, 500
STEPS, BATCH, RATE = 100, 16, 3e-3  # of each client in each round
PRETRAINING_STEPS, PRETRAINING_TEXTS = 1500, 8000

How = Literal["stack", "average", "alone"]
TOLD: dict[How, str] = {
    "stack": "`stack`: FLoRA",
    "average": "`average`: FedAvg on padded factors",
    "alone": "alone, mean of the clients",
}


def pretrained(directory: Path) -> str:
    """Reference of the base model, made on first use."""
    made = directory / "base"
    if not (made / "model.safetensors").is_file():
        print("pretraining the base model", flush=True)
        pretrain(
            made,
            partial(llama, layers=3, intermediate=160),
            _texts(random.Random(0)),
            vocabulary=300,
            steps=PRETRAINING_STEPS,
            batch=16,
            longest=64,
            seed=0,
        )
    return f"path:{made}"


def _texts(rng: random.Random) -> list[str]:
    """Exercises, and questions with the answers of other questions, in turn."""
    exercises = {"copy": lambda s: s, "reverse": lambda s: s[::-1], "sort": sorted, "first": lambda s: s[:1]}
    found = []
    for number in range(PRETRAINING_TEXTS):
        task = rng.choice(TASKS)
        asked, other = task.draw(rng), task.draw(rng)
        if number % 2:
            name = rng.choice(list(exercises))
            found.append(PROMPTED.format(f"{name} {asked}", " ".join(exercises[name](asked.split()))))
        else:
            found.append(PROMPTED.format(asked, task.answer(other)))
    return found


@dataclass
class Outcome:
    """A federation, round by round.

    Args:
        right: shares of the test items, of those alone the mean over the clients.
        off: ‖made − Σ pₖΔₖ‖ / ‖Σ pₖΔₖ‖ of what the server makes, in float64, all layers together.
    """

    right: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)


class Task:
    """One task, one seed: the clients' data and how they train."""

    def __init__(self, task: Planted, seed: int, reference: str) -> None:
        self.name, self.seed = task.name, seed
        examples = task.examples(TRAIN + TEST, seed)
        self.parts = shards(examples[:TRAIN], OPTIONS.clients, OPTIONS.skew, seed)
        self.bare = load_base(reference, cache=get_settings().base_models)
        assert self.bare.tokenizer is not None
        form = PromptFormat(self.bare.tokenizer)
        self.test = encode(map(form.training_text, examples[TRAIN:]), self.bare.tokenizer, max_length=1024)

    def base(self, whole: Adapter | None) -> LoadedBase:
        """With the adapter folded in."""
        return folded_base(self.bare.reference, self.bare.identity.sha256, "float32", whole)

    def right(self, whole: Adapter | None) -> float:
        """The share of test items that it gets right."""
        return mean(judge(self.base(whole).model, lambda batch: batch, self.test)[1])

    def trained(self, client: int, number: int, base: LoadedBase, start: CommonStart | None) -> Adapter:
        """What a client learns in a round on top of `base`."""
        with TemporaryDirectory() as workdir:
            chosen = self._recipe(client, number)
            return train_client(chosen, base, self.parts[client], Path(workdir), lambda event: None, start)

    def _recipe(self, client: int, number: int) -> Recipe:
        rank = OPTIONS.ranks[client % len(OPTIONS.ranks)]
        return recipe_from(
            {
                "adapter": f"client-{client}",
                "base": self.bare.reference,
                "method": {"name": "lora", "rank": rank, "alpha": 2 * rank},
                "data": {"task": "object_counting", "instruction": "", "sizes": {"train": 1}},  # not read
                "training": {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "checkpoint_every": 10_000},
                "seed": 100_000 * self.seed + 1000 * number + client,
            },
            source="benchmark",
        )


def federated(task: Task, how: Aggregation, first: Sequence[Adapter] | None) -> Outcome:
    """Three rounds with a server.

    Args:
        task: what is learnt.
        how: of what the clients hand in.
        first: what they do in the first round, where that is known.
    """
    sizes = [len(part) for part in task.parts]
    shares = [size / sum(sizes) for size in sizes]
    whole: Adapter | None = None
    outcome = Outcome()
    for number in range(1, OPTIONS.rounds + 1):
        start = CommonStart(1000 * task.seed + number, max(OPTIONS.ranks)) if how == "average" else None
        handed_in = first if number == 1 else None
        if handed_in is None:
            base = task.base(whole)
            handed_in = [task.trained(client, number, base, start) for client in range(OPTIONS.clients)]
        update = aggregated(handed_in, shares, how)
        outcome.off.append(_off(update, handed_in, shares))
        whole = added(whole, update)
        outcome.right.append(task.right(whole))
    return outcome


def alone(task: Task, first: Sequence[Adapter]) -> Outcome:
    """As many steps by each client on its own; `first` is what they do in the first round."""
    wholes, outcome = list(first), Outcome(right=[mean(map(task.right, first))])
    for number in range(2, OPTIONS.rounds + 1):
        for client, whole in enumerate(wholes):
            wholes[client] = added(whole, task.trained(client, number, task.base(whole), None))
        outcome.right.append(mean(map(task.right, wholes)))
    return outcome


def _off(made: Adapter, clients: Sequence[Adapter], shares: Sequence[float]) -> float:
    """How far an update is from the clients' mean, from dense matrices."""

    def dense(adapter: Adapter) -> dict[str, Tensor]:
        layers = layers_from_peft(dict(adapter.config), adapter.tensors)
        return {place: layer.update() for place, layer in layers.items()}

    updates, error, norm = [dense(client) for client in clients], 0.0, 0.0
    for place, update in dense(made).items():
        meant = sum((p * each[place] for p, each in zip(shares, updates, strict=True)), torch.zeros_like(update))
        error, norm = error + float((update - meant).square().sum()), norm + float(meant.square().sum())
    return (error / norm) ** 0.5


def measured(reference: str) -> dict[str, dict[How, list[Outcome]]]:
    """Every task, every way, by seed; the base model's own accuracy is each one's first number."""
    found: dict[str, dict[How, list[Outcome]]] = {}
    for planted in TASKS:
        ways = found[planted.name] = {how: [] for how in TOLD}
        for seed in SEEDS:
            task = Task(planted, seed, reference)
            base, before = task.base(None), task.right(None)
            first = [task.trained(client, 1, base, None) for client in range(OPTIONS.clients)]
            outcomes: dict[How, Outcome] = {
                "stack": federated(task, "stack", first),
                "average": federated(task, "average", None),
                "alone": alone(task, first),
            }
            for how, outcome in outcomes.items():
                outcome.right.insert(0, before)
                ways[how].append(outcome)
                told = ", ".join(f"{right:.1%}" for right in outcome.right)
                print(f"{planted.name}, seed {seed}, {how}: {told}", flush=True)
    return found


def report(found: dict[str, dict[How, list[Outcome]]]) -> None:
    """Write the results and the table of docs/federation.md."""
    rounds = " | ".join(f"round {number}" for number in range(1, OPTIONS.rounds + 1))
    lines = [
        f"| task | clients' LoRAs | before | {rounds} | off the mean |",
        "|---|---|---:|" + "---:|" * (OPTIONS.rounds + 1),
    ]
    for name, ways in found.items():
        for how, told in TOLD.items():
            cells = [name, told]
            for number in range(OPTIONS.rounds + 1):
                right = [100 * outcome.right[number] for outcome in ways[how]]
                cells.append(f"{mean(right):.1f} % ({min(right):.0f}–{max(right):.0f})")
            off = [each for outcome in ways[how] for each in outcome.off]
            cells.append("–" if not off else f"{mean(off):.0%}" if mean(off) > 1e-3 else f"{max(off):.0e}")
            lines.append(f"| {' | '.join(cells)} |")
    rows = []
    clients = f"{OPTIONS.clients} clients of ranks {min(OPTIONS.ranks)} to {max(OPTIONS.ranks)}"
    for name, ways in found.items():
        last = {how: 100 * mean(outcome.right[-1] for outcome in outcomes) for how, outcomes in ways.items()}
        for how in ("average", "alone"):
            claim = f"accuracy after {OPTIONS.rounds} rounds of FLoRA, {name}, {clients}, {len(SEEDS)} seeds"
            rows.append(Row(claim, last["stack"], last[how], TOLD[how].replace("`", ""), "%", 1))
        worst = {how: max(each for outcome in ways[how] for each in outcome.off) for how in ("stack", "average")}
        claim = f"FLoRA's update off the clients' mean, worst round, {name}"
        rows.append(
            Row(claim, worst["stack"], worst["average"], "FedAvg on padded factors", "of its norm", 1e-4, "lower")
        )
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), "\n".join(lines), BEGIN), encoding="utf-8")
    details = {
        name: {how: [{"right": o.right, "off": o.off} for o in outcomes] for how, outcomes in ways.items()}
        for name, ways in found.items()
    }
    settings = {"steps": STEPS, "batch": BATCH, "rate": RATE, "skew": OPTIONS.skew, "train": TRAIN, "test": TEST}
    write("federation", rows, details={"settings": settings, "outcomes": details})


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(gettempdir()) / "regraft-federation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report(measured(pretrained(options.directory)))


if __name__ == "__main__":
    main()
