"""What adapters of tiny models lose in a small form: ComPEFT over its densities, ranks cut and rounded, and one bit,
trained for it or not.

On the Llama of benchmarks/planted.py, a LoRA for each of three planted tasks and three seeds.

    python -m benchmarks.planted_compression [--seeds 3] [--directory DIR]

One bit is compared four ways: rounded after training to ± one number for each matrix (naive signs), or to the two
levels of a normal distribution (`codebook:bits=1`); trained through that rounding (`training.adapter_bits=1`), at the
same rank and at four times the rank; all of them with the same steps and the same rate. The results go to
benchmarks/results and, as a table, to docs/compression.md.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from torch import Tensor

from benchmarks.migration_ablation import accuracy
from benchmarks.planted import PLANTED, Planted, make_llama
from benchmarks.results_file import Row, write
from benchmarks.table import insert
from flows.compress_adapter import ALPHAS
from training.base_models import LoadedBase, load_base
from training.compression.adapter import compressed, dense_bytes
from training.compression.steps import decompress, read_steps
from training.data.example import Example
from training.merging.adapter import Adapter
from training.methods.borrowing import borrowed
from training.methods.contract import Adapted
from training.recipe import Recipe, recipe_from
from training.trainer import train_recipe

ROWS, VALIDATION, TEST = 1000, 200, 500
STEPS, RATE, RANK, WIDER = 300, 5e-3, 8, 4
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05)
BALANCED = "low_rank:energy=0.9999+"
GROUPS = ("groups:bits=4", *(f"low_rank:energy={energy}+groups:bits=4,levels=5" for energy in (0.95, 0.9, 0.8)))
PAGE = Path(__file__).parents[1] / "docs" / "compression.md"
BEGIN = "<!-- results: python -m benchmarks.planted_compression -->"
WHOLE, NAIVE, AFTER, TRAINED = "as it is", "naive signs", "codebook:bits=1", "trained, codebook:bits=1"
WIDE = f"trained at rank {WIDER * RANK}, codebook:bits=1"


@dataclass(frozen=True)
class Measured:
    """One adapter in one form."""

    accuracy: float
    bits: float


def recipe(reference: str, seed: int, rank: int, bits: int | None) -> Recipe:
    """A LoRA on a tiny base."""
    return recipe_from(
        {
            "adapter": "planted",
            "base": reference,
            "method": {"name": "lora", "rank": rank, "alpha": 2 * rank, "targets": "all-linear"},
            "data": {"file": "not-read.jsonl", "instruction": ""},
            "training": {
                "steps": STEPS,
                "batch_size": 16,
                "learning_rate": RATE,
                "checkpoint_every": 100_000,
                "adapter_bits": bits,
            },
            "seed": seed,
        },
        "planted",
    )


def trained(base: LoadedBase, examples: list[Example], seed: int, rank: int, bits: int | None) -> Adapted:
    """Within `borrowed`."""
    with TemporaryDirectory() as workdir:
        chosen = recipe(base.reference, seed, rank, bits)
        adapted, _ = train_recipe(chosen, base, examples, (), workdir=Path(workdir), on_event=lambda event: None)
    adapted.model.eval()
    return adapted


def signs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix as ± its mean magnitude, the best common one for given signs (XNOR-Net, arXiv 1603.05279)."""
    return {name: torch.where(w < 0, -1.0, 1.0) * w.abs().mean() for name, w in tensors.items()}


def padded(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors of a lower rank at a higher one, rows and columns of zeros added."""
    found = {}
    for name, tensor in like.items():
        found[name] = torch.zeros_like(tensor)
        found[name][: len(tensors[name]), : tensors[name].shape[1]] = tensors[name]
    return found


def forms(adapted: Adapted, base: LoadedBase, validation: list[Example], test: list[Example]) -> dict[str, Measured]:
    """What an adapter of full precision measures in its forms; of ComPEFT, with the α that is best on validation."""
    own = adapted.tensors()
    whole = {name: tensor.clone() for name, tensor in own.items()}
    adapter = Adapter("planted", adapted.adapter_config(), whole)
    scale = adapter.config["lora_alpha"] / adapter.config["r"]
    elements = dense_bytes(whole) // 2

    def right(tensors: Mapping[str, Tensor], items: list[Example]) -> float:
        adapted.restore(tensors)
        return accuracy(adapted.model, base.tokenizer, items)

    def decoded(line: str) -> tuple[dict[str, Tensor], float]:
        data = compressed(adapter, read_steps(line), {}).data
        tensors = padded(decompress(data), whole)
        if line.startswith("low_rank"):  # whose scale is 1
            tensors = {name: tensor / (scale if ".lora_B" in name else 1) for name, tensor in tensors.items()}
        return tensors, 8 * len(data) / elements

    found = {WHOLE: Measured(right(whole, test), 16.0), NAIVE: Measured(right(signs(whole), test), 1.0)}
    for line in (AFTER, *GROUPS):
        tensors, bits = decoded(line)
        found[line] = Measured(right(tensors, test), bits)
    for before in ("", BALANCED):
        for density in DENSITIES:
            line = f"{before}compeft:density={density:g}"
            tried = [decoded(f"{line},alpha={alpha:g}") for alpha in ALPHAS]
            scores = [right(tensors, validation) for tensors, _ in tried]
            tensors, bits = tried[scores.index(max(scores))]
            found[line] = Measured(right(tensors, test), bits)
    adapted.restore(whole)
    return found


def measure(reference: str, task: Planted, seed: int, directory: Path) -> dict[str, Measured]:
    """All forms of the adapters for one task and seed."""
    items = task.examples(ROWS + VALIDATION + TEST, seed)
    rows, validation, test = items[:ROWS], items[ROWS : ROWS + VALIDATION], items[ROWS + VALIDATION :]
    base = load_base(reference, cache=directory / "cache")
    with borrowed(base.model):
        found = forms(trained(base, rows, seed, RANK, None), base, validation, test)
    for name, rank in ((TRAINED, RANK), (WIDE, WIDER * RANK)):
        with borrowed(base.model):
            adapted = trained(base, rows, seed, rank, 1)
            tensors = adapted.tensors()
            data = compressed(
                Adapter("planted", adapted.adapter_config(), tensors), read_steps("codebook:bits=1"), {}
            ).data
            adapted.restore(decompress(data))
            found[name] = Measured(
                accuracy(adapted.model, base.tokenizer, test), 8 * len(data) / (dense_bytes(tensors) // 2)
            )
    return found


def report(found: list[dict[str, Measured]]) -> None:
    """Write the results and the table of docs/compression.md."""
    accuracies = {name: 100 * mean(each[name].accuracy for each in found) for name in found[0]}
    bits = {name: mean(each[name].bits for each in found) for name in found[0]}
    lines = ["| form | bits a number | accuracy |", "|---|---:|---:|"]
    for name in sorted(accuracies, key=lambda name: -bits[name]):
        told = name if name in (WHOLE, NAIVE) or name.startswith("trained") else f"`{name}`"
        lines.append(f"| {told} | {bits[name]:.2f} | {accuracies[name]:.1f} % |")
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), "\n".join(lines), BEGIN), encoding="utf-8")
    least, whole = accuracies[WHOLE] - 1, f"{WHOLE}, less 1"
    rows = [Row(f"planted tasks, {name}", accuracies[name], least, whole, "%", 1) for name in (TRAINED, WIDE)]
    rows.append(Row("planted tasks, one bit, trained for it", accuracies[TRAINED], accuracies[NAIVE], NAIVE, "%", 1))
    rows.append(Row("planted tasks, one bit afterwards", accuracies[AFTER], accuracies[NAIVE], NAIVE, "%", 1))
    best = max((name for name in bits if "compeft" in name and bits[name] <= 1), key=lambda name: accuracies[name])
    claim = f"planted tasks, 16 times smaller or more ({best})"
    rows.append(Row(claim, accuracies[best], least, whole, "%", 1))
    details: dict[str, Any] = {"runs": [{name: vars(each[name]) for name in each} for each in found]}
    write("planted_compression", rows, details=details)


def main() -> None:
    """Measure what is not measured yet, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(gettempdir()) / "regraft-planted")
    options = parser.parse_args()
    reference = make_llama(options.directory)
    kept = options.directory / "compression.jsonl"
    known = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    done = {(task, seed): {name: Measured(**each) for name, each in forms.items()} for task, seed, forms in known}
    for seed in range(options.seeds):
        for task in PLANTED:
            if (task.name, seed) not in done:
                done[task.name, seed] = found = measure(reference, task, seed, options.directory)
                with kept.open("a", encoding="utf-8") as file:
                    line = [task.name, seed, {name: vars(each) for name, each in found.items()}]
                    file.write(json.dumps(line) + "\n")
            whole = done[task.name, seed][WHOLE].accuracy
            print(f"  {task.name}, seed {seed}: {100 * whole:.1f} % as it is", flush=True)
    report(list(done.values()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
