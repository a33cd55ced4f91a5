"""Kernels choose between Triton's interpreter and the real thing when they are imported: so each in a process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def printed(module: str, device: str, **environment: str) -> dict[str, Any]:
    """What `python -m tests.kernels.MODULE DEVICE` prints, JSON."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}", device],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
