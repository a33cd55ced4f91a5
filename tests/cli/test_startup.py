"""What the command imports before it is needed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

HEAVY = ("torch", "transformers", "peft", "mlflow", "prefect", "boto3", "scipy", "matplotlib", "pandas")
COMMANDS = """
import contextlib, io, json, sys
sys.argv = ["regraft", *json.loads(sys.argv[1])]
from cli.main import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
print(json.dumps(sorted(sys.modules)))
"""


def imported_by(code: str, *arguments: str) -> set[str]:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=root
    )
    return set(json.loads(done.stdout))


def test_the_command_line_itself_imports_nothing_heavy() -> None:
    modules = imported_by("import cli.main, json, sys; print(json.dumps(sorted(sys.modules)))")
    assert not modules & {*HEAVY, "sqlalchemy", "pydantic_settings", "registry", "training", "flows"}


@pytest.mark.parametrize(
    "arguments", [["adapters", "list"], ["base", "list"], ["leaderboard", "x"], ["adapters", "list", "--json"]]
)
def test_listing_the_registry_needs_tables_only(home: Path, arguments: list[str]) -> None:
    modules = imported_by(COMMANDS, json.dumps(arguments))
    assert "sqlalchemy" in modules
    assert not modules & set(HEAVY)


def test_a_check_before_serving_reads_headers_only(home: Path, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factors = {f"base_model.model.q.lora_{side}.weight": np.ones((1, 1), np.float32) for side in "AB"}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    modules = imported_by(COMMANDS, json.dumps(["check", str(tmp_path), "--for", "vllm"]))
    assert "registry.serving_rules" in modules
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("arguments", [["status"], ["--help"], ["schedule", "--help"]])
def test_status_and_help_need_neither_tables_nor_tensors(home: Path, arguments: list[str]) -> None:
    assert not imported_by(COMMANDS, json.dumps(arguments)) & {*HEAVY, "sqlalchemy"}
