"""Targets and evaluation sets have the pool's columns, where they have them, or the usual ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.selection_samples import evaluation_sets_of, target_of
from infra.errors import InvalidInput
from training.selection.options import PoolSelection

TEXT = {"text": "five apples"}
ANSWERED = {"prompt": "2 + 2?", "completion": "4"}
ASKED = {"question": "2 + 2?", "answer": "4"}
FAQ = {"prompt": "question", "completion": "answer", "choices": "options"}


def selection(folder: Path, row: dict[str, Any], columns: Any, more: Any = None) -> PoolSelection:
    file = folder / "sample.jsonl"
    file.write_text(json.dumps(row) + "\n")
    source = {"file": file, **(more or {})}
    said = {"pool": ["pool.jsonl"], "method": "dsir", "budget": 5, "target": source, "decontaminate": [source]}
    return PoolSelection.model_validate(said | ({"columns": columns} if columns else {}))


@pytest.mark.parametrize(
    ("row", "columns", "text"),
    [
        (TEXT, None, "five apples"),
        ({"body": "five pears"}, {"text": "body"}, "five pears"),
        (ASKED, FAQ, "2 + 2? 4"),
        (ANSWERED, None, "2 + 2? 4"),
        (ANSWERED, FAQ, "2 + 2? 4"),
        (TEXT, FAQ, "five apples"),
        (TEXT | ANSWERED, None, "five apples"),
        (TEXT | ANSWERED, {"prompt": "prompt"}, "2 + 2? 4"),
    ],
)
def test_columns_are_the_pools_or_the_usual_ones(row: dict[str, Any], columns: Any, text: str, tmp_path: Path) -> None:
    options = selection(tmp_path, row, columns)
    assert [example.text for example in target_of(options)] == [text]
    assert [example.text for example in evaluation_sets_of(options)["sample.jsonl"]] == [text]


def test_columns_that_are_named_are_taken(tmp_path: Path) -> None:
    options = selection(tmp_path, TEXT | ASKED, None, {"columns": {"prompt": "question", "completion": "answer"}})
    assert [example.text for example in target_of(options)] == ["2 + 2? 4"]


def test_errors_name_keys_that_a_selection_has(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"sample.jsonl line 1 has neither the pool's columns \(text\)") as error:
        target_of(selection(tmp_path, ASKED, None))
    assert error.value.remedy == "It has: question, answer. Name its columns with target.columns."
    with pytest.raises(InvalidInput) as error:
        evaluation_sets_of(selection(tmp_path, ASKED, None, {"columns": {"text": "body"}}))
    assert "decontaminate[0].columns.text" in error.value.remedy
