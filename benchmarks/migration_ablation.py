"""What a migration is worth, and why: the paper's recipe, parts of it, and our own ideas, over tasks and seeds.

On two tiny base models (benchmarks/planted.py) and three planted tasks. For each task and seed a teacher is trained on
the first base, a kit is built, and the target writes inputs; then each variant trains a student on the target.

    python -m benchmarks.migration_ablation [--kinds text logits] [--seeds 3] [--workers 2] [--directory DIR]

Every variant's student has as many steps, and is trained twice, with seeds of its own. The bare target is the better of
none and three solved examples. Right labels: the share of a variant's inputs that the teacher answered rightly.

What was measured is kept in --directory; a benchmark that was stopped goes on where it was. The results go to
benchmarks/results and, as a table, to docs/migration.md.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.planted import PLANTED, Planted, english, make_pair, make_twin
from benchmarks.results_file import Row, write
from benchmarks.table import insert
from training.base_models import LoadedBase, load_base
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.generation import end_tokens, greedy_answers
from training.methods.borrowing import borrowed
from training.migration.choosing import choose
from training.migration.kit import Kit, build_kit, load_discriminator
from training.migration.labelling import label
from training.migration.options import (
    DiscriminatorOptions,
    DistillationOptions,
    KitOptions,
    SynthesisOptions,
)
from training.migration.second_opinion import differing, halves
from training.migration.second_opinion import settled as settle
from training.migration.soft_labels import soft_labels
from training.migration.synthesis import synthesise
from training.objectives.distillation import Distillation, Distilled
from training.options import TrainingOptions
from training.recipe import Recipe, recipe_from
from training.trainer import train_recipe

ROWS, TEST, INPUTS = 120, 500, 120
SURPLUS = 3  # inputs written for each that a variant learns
TEACHER_STEPS, TEACHER_RATE = 120, 1e-2
STUDENT_STEPS, STUDENT_RATE, STUDENTS = 300, 3e-3, 2
SYNTHESIS = SynthesisOptions()
PAGE = Path(__file__).parents[1] / "docs" / "migration.md"
BEGIN = "<!-- results: python -m benchmarks.migration_ablation -->"
DISCRIMINATOR = DiscriminatorOptions(training=TrainingOptions(epochs=6, batch_size=16, learning_rate=1e-2))


def recipe(reference: str, seed: int, steps: int, rate: float) -> Recipe:
    """A LoRA on a tiny base."""
    return recipe_from(
        {
            "adapter": "planted",
            "base": reference,
            "method": {"name": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
            "data": {"file": "not-read.jsonl", "instruction": ""},
            "training": {"steps": steps, "batch_size": 16, "learning_rate": rate, "checkpoint_every": 100_000},
            "seed": seed,
        },
        "planted",
    )


def trained(
    base: LoadedBase,
    examples: Sequence[Example],
    seed: int,
    steps: int = STUDENT_STEPS,
    rate: float = STUDENT_RATE,
    distilled: Distilled | None = None,
) -> nn.Module:
    """The base with a fresh LoRA that has learnt the examples; within `borrowed`."""
    with TemporaryDirectory() as workdir:
        chosen = recipe(base.reference, seed, steps, rate)
        adapted, _ = train_recipe(
            chosen, base, examples, (), workdir=Path(workdir), on_event=lambda event: None, distilled=distilled
        )
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
    """A kit, what the target wrote on its seeds, and who answers: what variants share.

    Args:
        task: whose inputs they are.
        seed: of everything drawn.
        kit: with its discriminator's temperature.
        inputs: that the target wrote.
        margins: of the discriminator.
        real: the rows that the teacher was trained on.
        answer: the teacher's greedy answers.
        settled: all inputs with the answers that are settled between the teacher and what the target learns of it.
    """

    task: Planted
    seed: int
    kit: Kit
    inputs: Sequence[str]
    margins: Sequence[float]
    real: Sequence[Example]
    answer: Callable[[Sequence[str]], Sequence[Example]]
    settled: Callable[[], Sequence[Example]]

    @property
    def seeds(self) -> list[Example]:
        """The kit's."""
        return [Example(each.prompt, each.completion) for each in self.kit.seeds]

    @property
    def real_looking(self) -> list[str]:
        """Those that the discriminator keeps."""
        return [text for text, margin in zip(self.inputs, self.margins, strict=True) if margin > 0]

    def chosen(self, *, odds: bool, lengths: bool, inputs: int = INPUTS) -> Sequence[Example]:
        """As a migration chooses, or by one of its two means."""
        judged = self.kit.discriminator
        assert judged is not None
        return self.answer(
            choose(
                self.inputs,
                self.margins if odds else (),
                inputs,
                temperature=judged.temperature,
                bounds=self.kit.lengths if lengths else (),
                seed=self.seed,
            )
        )


def filtered(scene: Scene) -> Sequence[Example]:
    """The first that the discriminator takes for real, with the teacher's answers."""
    return scene.answer(scene.real_looking[:INPUTS])


def unfiltered(scene: Scene) -> Sequence[Example]:
    """The first, without the discriminator."""
    return scene.answer(scene.inputs[:INPUTS])


def random_text(scene: Scene) -> Sequence[Example]:
    """As many sentences that have nothing to do with the task."""
    return scene.answer(english(INPUTS, scene.seed))


def seeds_only(scene: Scene) -> Sequence[Example]:
    """The kit's examples, with their real answers."""
    return scene.seeds


def odds(scene: Scene) -> Sequence[Example]:
    """Drawn by the discriminator's calibrated odds."""
    return scene.chosen(odds=True, lengths=False)


def lengths(scene: Scene) -> Sequence[Example]:
    """With the lengths of the real inputs."""
    return scene.chosen(odds=False, lengths=True)


def odds_and_lengths(scene: Scene) -> Sequence[Example]:
    """Both."""
    return scene.chosen(odds=True, lengths=True)


def with_seeds(scene: Scene) -> Sequence[Example]:
    """Both, and the seeds with their real answers."""
    return [*odds_and_lengths(scene), *scene.seeds]


def all_written(scene: Scene) -> Sequence[Example]:
    """Everything that was written, and the seeds with their real answers."""
    return [*scene.answer(scene.inputs), *scene.seeds]


def settled_answers(scene: Scene) -> Sequence[Example]:
    """The same with settled answers."""
    chosen = {each.prompt for each in odds_and_lengths(scene)}
    return [*(each for each in scene.settled() if each.prompt in chosen), *scene.seeds]


def right_answers(scene: Scene) -> Sequence[Example]:
    """The same inputs with their right answers: what the teacher's mistakes cost."""
    return [Example(each.prompt, scene.task.answer(each.prompt)) for each in odds_and_lengths(scene)]


def real_rows(scene: Scene) -> Sequence[Example]:
    """The data themselves, which a migration does not have."""
    return scene.real


Variant = Callable[[Scene], Sequence[Example]]
PAPER, RANDOM_TEXT, SEEDS_ONLY = "the paper's recipe", "random text", "seeds only"
OURS = "regraft: all that was written, and the seeds themselves"
BY_CHANCE: dict[str, Variant] = {
    PAPER: filtered,
    "unfiltered": unfiltered,
    RANDOM_TEXT: random_text,
    SEEDS_ONLY: seeds_only,
}
SPREAD: dict[str, Variant] = {
    "spread seeds": filtered,
    "spread seeds, by odds": odds,
    "spread seeds, real lengths": lengths,
    "spread seeds, both": odds_and_lengths,
    "spread seeds, both, and the seeds": with_seeds,
    "the same, settled answers": settled_answers,
    OURS: all_written,
    "spread seeds, both, right answers": right_answers,
    "the real rows": real_rows,
}


VARIANTS = BY_CHANCE.keys() | SPREAD.keys()


def measure(place: int, seed: int, directory: Path, names: Set[str] = VARIANTS) -> dict[str, Any]:
    """Accuracies of teacher, bare target and every variant's students, and how the inputs came about."""
    torch.set_num_threads(1)
    task = PLANTED[place]
    references = make_pair(directory)
    source, target = (load_base(reference, cache=directory / "cache") for reference in references)
    real, test = task.examples(ROWS, seed), task.examples(ROWS + TEST, seed)[ROWS:]
    found: dict[str, Any] = {}
    with borrowed(source.model):
        teacher = trained(source, real, seed, TEACHER_STEPS, TEACHER_RATE)
        found["teacher"] = accuracy(teacher, source.tokenizer, test)
        choices: tuple[tuple[Literal["random", "spread"], dict[str, Variant]], ...]
        choices = (("random", BY_CHANCE), ("spread", SPREAD))
        for choice, variants in choices:
            if not names & variants.keys():
                continue
            scene = prepared(task, seed, choice, source, references[0], target, teacher, real, directory, found)
            for name, variant in variants.items():
                if name not in names:
                    continue
                learnt = variant(scene)
                if name != RANDOM_TEXT:
                    found[f"{name}: right labels"] = mean(
                        task.answer(each.prompt) == each.completion for each in learnt
                    )
                found[name] = students_of(learnt, target, test, seed)
        found["bare"] = max(accuracy(target.model, target.tokenizer, test, shots) for shots in ((), scene.seeds[:3]))
    return found


def measure_logits(place: int, seed: int, directory: Path) -> dict[str, Any]:
    """Students of a base with the teacher's vocabulary, that learn its answers, or its logits beside them."""
    torch.set_num_threads(1)
    task, options = PLANTED[place], DistillationOptions()
    reference = make_pair(directory)[0]
    source, target = (load_base(each, cache=directory / "cache") for each in (reference, make_twin(directory)))
    real, test = task.examples(ROWS, seed), task.examples(ROWS + TEST, seed)[ROWS:]
    found: dict[str, Any] = {}
    with borrowed(source.model):
        teacher = trained(source, real, seed, TEACHER_STEPS, TEACHER_RATE)
        found["teacher"] = accuracy(teacher, source.tokenizer, test)
        scene = prepared(task, seed, "spread", source, reference, target, teacher, real, directory, found)
        learnt = with_seeds(scene)
        labels = soft_labels(teacher, PromptFormat(source.tokenizer), learnt, options.top_k)  # type: ignore[arg-type]
    distilled = Distilled(Distillation(options.temperature, options.weight), labels)
    found["answers"] = students_of(learnt, target, test, seed)
    found["logits"] = students_of(learnt, target, test, seed, distilled)
    return found


def students_of(
    learnt: Sequence[Example],
    target: LoadedBase,
    test: Sequence[Example],
    seed: int,
    distilled: Distilled | None = None,
) -> float:
    """Mean accuracy of students that differ in their seeds."""
    accuracies = []
    for student in range(STUDENTS):
        with borrowed(target.model):
            model = trained(target, learnt, 1000 * student + seed, distilled=distilled)
            accuracies.append(accuracy(model, target.tokenizer, test))
    return mean(accuracies)


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
        ceil(SURPLUS * INPUTS),
        SYNTHESIS,
        seed=seed,
        longest=kit.longest,
        margins=discriminator.margins,
        refusing=False,
    )
    found[f"{choice} seeds: balanced accuracy of the discriminator"] = kit.discriminator.balanced_accuracy
    found[f"{choice} seeds: acceptance"] = pool.acceptance

    def settled() -> Sequence[Example]:
        examples, opinions = answer(pool.inputs), []
        parts, seeds = halves(len(examples), seed), [Example(each.prompt, each.completion) for each in kit.seeds]
        for learnt, asked in (parts, parts[::-1]):
            with borrowed(target.model), TemporaryDirectory() as scratch:
                model = trained(target, [*(examples[place] for place in learnt), *seeds], seed)
                target_form = PromptFormat(target.tokenizer)  # type: ignore[arg-type]
                kept_in = Path(scratch) / "answers.jsonl"
                opinions += differing(model, target_form, examples, asked, longest=kit.longest_answer, kept_in=kept_in)
        return settle(teacher, form, examples, opinions)

    return Scene(task, seed, kit, pool.inputs, pool.margins, real, answer, settled)


MEASURES = {"text": measure, "logits": measure_logits}
Found = dict[tuple[str, str, int], dict[str, Any]]


def report(found: Found) -> None:
    """Write the results and the tables of docs/migration.md."""
    table, overall = tabled(found, "text", ("teacher", "bare", *BY_CHANCE, *SPREAD))
    if any(kind == "logits" for kind, _, _ in found):
        table += "\n\nThe same onto a Gemma that has the Llama's vocabulary, of answers or of logits beside them:\n\n"
        table += tabled(found, "logits", ("teacher", "answers", "logits"))[0]
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), table, BEGIN), encoding="utf-8")
    of_text = [values for (kind, _, _), values in found.items() if kind == "text"]
    to_beat = 100 * mean(max(values["teacher"], values["bare"]) for values in of_text)
    peers = (
        ("a migrated adapter is as good as the old one", to_beat - 2, "teacher or bare, less 2 points"),
        ("inputs like the real ones teach more than others", overall[RANDOM_TEXT] + 5, "random text, and 5 points"),
        ("they teach more than the seeds alone", overall[SEEDS_ONLY] + 5, "seeds only, and 5 points"),
        ("they teach more than filtered ones", overall[PAPER], "the paper's recipe"),
    )
    write(
        "migration_ablation",
        [Row(claim, overall[OURS], peer, name, "%", 1) for claim, peer, name in peers],
        details={f"{kind}: {task}, seed {seed}": values for (kind, task, seed), values in sorted(found.items())},
    )


def tabled(found: Found, kind: str, names: Sequence[str]) -> tuple[str, dict[str, float]]:
    """A table of percentages by task, and their means over tasks."""
    cells = {task.name: [values for key, values in found.items() if key[:2] == (kind, task.name)] for task in PLANTED}
    seeds, overall = len(cells[PLANTED[0].name]), {}
    lines = [
        f"| % of {TEST} items, {seeds} seeds × {STUDENTS} students | {' | '.join(cells)} | mean | right labels |",
        "|---|" + "---:|" * (len(cells) + 2),
    ]
    for name in names:
        values = [100 * mean(each[name] for each in of_task) for of_task in cells.values()]
        overall[name] = mean(values)
        labels = [each.get(f"{name}: right labels") for of_task in cells.values() for each in of_task]
        right = "–" if None in labels else f"{100 * mean(labels):.1f}"
        lines.append(f"| {' | '.join([name, *(f'{each:.1f}' for each in (*values, overall[name])), right])} |")
    return "\n".join(lines), overall


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--directory", type=Path, default=Path(gettempdir()) / "regraft-migration-ablation")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    make_pair(options.directory)
    make_twin(options.directory)
    settings = [ROWS, TEST, INPUTS, SURPLUS, TEACHER_STEPS, TEACHER_RATE, STUDENT_STEPS, STUDENT_RATE, STUDENTS]
    settings += [SYNTHESIS.model_dump(), DISCRIMINATOR.model_dump(), *sorted(VARIANTS)]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    kept = options.directory / f"results-{digest}.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    found: Found = {tuple(line["key"]): line["found"] for line in map(json.loads, lines)}
    places = [
        (kind, place, seed) for kind in options.kinds for place in range(len(PLANTED)) for seed in range(options.seeds)
    ]
    wanted = [(kind, place, seed) for kind, place, seed in places if (kind, PLANTED[place].name, seed) not in found]
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {
            pool.submit(MEASURES[kind], place, seed, options.directory): (kind, PLANTED[place].name, seed)
            for kind, place, seed in wanted
        }
        for future in as_completed(running):
            key = running[future]
            found[key] = future.result()
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "found": found[key]}) + "\n")
            print(*key, found[key], flush=True)
    report(found)


if __name__ == "__main__":
    main()
