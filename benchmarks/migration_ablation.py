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
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.planted import PLANTED, Planted, english, make_pair
from training.base_models import LoadedBase, load_base
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.evaluate import end_tokens
from training.evaluation.generation import greedy_answers
from training.methods.borrowing import borrowed
from training.migration.choosing import as_long, by_likeness
from training.migration.kit import Kit, build_kit, load_discriminator
from training.migration.labelling import label
from training.migration.options import DiscriminatorOptions, KitOptions, SynthesisOptions
from training.migration.synthesis import synthesise
from training.options import TrainingOptions
from training.recipe import Recipe, recipe_from
from training.trainer import train_recipe

ROWS, TEST, INPUTS, CANDIDATES = 120, 300, 120, 360
TEACHER_STEPS, STUDENT_STEPS = 120, 300
SYNTHESIS = SynthesisOptions(items=6, rows=16)
DISCRIMINATOR = DiscriminatorOptions(training=TrainingOptions(epochs=6, batch_size=16, learning_rate=1e-2))


def recipe(reference: str, seed: int, steps: int) -> Recipe:
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


def trained(base: LoadedBase, examples: Sequence[Example], seed: int, steps: int = STUDENT_STEPS) -> nn.Module:
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
class Candidate:
    """An input that the target wrote.

    Args:
        example: with the teacher's greedy answer.
        margin: of the discriminator.
    """

    example: Example
    margin: float

    @property
    def length(self) -> int:
        """Characters of the input."""
        return len(self.example.prompt)


@dataclass(frozen=True)
class Scene:
    """A kit and what the target wrote on its seeds: what variants share."""

    seed: int
    kit: Kit
    candidates: tuple[Candidate, ...]
    answer: Callable[[Sequence[str]], Sequence[Example]]

    @property
    def seeds(self) -> list[Example]:
        """The kit's."""
        return [Example(each.prompt, each.completion) for each in self.kit.seeds]

    @property
    def real_looking(self) -> list[Candidate]:
        """Those that the discriminator keeps."""
        return [candidate for candidate in self.candidates if candidate.margin > 0]

    @property
    def temperature(self) -> float:
        """Of the discriminator."""
        assert self.kit.discriminator is not None
        return self.kit.discriminator.temperature


def examples(candidates: Sequence[Candidate]) -> list[Example]:
    return [candidate.example for candidate in candidates]


def paper(scene: Scene) -> Sequence[Example]:
    """Filtered inputs with the teacher's answers."""
    return examples(scene.real_looking[:INPUTS])


def unfiltered(scene: Scene) -> Sequence[Example]:
    """The same without the discriminator."""
    return examples(scene.candidates[:INPUTS])


def random_text(scene: Scene) -> Sequence[Example]:
    """As many sentences that have nothing to do with the task."""
    return scene.answer(english(INPUTS, scene.seed))


def seeds_only(scene: Scene) -> Sequence[Example]:
    """The kit's examples, with their real answers."""
    return scene.seeds


def likely(scene: Scene) -> list[Candidate]:
    """All candidates, drawn by the discriminator's odds."""
    order = by_likeness([candidate.margin for candidate in scene.candidates], scene.temperature, scene.seed)
    return [scene.candidates[place] for place in order]


def fitted(scene: Scene, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of candidates, first ones first, as many as are wanted, with the real inputs' lengths."""
    lengths = [candidate.length for candidate in candidates]
    return [candidates[place] for place in as_long(lengths, range(len(lengths)), scene.kit.lengths, INPUTS)]


def density(scene: Scene) -> Sequence[Example]:
    """Drawn from all by the discriminator's odds, instead of all that it takes for real."""
    return examples(likely(scene)[:INPUTS])


def lengths(scene: Scene) -> Sequence[Example]:
    """Filtered inputs with the lengths of the real ones."""
    return examples(fitted(scene, scene.real_looking))


def with_seeds(scene: Scene) -> Sequence[Example]:
    """The paper's, and the seeds with their real answers."""
    return [*paper(scene), *scene.seeds]


def density_and_lengths(scene: Scene) -> Sequence[Example]:
    """Drawn by odds, with the lengths of the real ones."""
    return examples(fitted(scene, likely(scene)))


Variant = Callable[[Scene], Sequence[Example]]
BY_CHANCE: dict[str, Variant] = {
    "paper": paper,
    "unfiltered": unfiltered,
    "random text": random_text,
    "seeds only": seeds_only,
    "density": density,
    "lengths": lengths,
    "with seeds": with_seeds,
}
SPREAD: dict[str, Variant] = {
    "spread seeds": paper,
    "spread seeds, lengths": lengths,
    "spread seeds, density and lengths": density_and_lengths,
}


def measure(place: int, seed: int, directory: Path) -> dict[str, Any]:
    """Accuracies of teacher, bare target and every variant's student, and how the inputs came about."""
    torch.set_num_threads(1)
    task = PLANTED[place]
    references = make_pair(directory)
    source, target = (load_base(reference, cache=directory / "cache") for reference in references)
    real, test = task.examples(ROWS, seed), task.examples(ROWS + TEST, seed)[ROWS:]
    found: dict[str, Any] = {}
    with borrowed(source.model):
        teacher = trained(source, real, seed, TEACHER_STEPS)
        found["teacher"] = accuracy(teacher, source.tokenizer, test)
        for choice, variants in (("random", BY_CHANCE), ("spread", SPREAD)):
            scene = prepared(task, seed, choice, source, references[0], target, teacher, real, directory, found)
            for name, variant in variants.items():
                learnt = variant(scene)
                if name != "random text":
                    right = mean(task.answer(each.prompt) == each.completion for each in learnt)
                    found[f"{name}, right labels"] = right
                with borrowed(target.model):
                    found[name] = accuracy(trained(target, learnt, seed), target.tokenizer, test)
            if choice == "random":
                found["bare"] = max(
                    accuracy(target.model, target.tokenizer, test, shots) for shots in ((), scene.seeds[:3])
                )
    with borrowed(target.model):
        found["real rows"] = accuracy(trained(target, real, seed), target.tokenizer, test)
    return found


def prepared(
    task: Planted,
    seed: int,
    choice: Literal["random", "spread"],
    source: LoadedBase,
    reference: str,
    target: LoadedBase,
    teacher: nn.Module,
    real: Sequence[Example],
    directory: Path,
    found: dict[str, Any],
) -> Scene:
    """A kit, what the target writes on its seeds, and how the teacher answers."""
    judge = load_base(reference, cache=directory / "cache")
    with TemporaryDirectory() as scratch:
        with borrowed(judge.model):
            kit = build_kit(
                Path(scratch) / "kit",
                judge,
                real,
                task=task.name,
                instruction="",
                options=KitOptions(synthesis=SYNTHESIS, discriminator=DISCRIMINATOR, choice=choice),
                seed=seed,
                workdir=Path(scratch) / "work",
            )
        discriminator = load_discriminator(Path(scratch) / "kit", kit, judge)
    assert kit.discriminator is not None
    form = PromptFormat(source.tokenizer)  # type: ignore[arg-type]

    def answer(inputs: Sequence[str]) -> Sequence[Example]:
        return label(teacher, form, inputs, longest=kit.longest_answer).examples

    pool = synthesise(
        target.model,
        target.tokenizer,
        kit.task,
        [each.prompt for each in kit.seeds],
        CANDIDATES,
        SYNTHESIS,
        seed=seed,
        longest=kit.longest,
    )
    labelled = answer(pool.inputs)
    margins = discriminator.margins([each.prompt for each in labelled])
    candidates = tuple(Candidate(*each) for each in zip(labelled, margins, strict=True))
    found[f"discriminator, {choice}"] = kit.discriminator.balanced_accuracy
    found[f"temperature, {choice}"] = kit.discriminator.temperature
    found[f"acceptance, {choice}"] = mean(margin > 0 for margin in margins)
    return Scene(seed, kit, candidates, answer)


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
