"""What orchestration costs: `train_adapter` through a local Prefect server, against the plain functions that it calls.

    python -m benchmarks.orchestration [--steps 100]

The plain side selects, loads, trains, writes and registers by the same functions, with no flow, no Prefect artifact and
no MLflow run. The fixed cost is the difference on a training of one step; the share is that of a long training.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.results_file import Row, write
from infra.prefect_client import configure_prefect
from infra.settings import get_settings
from training.recipe import Recipe, load_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "counting.yaml"


def through_prefect(recipe: Recipe) -> float:
    """Seconds of the flow."""
    from flows.train_adapter import train_adapter

    started = time.perf_counter()
    train_adapter(recipe, fresh=True, evaluate=False)
    return time.perf_counter() - started


def directly(recipe: Recipe) -> float:
    """Seconds of the plain functions."""
    from flows.base_models import find_base
    from registry import AdapterRegistry
    from training.adapter_files import write_adapter
    from training.base_models import load_base
    from training.data.sources import load_splits
    from training.selection.selection import select
    from training.trainer import train_recipe

    settings = get_settings()
    started = time.perf_counter()
    splits = load_splits(recipe.data, recipe.seed)
    chosen = select(splits.train, recipe.selection, recipe.seed)
    record, folder = find_base(recipe.base)
    base = load_base(folder.reference, cache=settings.base_models)
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(scratch) / "work"
        adapted, _ = train_recipe(
            recipe, base, chosen.examples, splits.validation, workdir=workdir, on_event=lambda event: None
        )
        directory = Path(scratch) / "adapter"
        write_adapter(
            directory,
            adapted.save,
            recipe.method.name,
            record.identity_sha256,
            record.reference,
            recipe.as_stored(),
            {},
        )
        AdapterRegistry().register_version(
            recipe.adapter,
            directory,
            base_identity=record.identity_sha256,
            method=recipe.method.name,
            recipe=recipe.as_stored(),
            trainable_parameters=sum(p.numel() for p in adapted.trainable().values()),
        )
    return time.perf_counter() - started


def main() -> None:
    """Measure and write results/orchestration.cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of the long training")
    parser.add_argument("--repeats", type=int, default=3, help="of the short training")
    options = parser.parse_args()
    recipe = load_recipe(RECIPE, {"migration_kit": False})

    def of(steps: int) -> Recipe:
        return recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": steps})})

    configure_prefect(get_settings())
    directly(of(1)), through_prefect(of(1))  # imports, caches, first databases
    short = [(through_prefect(of(1)), directly(of(1))) for _ in range(options.repeats)]
    fixed = statistics.median(flow - plain for flow, plain in short)
    flow, plain = through_prefect(of(options.steps)), directly(of(options.steps))
    write(
        "orchestration",
        [
            Row("fixed cost of a flow run", fixed, 4.0, "the limit", "s", 1.0, "lower"),
            Row(f"training of {plain:.0f} s", flow, plain, "the plain functions", "s", 1.03, "lower"),
        ],
    )


if __name__ == "__main__":
    main()
