"""The `regraft` command, in this process (fast) or in one of its own (where the process is what is tested)."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.session import LINE_MARK
from infra.settings import get_settings
from tests.tiny_models import save_tiny_llama

TRAINING = {"steps": 4, "batch_size": 4, "learning_rate": 0.01, "max_length": 512}


@dataclass(frozen=True)
class Told:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Regraft = Callable[..., Told]
WriteRecipe = Callable[..., Path]


def run_here(*arguments: str, stdin: str = "", width: int = 80) -> Told:
    """`regraft ARGUMENTS` in this process, the environment left as it was."""
    from cli import console
    from cli.main import main

    out, err = io.StringIO(), io.StringIO()
    environment, argv, sys_stdin = dict(os.environ), sys.argv, sys.stdin
    sys.argv, sys.stdin = ["regraft", *arguments], io.StringIO(stdin)
    console.console.width = console.errors.width = width
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        sys.argv, sys.stdin = argv, sys_stdin
        os.environ.clear()
        os.environ.update(environment)
    return Told(code, out.getvalue(), without_progress(err.getvalue()))


def without_progress(err: str) -> str:
    """A slow machine's signs of life left out."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith(LINE_MARK))


def started(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """`regraft ARGUMENTS` as a process in a group of its own, as a terminal's foreground job is."""
    # What other tests of this process have told Prefect about its console is not for a user's terminal.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_LOGGING")}
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *arguments],
        env={**inherited, "COLUMNS": "80", **environment},
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def ended(process: "subprocess.Popen[str]") -> Told:
    """What a started command left."""
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Told(process.returncode, out, without_progress(err))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Regraft home, for this test alone, without servers."""
    home = tmp_path / "home"
    monkeypatch.setenv("REGRAFT_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield home
    get_settings.cache_clear()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Reference of a tiny Llama."""
    return f"path:{save_tiny_llama(tmp_path_factory.mktemp('tiny-llama'))}"


@pytest.fixture(scope="session")
def write_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: str) -> WriteRecipe:
    """Writes a recipe that trains in a second; keyword arguments replace sections."""

    def write(adapter: str, **sections: Any) -> Path:
        content = {
            "adapter": adapter,
            "description": "Truth [of expressions]",
            "base": tiny_base,
            "method": {"name": "lora", "rank": 4},
            "data": {"task": "boolean_expressions", "sizes": {"train": 40, "validation": 8, "test": 24}},
            "training": TRAINING,
            "evaluation": [{"samples": 24, "max_new_tokens": 4}],
            "migration_kit": False,
            **sections,
        }
        path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return path

    return write
