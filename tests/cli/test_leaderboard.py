"""`regraft leaderboard`, for people and for programs."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from infra.settings import get_settings
from registry import AdapterRegistry
from tests.cli.conftest import run_here
from tests.cli.test_lifecycle import clean

TASK = "leaderboard_task"


@pytest.fixture(scope="module", autouse=True)
def measured(regraft_home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three adapters on one suite, of which two are as good as each other; one was measured on other items."""
    get_settings.cache_clear()
    registry, base = AdapterRegistry(), "ab" * 32
    registry.register_base_model("path:/nowhere", base, name="ranked-base", family="llama", parameters=12_000)
    for number, (name, share, items) in enumerate(
        (("best", 90, "t"), ("near", 88, "t"), ("far", 10, "t"), ("x", 5, "u"))
    ):
        directory = tmp_path_factory.mktemp(name)
        save_file({"q.lora_A.weight": np.full((2, 8), number, np.float32)}, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
        address = registry.register_version(
            f"ranked-{name}", directory, base_identity=base, method="lora", recipe={}, trainable_parameters=16
        ).address
        outcomes = [1] * share + [0] * (100 - share)
        registry.record_evaluation(
            address, f"{TASK}/test", "exact_match", share / 100, low=share / 100, high=share / 100, samples=100,
            outcomes=outcomes, dataset_fingerprint=items * 64,
        )  # fmt: skip


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_for_each_set_of_items_ranks_and_marks(width: int) -> None:
    shown = clean(run_here("leaderboard", TASK, width=width))
    assert shown.count(f"{TASK}/test") == 2 and "items tttttttt" in shown and "items uuuuuuuu" in shown
    ranks = {words[1]: words[0] for line in shown.splitlines() if len(words := line.split()) > 1 and "@" in words[1]}
    assert ranks == {"ranked-best@1": "1", "ranked-near@1": "1", "ranked-far@1": "3", "ranked-x@1": "1"}
    assert max(map(len, shown.splitlines()[:6])) <= width


def test_json_and_csv_say_the_same() -> None:
    tables = json.loads(clean(run_here("leaderboard", f"{TASK}/test", "--json")))
    rows = list(csv.DictReader(io.StringIO(clean(run_here("leaderboard", f"{TASK}/test", "--csv")))))
    standings = [standing for table in tables for standing in table["standings"]]
    assert [row["address"] for row in rows] == [standing["address"] for standing in standings]
    assert [float(row["value"]) for row in rows] == [standing["value"] for standing in standings]
    assert [table["dataset_fingerprint"] for table in tables] == ["t" * 64, "u" * 64]
    assert run_here("leaderboard", TASK, "--json", "--csv").code == 2


def test_limit_cuts_and_says_so() -> None:
    shown = clean(run_here("leaderboard", TASK, "--limit", "1"))
    assert "ranked-near@1" not in shown and "… and 2 more" in shown
    assert "None of them fits" in clean(run_here("leaderboard", TASK, "--method", "ia3"))


def test_an_unknown_task_is_refused_with_a_hint() -> None:
    told = run_here("leaderboard", "leaderbord_task")
    assert told.code == 3
    assert f"Did you mean '{TASK}" in told.err and f"{TASK}/test" in told.err
