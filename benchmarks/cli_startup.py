"""How long the command line takes to answer, and what it imports for that.

Whole processes, the interpreter's start included, each in turn with the peers' so that all see the same machine; the
home holds one adapter. `regraft --help` may take 0.5 s, `regraft adapters list` 1.5 s.

    python -m benchmarks.cli_startup [--repeats 9]
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import save_file

from benchmarks.results_file import Row, write
from infra.settings import Settings
from registry import AdapterRegistry

HELP_LIMIT, LIST_LIMIT = 0.5, 1.5  # seconds
COMMANDS = {
    "regraft --help": ["cli", "--help"],
    "regraft adapters list": ["cli", "adapters", "list"],
    "mlflow --help": ["mlflow", "--help"],
    "prefect --help": ["prefect", "--help"],
}
LONGEST = 12


def seconds(module: list[str], environment: dict[str, str]) -> float:
    """Of one run of `python -m MODULE …`."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", *module], env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def imports(module: list[str], environment: dict[str, str]) -> list[tuple[float, str]]:
    """(milliseconds, name) of the imports that took longest, each with all that it imports."""
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *module], env=environment, capture_output=True, text=True, check=True
    ).stderr
    lines = re.findall(r"import time:\s+\d+ \|\s+(\d+) \| +(\S+)", told)
    return sorted(((int(microseconds) / 1000, name) for microseconds, name in lines), reverse=True)[:LONGEST]


def fill(home: Path) -> None:
    """One adapter with one version, as peft would have made it."""
    registry = AdapterRegistry(Settings(home=home))
    registry.register_base_model("path:/nowhere", "0" * 64, name="some-base", family="llama", parameters=1_000_000)
    directory = home / "adapter"
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    save_file({"q.lora_A.weight": np.zeros((2, 8), np.float32)}, directory / "adapter_model.safetensors")
    registry.import_(directory, "some-adapter", base_identity="0" * 64)
    shutil.rmtree(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    with TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        fill(home)
        environment = {**os.environ, "REGRAFT_HOME": str(home), "DO_NOT_TRACK": "1", "PREFECT_HOME": folder}
        times: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for module in COMMANDS.values():
            seconds(module, environment)  # compiled files and caches are there
        for _ in range(repeats):
            for name, module in COMMANDS.items():
                times[name].append(seconds(module, environment))
        for name in ("regraft --help", "regraft adapters list"):
            print(f"{name}: longest imports, all that they import included")
            for milliseconds, imported in imports(COMMANDS[name], environment):
                print(f"  {milliseconds:7.0f} ms  {imported}")
    ours = {name: median(taken) for name, taken in times.items()}
    rows = [
        Row("regraft --help", ours["regraft --help"], HELP_LIMIT, "limit", "s", 1.0, "lower"),
        Row("regraft adapters list", ours["regraft adapters list"], LIST_LIMIT, "limit", "s", 1.0, "lower"),
        *(
            Row("regraft --help", ours["regraft --help"], ours[peer], peer, "s", 1.0, "lower")
            for peer in ("mlflow --help", "prefect --help")
        ),
    ]
    write("cli_startup", rows)


if __name__ == "__main__":
    main()
