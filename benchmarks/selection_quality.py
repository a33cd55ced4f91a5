"""What a warm-up on selected rows is worth: GOT-D against other choices, before the same fine-tuning.

In a planted world for each seed (benchmarks/planted_pool.py), with a base model pretrained there, a pool of its own and
three targets. For each target every method is given 200 inputs without answers and chooses 3 % of the pool. A LoRA
learns those rows as plain texts (stage I), then 24 solved examples of the target (stage II), in equal steps for all.

    python -m benchmarks.selection_quality [--seeds 3] [--workers 2] [--directory DIR]

Perplexity is that of a token of held-out texts of the target after stage I; accuracy that of the answers to held-out
inputs after stage II; ± is the standard deviation over seeds. Embeddings are those of all-MiniLM-L6-v2. World, rates
and steps were settled before any method had chosen, on another world (seed 100), whose LoRA learnt dogs and birds in
equal parts; methods have their default settings. (`dsir` had a pseudo-count of 1 at first, and chose noise
alone; it has none now, as its authors' code has none.)

What was measured is kept in --directory; a benchmark that was stopped goes on where it was. The results go to
benchmarks/results and, as a table, to docs/selection.md.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from math import exp
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.planted_pool import SHARES, TARGETS, Case, World
from benchmarks.results_file import Row, write
from benchmarks.table import insert
from training.base_models import LoadedBase, load_base
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.evaluate import evaluate
from training.evaluation.result import EvaluationResult
from training.methods.borrowing import borrowed
from training.methods.contract import Adapted
from training.recipe import recipe_from
from training.selection import coverage, dsir, gotd
from training.selection.embedding import embeddings, load_encoder
from training.selection.pool import Pool, open_pool
from training.trainer import train_recipe

UNLABELLED, LABELLED, TEST = 200, 24, 300
BUDGET = 120
WARM_UP_STEPS, WARM_UP_RATE = 30, 3e-3
STEPS, RATE = 60, 1e-3
PAGE = Path(__file__).parents[1] / "docs" / "selection.md"
BEGIN = "<!-- results: python -m benchmarks.selection_quality -->"
GOTD, NEAREST, RANDOM, K_CENTRE, NONE = "got-d", "nearest", "random", "k-centre", "no warm-up"
DSIR = "dsir"
METHODS = (GOTD, NEAREST, DSIR, RANDOM, K_CENTRE, NONE)
BETTER: dict[str, Literal["higher", "lower"]] = {"perplexity": "lower", "accuracy": "higher"}

Vectors = NDArray[Any]
Tensors = Mapping[str, Tensor]
Found = dict[tuple[str, int], dict[str, dict[str, float]]]


def choices(
    pool: Sequence[Case], target: Sequence[Case], rows: Vectors, wanted: Vectors, budget: int, seed: int
) -> dict[str, NDArray[np.int64]]:
    """The rows of the pool that each method takes for the target, both given with their embeddings."""
    to_find = torch.from_numpy(np.array(wanted, np.float32))
    inputs = [case.told for case in target]
    with TemporaryDirectory() as folder:
        candidates = _opened(Path(folder) / "pool.jsonl", [case.text for case in pool])
        drawn, _ = dsir.resample(candidates, inputs, budget, seed)
    return {
        GOTD: gotd.choose(to_find, rows, budget, seed=seed).rows,
        NEAREST: coverage.nearest_neighbours(to_find, rows, budget),
        DSIR: drawn,
        RANDOM: coverage.random(len(pool), budget, seed),
        K_CENTRE: coverage.k_centre(rows, budget, seed=seed),
    }


def _opened(file: Path, texts: Sequence[str]) -> Pool:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return open_pool([file])


def embedded(texts: Sequence[str], directory: Path) -> Vectors:
    """By the encoder that selections use."""
    return embeddings(texts, load_encoder(bases=directory / "cache"), directory / "embeddings")


def learnt(
    base: LoadedBase, examples: Sequence[Example], seed: int, steps: int, rate: float, begun: Tensors | None = None
) -> Adapted:
    """A LoRA, fresh or from the tensors of another one, that has learnt the examples; within `borrowed`."""
    content = {
        "adapter": "planted",
        "base": base.reference,
        "method": {"name": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
        "data": {"file": "not-read.jsonl", "instruction": ""},
        "training": {"steps": steps, "batch_size": 8, "learning_rate": rate, "checkpoint_every": 100_000},
        "seed": seed,
    }
    with TemporaryDirectory() as workdir:
        adapted, _ = train_recipe(
            recipe_from(content, "planted"),
            base,
            examples,
            (),
            workdir=Path(workdir),
            on_event=lambda event: None,
            start=(lambda fresh: begun) if begun else None,
        )
    return adapted


def warmed_up(
    base: LoadedBase, chosen: Sequence[Case], labelled: Sequence[Case], test: Sequence[Case], seed: int
) -> dict[str, float]:
    """Perplexity after stage I and accuracy after stage II, of all test cases and of each topic."""
    begun = None
    with borrowed(base.model):
        model: Any = base.model
        if chosen:
            adapted = learnt(base, [Example(case.text, "") for case in chosen], seed, WARM_UP_STEPS, WARM_UP_RATE)
            model, begun = adapted.model, {name: tensor.clone() for name, tensor in adapted.tensors().items()}
        read = judged(model, base, [Example(case.text, "") for case in test], "perplexity")
    with borrowed(base.model):
        tuned = learnt(base, [case.example for case in labelled], seed, STEPS, RATE, begun)
        answered = judged(tuned.model, base, [case.example for case in test], "exact_match")
    assert answered.outcomes is not None
    found = {"perplexity": read.value, "accuracy": 100 * answered.value}
    for topic in sorted({case.topic for case in test}):
        places = [place for place, case in enumerate(test) if case.topic == topic]
        nats, tokens = (sum(values[place] for place in places) for values in (read.losses, read.tokens))
        found[f"perplexity of {topic}"] = exp(nats / tokens)
        found[f"accuracy of {topic}"] = 100 * mean(answered.outcomes[place] for place in places)
    return found


def judged(
    model: Any, base: LoadedBase, examples: Sequence[Example], metric: Literal["perplexity", "exact_match"]
) -> EvaluationResult:
    """As an evaluation does."""
    return evaluate(model, base.tokenizer, examples, metric=metric, prompt_format=PromptFormat(base.tokenizer))


def measure(name: str, seed: int, directory: Path) -> dict[str, dict[str, float]]:
    """What every method chose for a target, and what came of it."""
    torch.set_num_threads(1)
    world = World(seed)
    pool = world.pool()
    unlabelled, labelled, test = (
        world.target(name, use, number)
        for use, number in (("unlabelled", UNLABELLED), ("labelled", LABELLED), ("test", TEST))
    )
    rows = embedded([case.text for case in pool], directory)
    wanted = embedded([case.told for case in unlabelled], directory)
    base = load_base(world.base(directory), cache=directory / "cache")
    found = {NONE: warmed_up(base, [], labelled, test, seed)}
    for method, places in choices(pool, unlabelled, rows, wanted, BUDGET, seed).items():
        chosen = [pool[place] for place in places]
        shares = {f"chosen {topic}": 100 * mean(case.topic == topic for case in chosen) for topic in SHARES}
        found[method] = {**shares, **warmed_up(base, chosen, labelled, test, seed)}
    return found


def prepare(seed: int, directory: Path) -> None:
    """Pretrain the base of a world and embed its pool, where that is not done."""
    torch.set_num_threads(1)
    world = World(seed)
    world.base(directory)
    embedded([case.text for case in world.pool()], directory)


def report(found: Found) -> None:
    """Write the results and the table of docs/selection.md."""
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), tabled(found), BEGIN), encoding="utf-8")
    rows = [_claim(found, measured, peer) for measured in BETTER for peer in (RANDOM, NEAREST, DSIR)]
    write("selection_quality", rows, details={f"{name}, seed {seed}": each for (name, seed), each in found.items()})


def _claim(found: Found, measured: str, peer: str) -> Row:
    """Means over all targets and worlds; in how many of these GOT-D was better is told with the peer's name."""
    ours, theirs = ([methods[name][measured] for methods in found.values()] for name in (GOTD, peer))
    higher = BETTER[measured] == "higher"
    better = sum(one > other if higher else one < other for one, other in zip(ours, theirs, strict=True))
    claim = f"{measured} after a warm-up on what GOT-D chose, mean of {len(ours)} planted cases"
    unit = "%" if measured == "accuracy" else "a token"
    name = f"{peer}; GOT-D better in {better} of {len(ours)}"
    return Row(claim, mean(ours), mean(theirs), name, unit, 1, BETTER[measured])


def tabled(found: Found) -> str:
    """A row for each target and method; the last column counts worlds in which GOT-D did better."""
    lines = [
        "| target | chosen by | birds | noise | perplexity | accuracy | GOT-D better |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in TARGETS:
        worlds = [methods for (target, _), methods in sorted(found.items()) if target == name]
        for method in METHODS:
            values = {key: [methods[method][key] for methods in worlds] for key in worlds[0][method]}
            chosen = [
                f"{mean(values[key]):.0f} %" if key in values else "–" for key in ("chosen birds", "chosen noise")
            ]
            read, answered = ((mean(values[key]), stdev(values[key])) for key in ("perplexity", "accuracy"))
            measured = ["{:.3f} ± {:.3f}".format(*read), "{:.1f} ± {:.1f} %".format(*answered)]
            lines.append(f"| {' | '.join([name, method, *chosen, *measured, _compared(worlds, method)])} |")
    return "\n".join(lines)


def _compared(worlds: Sequence[dict[str, dict[str, float]]], method: str) -> str:
    if method == GOTD:
        return ""
    reads = sum(each[GOTD]["perplexity"] < each[method]["perplexity"] for each in worlds)
    answers = sum(each[GOTD]["accuracy"] > each[method]["accuracy"] for each in worlds)
    return f"{reads} and {answers} of {len(worlds)}"


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--directory", type=Path, default=Path(gettempdir()) / "regraft-selection-quality")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    settings = [UNLABELLED, LABELLED, TEST, BUDGET, WARM_UP_STEPS, WARM_UP_RATE, STEPS, RATE]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    kept = options.directory / f"results-{digest}.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    found: Found = {(name, seed): methods for (name, seed), methods in map(json.loads, lines)}
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(prepare, directory=options.directory), range(options.seeds)))
        wanted = [(name, seed) for seed in range(options.seeds) for name in TARGETS if (name, seed) not in found]
        running = {pool.submit(measure, name, seed, options.directory): (name, seed) for name, seed in wanted}
        for future in as_completed(running):
            key = running[future]
            found[key] = future.result()
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, found[key]]) + "\n")
            print(*key, found[key], flush=True)
    report({(name, seed): found[name, seed] for name in TARGETS for seed in range(options.seeds)})


if __name__ == "__main__":
    main()
