import json
import logging
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from infra.errors import InvalidInput, NotFound
from training.data.example import Example, fingerprint
from training.data.sources import DataSource, load_held_out, load_splits, read_examples
from training.tasks.catalog import get_task

ROWS = [
    {"prompt": "How many?", "completion": "3"},
    {"prompt": 'Say "hi", twice', "completion": "hi hi"},
    {"prompt": "Zwei\nZeilen – über", "completion": "ja"},
]
EXAMPLES = [Example(row["prompt"], row["completion"]) for row in ROWS]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, **options) -> list[Example]:
    return read_examples(DataSource(file=path, **options))


def refused(path: Path, match: str, **options) -> InvalidInput:
    with pytest.raises(InvalidInput, match=match) as error:
        read(path, **options)
    assert error.value.remedy
    return error.value


# Formats


def test_jsonl_rows_become_examples(tmp_path):
    assert read(write_jsonl(tmp_path / "data.jsonl", ROWS)) == EXAMPLES


def test_a_byte_order_mark_and_blank_lines_do_not_matter(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(json.dumps(row).encode() for row in ROWS))
    assert read(path) == EXAMPLES


def test_csv_rows_become_examples_with_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(
        'prompt,completion,note\r\nHow many?,3,\r\n"Say ""hi"", twice",hi hi,x\r\n"Zwei\nZeilen – über",ja,y\r\n',
        encoding="utf-8",
        newline="",
    )
    assert read(path) == EXAMPLES


def test_tsv_has_tabs(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("prompt\tcompletion\na, b\t3\n")
    assert read(path) == [Example("a, b", "3")]


def test_parquet_rows_become_examples(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet") == EXAMPLES


def test_parquet_rows_are_numbered_across_batches(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "" if i == 1500 else "a"} for i in range(2000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    refused(tmp_path / "data.parquet", "data.parquet row 1501: completion is empty")


def test_other_columns_can_be_named(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"q": "2 + 2", "a": 4, "options": ["3", "4"]}])
    columns = {"prompt": "q", "completion": "a", "choices": "options"}
    assert read(path, columns=columns) == [Example("2 + 2", "4", ("3", "4"))]


def test_choices_in_csv_are_a_json_list(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion,choices\nWell?,Yes,"[""Yes"", ""No""]"\n')
    assert read(path, columns={"choices": "choices"}) == [Example("Well?", "Yes", ("Yes", "No"))]


def test_tests_of_a_program_come_from_their_column_and_are_part_of_the_fingerprint(tmp_path):
    row = {"prompt": "Double it.", "completion": "def f(x): return 2 * x", "check": "assert f(2) == 4"}
    (example,) = read(write_jsonl(tmp_path / "data.jsonl", [row]), columns={"tests": "check"})
    assert example == Example(row["prompt"], row["completion"], tests=row["check"])
    without = Example(row["prompt"], row["completion"])
    assert fingerprint([example]) != fingerprint([without])
    refused(write_jsonl(tmp_path / "other.jsonl", [row]), "no column 'test'", columns={"tests": "test"})


def test_completions_lose_the_space_around_them_and_prompts_keep_theirs(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "  indented", "completion": " 3\n"}])
    assert read(path) == [Example("  indented", "3")]


# Conversations


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_last_assistant_turn_is_the_completion(tmp_path, suffix):
    turns = [("user", "One and one?"), ("assistant", "2")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    path = tmp_path / f"chat.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path, columns={"messages": "messages"}) == [Example("One and one?", "2")]


def test_a_longer_conversation_is_written_out(tmp_path):
    turns = [
        ("system", "Be brief."),
        ("user", "One and one?"),
        ("assistant", "2"),
        ("user", "And one more?"),
        ("assistant", "3"),
        ("user", "Thanks"),
    ]
    rows = [{"turns": [{"role": role, "content": content} for role, content in turns]}]
    assert read(write_jsonl(tmp_path / "chat.jsonl", rows), columns={"messages": "turns"}) == [
        Example("Be brief.\n\nUser: One and one?\n\nAssistant: 2\n\nUser: And one more?", "3")
    ]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", "not a list of turns"),
        ([{"role": "user", "content": "x"}], "no assistant turn"),
        ([{"role": "assistant", "content": "x"}], "no user turn"),
        ([{"role": "tool", "content": "x"}], "turn 1 has the role 'tool'"),
        (["hello"], "turn 1 has the role None"),
        ([{"role": "user", "content": ["x"]}], "content of turn 1 is not text"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None}], "completion is empty"),
        ([{"role": "user", "content": " "}, {"role": "assistant", "content": "y"}], "prompt is empty"),
    ],
)
def test_unusable_conversations_name_the_line(tmp_path, messages, match):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    refused(path, f"chat.jsonl line 1: .*{match}", columns={"messages": "messages"})


# What is wrong with a file


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(NotFound, match=r"nowhere\.jsonl is not there"):
        read(tmp_path / "nowhere.jsonl")


def test_a_folder_and_an_unknown_format_are_refused(tmp_path):
    refused(tmp_path, "is a folder")
    (tmp_path / "data.json").write_text("[]")
    assert "jq -c" in refused(tmp_path / "data.json", r"\.json is not a known format").remedy


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(InvalidInput, match=f"{name} has no train examples: it is empty"):
        load_splits(DataSource(file=tmp_path / name), seed=0)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"prompt": "x" "completion": "y"}', "is not JSON: Expecting ',' delimiter at column 16"),
        ('{"prompt": "x", "completion": "y"', "is not JSON: Expecting ',' delimiter at column 34"),
        ('{"prompt": "x', "is not JSON: Unterminated string starting at column 12"),
        ('["x", "y"]', "is a JSON array"),
        ('"x"', "is a JSON string"),
        ("null", "is a JSON null"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path, line, match):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "x", "completion": "y"}\n' * 16 + line + "\n")
    refused(path, f"data.jsonl line 17 {match}")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "x", "completion": ""}, "completion is empty"),
        ({"prompt": "x", "completion": " \n"}, "completion is empty"),
        ({"prompt": "x", "completion": None}, "completion is empty"),
        ({"prompt": "\t", "completion": "y"}, "prompt is empty"),
        ({"prompt": "x", "completion": True}, "completion is bool, not text"),
        ({"prompt": "x", "completion": 1.5}, "completion is float, not text"),
        ({"prompt": ["x"], "completion": "y"}, "prompt is list, not text"),
        ({"prompt": "\ud800", "completion": "y"}, "half of a surrogate pair"),
    ],
)
def test_an_unusable_row_is_named(tmp_path, row, match):
    path = write_jsonl(tmp_path / "data.jsonl", [*ROWS, row])
    refused(path, f"data.jsonl line 4: .*{match}")


def test_whole_numbers_are_answers_but_no_plain_text(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": 5, "completion": 3, "choices": [3, 4], "text": 5}])
    error = refused(path, "data.jsonl line 1: text is int, not text", columns={"text": "text"})
    assert error.remedy == "Write it as a string."
    (example,) = read(path, columns={"choices": "choices"})
    assert (example.prompt, example.completion, example.choices) == ("5", "3", ("3", "4"))


def test_empty_rows_can_be_skipped_and_are_reported(tmp_path, caplog):
    path = write_jsonl(
        tmp_path / "data.jsonl", [{"prompt": "x", "completion": ""}, *ROWS, {"prompt": "", "completion": "y"}]
    )
    with caplog.at_level(logging.WARNING):
        assert read(path, on_empty="skip") == EXAMPLES
    assert "Skipped 2 empty rows, the first at data.jsonl line 1" in caplog.text


def test_a_missing_column_brings_the_nearest_and_all(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"promt": "x", "completion": "y"}])
    error = refused(path, r"line 1 has no column 'prompt'. Did you mean 'promt'\?")
    assert "promt, completion" in error.remedy and "data.columns.prompt" in error.remedy


def test_a_later_row_without_the_column_is_named(tmp_path):
    refused(write_jsonl(tmp_path / "data.jsonl", [*ROWS, {"prompt": "x"}]), "line 4 has no column 'completion'")


def test_a_completion_outside_its_choices_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "x", "completion": "Maybe", "choices": ["Yes", "No"]}])
    refused(path, "'Maybe' is not among the choices", columns={"choices": "choices"})
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "x", "completion": "Yes", "choices": "Yes|No"}])
    refused(path, "choices is not a list", columns={"choices": "choices"})


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_text_in_another_encoding_is_named_with_its_line(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    first = '{"prompt": "x", "completion": "y"}\n' if suffix == "jsonl" else "prompt,completion\n"
    path.write_bytes(first.encode() + "über".encode("latin-1"))
    assert "iconv" in refused(path, f"data.{suffix} line 2 is not UTF-8").remedy


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("prompt,completion\nx,y\nx,y,z\n", "data.csv line 3 has 3 fields, but the header has 2"),
        ("prompt,completion\nx\n", "data.csv line 2 has 1 fields"),
        ('prompt,completion\n"a\nb",y\nx,\n', "data.csv line 4: completion is empty"),
        ('prompt,completion\nx,y\n"open,y\n', "data.csv line 3 is not valid CSV"),
        ("prompt,prompt\nx,y\n", "two columns have the same name"),
        ("question,completion\nx,y\n", "data.csv line 2 has no column 'prompt'"),
    ],
)
def test_broken_csv_is_named_with_the_line_where_the_row_begins(tmp_path, text, match):
    (tmp_path / "data.csv").write_text(text)
    refused(tmp_path / "data.csv", match)


def test_a_file_that_only_claims_to_be_parquet_is_refused(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1 not really PAR1")
    refused(tmp_path / "data.parquet", "data.parquet cannot be read as Parquet")


# The source itself


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "exactly one of task, file, dataset and selected"),
        ({"task": "navigate", "file": "x.jsonl"}, "task and file given"),
        ({"task": "navigat"}, "Did you mean 'navigate'"),
        ({"task": "navigate", "test": "x.jsonl"}, "a task has its own splits"),
        ({"task": "navigate", "columns": {"prompt": "q"}}, "columns do not go with task"),
        ({"file": "x.jsonl", "revision": "main"}, "revision goes with dataset"),
        ({"file": "x.jsonl", "test": "y.jsonl", "fractions": {"test": 0.1}}, "give test or fractions.test"),
        ({"file": "x.jsonl", "fractions": {"test": 0.5, "validation": 0.5}}, "nothing to train on"),
        ({"file": "x.jsonl", "colums": {}}, "Extra inputs are not permitted"),
        ({"file": "x.jsonl", "columns": {"messages": "m", "prompt": "q"}}, "give messages, or text, or prompt"),
        ({"file": "x.jsonl", "sizes": {"train": 0}}, "greater than or equal to 1"),
    ],
)
def test_contradictory_sources_are_refused(content, match):
    with pytest.raises(ValidationError, match=match):
        DataSource.model_validate(content)


@pytest.mark.parametrize(
    "content",
    [
        {"task": "navigate", "sizes": {"train": 10}},
        {"file": "x.jsonl", "test": "y.jsonl", "columns": {"prompt": "q"}},
        {"file": "x.csv", "fractions": {"test": 0.2}},
        {"dataset": "some/thing", "split": "train[:10]", "validation": "dev"},
    ],
)
def test_a_stored_source_is_the_same_source(content):
    source = DataSource.model_validate(content)
    assert DataSource.model_validate(source.model_dump(mode="json", exclude_none=True)) == source


def test_relative_paths_count_from_the_folder_given(tmp_path):
    source = DataSource(file="data/a.jsonl", test="b.jsonl", validation=str(tmp_path / "c.jsonl"))
    anchored = source.anchored(tmp_path / "recipes")
    assert anchored.file == tmp_path / "recipes/data/a.jsonl"
    assert anchored.test == str(tmp_path / "recipes/b.jsonl")
    assert anchored.validation == str(tmp_path / "c.jsonl")
    (tmp_path / "pets").mkdir()
    assert DataSource(dataset="pets").anchored(tmp_path).dataset == str(tmp_path / "pets")
    assert DataSource(dataset="org/pets").anchored(tmp_path).dataset == "org/pets"
    assert DataSource(task="navigate").anchored(tmp_path) == DataSource(task="navigate")


def test_the_instruction_is_the_tasks_own_unless_said_otherwise():
    assert DataSource(task="navigate").instruction_text == get_task("navigate").instruction
    assert DataSource(task="navigate", instruction="").instruction_text == ""
    assert DataSource(file="x.jsonl").instruction_text == ""
    assert DataSource(file="x.jsonl", instruction="Be brief.").instruction_text == "Be brief."


# Hugging Face data sets


def save_dataset(folder: Path, **splits: list) -> Path:
    from datasets import Dataset, DatasetDict

    parts = {split: Dataset.from_list(rows) for split, rows in splits.items()}
    (DatasetDict(parts) if set(splits) != {"only"} else parts["only"]).save_to_disk(folder)
    return folder


def rows(first: int, count: int) -> list[dict]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(first, first + count)]


def test_a_saved_data_set_keeps_its_splits(tmp_path):
    folder = save_dataset(tmp_path / "saved", train=rows(0, 20), validation=rows(20, 5), test=rows(25, 6))
    splits = load_splits(DataSource(dataset=str(folder)), seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 5, 6)
    assert splits.test[0] == Example("question 25", "answer 25")
    held_out = load_splits(DataSource(dataset=str(folder), test="validation", fractions={"validation": 0.3}), seed=0)
    assert held_out.test == splits.validation
    assert set(held_out.train) | set(held_out.validation) == set(splits.train)


def test_a_saved_data_set_without_splits_is_divided(tmp_path):
    folder = save_dataset(tmp_path / "saved", only=rows(0, 100))
    splits = load_splits(DataSource(dataset=str(folder)), seed=0)
    assert sorted(splits.train + splits.validation + splits.test, key=repr) == sorted(
        (Example(**row) for row in rows(0, 100)), key=repr
    )
    with pytest.raises(NotFound, match=r"no split 'trian'. Did you mean 'train'\?"):
        load_splits(DataSource(dataset=str(folder), split="trian"), seed=0)


def test_rows_of_a_saved_data_set_are_named(tmp_path):
    folder = save_dataset(tmp_path / "saved", only=[*rows(0, 2), {"prompt": "x", "completion": ""}])
    with pytest.raises(InvalidInput, match=r"saved \[train\] row 3: completion is empty"):
        read_examples(DataSource(dataset=str(folder)))


def test_another_folder_and_an_unreachable_hub_are_explained(tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match="not a data set saved with save_to_disk"):
        read_examples(DataSource(dataset=str(tmp_path)))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotFound, match="some/thing cannot be loaded"):
        read_examples(DataSource(dataset="some/thing"))


def test_a_missing_datasets_library_is_explained(tmp_path):
    program = (
        "import sys\nsys.modules['datasets'] = None\n"
        "from training.data.sources import DataSource, read_examples\n"
        "from infra.errors import InvalidInput\n"
        "try:\n    read_examples(DataSource(dataset='x'))\n"
        "except InvalidInput as error:\n    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "needs the `datasets` library" in told and "pip install 'regraft[datasets]'" in told


def test_a_task_is_generated_not_read():
    with pytest.raises(InvalidInput, match="generates its examples"):
        read_examples(DataSource(task="navigate"))


def test_held_out_parts_are_read_without_a_look_at_the_training_rows(tmp_path):
    for name, first in (("test", 0), ("validation", 100)):
        rows = [{"prompt": f"p{number}", "completion": "c"} for number in range(first, first + 20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "train.jsonl").write_text('{"prompt": "other", "completion": "c"}\n')
    parts = {name: str(tmp_path / f"{name}.jsonl") for name in ("test", "validation")}
    source = DataSource.model_validate({"file": tmp_path / "train.jsonl", **parts, "sizes": {"test": 7}})
    splits = load_splits(source, seed=3)
    (tmp_path / "train.jsonl").unlink()
    assert load_held_out(source, "test", seed=3) == splits.test
    assert load_held_out(source, "validation", seed=3) == splits.validation
    task = DataSource.model_validate({"task": "navigate", "sizes": {"test": 9}})
    assert load_held_out(task, "test", seed=1) == load_splits(task, 1).test
    assert len(load_held_out(task, "validation", seed=1)) == 200


def test_what_is_held_out_of_the_training_rows_is_not_read(tmp_path):
    with pytest.raises(InvalidInput, match="held out of its training examples, which are not to be read"):
        load_held_out(DataSource(file=tmp_path / "not-even-there.jsonl"), "test", seed=0)
