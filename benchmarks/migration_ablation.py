"""What a migration is worth, and why: the paper's recipe, parts of it, and our own ideas, over tasks and seeds.

On two tiny base models (benchmarks/planted.py) and three planted tasks. For each task and seed a teacher is trained on
the first base, a kit is built, and the target writes inputs; then each variant trains a student on the target.

    python -m benchmarks.migration_ablation [--seeds 3] [--workers 2] [--directory DIR]

What was measured is kept in --directory; a benchmark that was stopped goes on where it was.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from torch import nn

from benchmarks.planted import PLANTED, Planted, english, make_pair
from training.base_models import LoadedBase, load_base
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.evaluate import end_tokens
from training.evaluation.generation import greedy_answers
from training.methods.borrowing import borrowed
from training.migration.kit import Kit, build_kit, load_discriminator
from training.migration.labelling import label
from training.migration.options import DiscriminatorOptions, KitOptions, SynthesisOptions
from training.migration.synthesis import Pool, synthesise
from training.options import TrainingOptions
from training.recipe import Recipe, recipe_from
from training.trainer import train_recipe

ROWS, TEST, INPUTS = 250, 300, 250
STEPS = 250
SYNTHESIS = SynthesisOptions(items=6, rows=16)
DISCRIMINATOR = DiscriminatorOptions(training=TrainingOptions(epochs=6, batch_size=16, learning_rate=1e-2))


def recipe(reference: str, seed: int, steps: int = STEPS) -> Recipe:
    """A LoRA on a tiny base."""
    return recipe_from(
        {
            "adapter": "planted",
            "base": reference,
            "method": {"name": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
            "data": {"file": "not-read.jsonl", "instruction": ""},
            "training": {"steps": steps, "batch_size": 16, "learning_rate": 1e-2, "checkpoint_every": 100_000},
            "seed": seed,
        },
        "planted",
    )


def trained(base: LoadedBase, examples: Sequence[Example], seed: int, steps: int = STEPS) -> nn.Module:
    """The base with a fresh LoRA that has learnt the examples; within `borrowed`."""
    with TemporaryDirectory() as workdir:
        chosen = recipe(base.reference, seed, steps)
        adapted, _ = train_recipe(chosen, base, examples, (), workdir=Path(workdir), on_event=lambda event: None)
    return adapted.model.eval()


def accuracy(model: nn.Module, tokenizer: Any, items: Sequence[Example], shots: Sequence[Example] = ()) -> float:
    """The share of items that greedy decoding answers exactly."""
    form = PromptFormat(tokenizer)
    asked = [tokenizer(form.prompt(item.prompt, shots), add_special_tokens=False)["input_ids"] for item in items]
    answers = greedy_answers(
        model,
        tokenizer,
        asked,
        max_new_tokens=6,
        ends=end_tokens(model, tokenizer, form),
        stop_strings=form.stop_strings,
    )
    return mean(answer == item.completion for answer, item in zip(answers, items, strict=True))


@dataclass(frozen=True)
class Scene:
    """A teacher, its kit, and what the target wrote: what all variants of one task and seed share."""

    task: Planted
    seed: int
    source: LoadedBase
    target: LoadedBase
    kit: Kit
    seeds: tuple[Example, ...]
    answer: Callable[[Sequence[str]], Sequence[Example]]
    margins: Callable[[Sequence[str]], Sequence[float]]

    def pool(self, filtered: bool, wanted: int = INPUTS) -> Pool:
        """Inputs that the target writes."""
        return synthesise(
            self.target.model,
            self.target.tokenizer,
            self.kit.task,
            [seed.prompt for seed in self.seeds],
            wanted,
            SYNTHESIS,
            seed=self.seed,
            longest=self.kit.longest,
            margins=self.margins if filtered else None,
        )


def paper(scene: Scene) -> Sequence[Example]:
    """Filtered inputs with the teacher's answers."""
    return scene.answer(scene.pool(True).inputs)


def unfiltered(scene: Scene) -> Sequence[Example]:
    """The same without the discriminator."""
    return scene.answer(scene.pool(False).inputs)


def random_text(scene: Scene) -> Sequence[Example]:
    """As many sentences that have nothing to do with the task."""
    return scene.answer(english(INPUTS, scene.seed))


def seeds_only(scene: Scene) -> Sequence[Example]:
    """The kit's examples, with their real answers."""
    return scene.seeds


VARIANTS: dict[str, Callable[[Scene], Sequence[Example]]] = {
    "paper": paper,
    "unfiltered": unfiltered,
    "random text": random_text,
    "seeds only": seeds_only,
}


def measure(place: int, seed: int, directory: Path) -> dict[str, Any]:
    """Accuracies of teacher, bare target and every variant's student, and how the inputs came about."""
    torch.set_num_threads(1)
    task = PLANTED[place]
    references = make_pair(directory)
    source, target = (load_base(reference, cache=directory / "cache") for reference in references)
    real, test = task.examples(ROWS, seed), task.examples(ROWS + TEST, seed)[ROWS:]
    found: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        with borrowed(source.model):
            kit = build_kit(
                Path(scratch) / "kit",
                source,
                real,
                task=task.name,
                instruction="",
                options=KitOptions(synthesis=SYNTHESIS, discriminator=DISCRIMINATOR),
                seed=seed,
                workdir=Path(scratch) / "work",
            )
        assert kit.discriminator is not None
        seeds = tuple(Example(each.prompt, each.completion) for each in kit.seeds)
        judge = load_base(references[0], cache=directory / "cache")
        discriminator = load_discriminator(Path(scratch) / "kit", kit, judge)
        with borrowed(source.model):
            teacher = trained(source, real, seed)
            form = PromptFormat(source.tokenizer)  # type: ignore[arg-type]

            def answer(inputs: Sequence[str]) -> Sequence[Example]:
                return label(teacher, form, inputs, longest=kit.longest_answer).examples

            scene = Scene(task, seed, source, target, kit, seeds, answer, discriminator.margins)
            found["teacher"] = accuracy(teacher, source.tokenizer, test)
            found["bare"] = max(accuracy(target.model, target.tokenizer, test, shots) for shots in ((), seeds[:3]))
            found["discriminator"] = kit.discriminator.balanced_accuracy
            found["acceptance"] = scene.pool(True).acceptance
            for name, variant in VARIANTS.items():
                examples = variant(scene)
                labels = [task.answer(each.prompt) == each.completion for each in examples if name != "random text"]
                with borrowed(target.model):
                    found[name] = accuracy(trained(target, examples, seed), target.tokenizer, test)
                found[f"{name}, right labels"] = mean(labels) if labels else None
            with borrowed(target.model):
                found["real rows"] = accuracy(trained(target, real, seed), target.tokenizer, test)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--directory", type=Path, default=Path(gettempdir()) / "regraft-migration-ablation")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    make_pair(options.directory)
    kept = options.directory / "results.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    found = {tuple(line["key"]): line["found"] for line in map(json.loads, lines)}
    places = [(place, seed) for place in range(len(PLANTED)) for seed in range(options.seeds)]
    wanted = [(place, seed) for place, seed in places if (PLANTED[place].name, seed) not in found]
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(measure, *job, options.directory): job for job in wanted}
        for future in as_completed(running):
            place, seed = running[future]
            key = PLANTED[place].name, seed
            found[key] = future.result()
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "found": found[key]}) + "\n")
            print(*key, found[key], flush=True)


if __name__ == "__main__":
    main()
