"""One format for every benchmark's numbers: benchmarks/results/SCRIPT.DEVICE.json."""

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton", "prefect", "mlflow", "sqlalchemy", "numpy")


@dataclass(frozen=True, slots=True)
class Row:
    """One claim and what was measured.

    Args:
        claim: what should be so.
        ours: median over repeats.
        peer: the same of what it is compared with, measured in the same run; a limit, where that is the comparison.
        peer_name: what that is.
        unit: of both.
        goal: what ours / peer should reach.
        better: whether more or less of the unit is better.
    """

    claim: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    goal: float
    better: Literal["higher", "lower"] = "higher"

    @property
    def ratio(self) -> float:
        """ours / peer."""
        return self.ours / self.peer

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the goal."""
        return self.ratio >= self.goal if self.better == "higher" else self.ratio <= self.goal


def write(script: str, rows: Sequence[Row], device: str = "cpu", details: Mapping[str, Any] | None = None) -> Path:
    """Write and print the rows of a benchmark.

    Args:
        script: its module's last name.
        rows: what it measured.
        device: "cpu", or the name of the GPU.
        details: what else it measured, JSON-like.
    """
    content = {
        "script": script,
        "device": device if device != "cpu" else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "rows": [{**asdict(row), "ratio": row.ratio, "met": row.met} for row in rows],
        **({"details": details} if details else {}),
    }
    for row in rows:
        sign = "≥" if row.better == "higher" else "≤"
        print(
            f"{'✓' if row.met else '✗'} {row.claim}: {row.ours:,.4g} against {row.peer:,.4g} {row.unit} "
            f"({row.peer_name}), ratio {row.ratio:.3f}, goal {sign} {row.goal:g}"
        )
    RESULTS.mkdir(exist_ok=True)
    path = path_of(script, device)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def path_of(script: str, device: str = "cpu") -> Path:
    """Where `write` writes."""
    return RESULTS / f"{script}.{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8"))
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
