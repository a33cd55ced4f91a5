"""Suites in files: found by name or path, titled after their file, part of the recipes that name them."""

from pathlib import Path

import pytest

from infra.errors import InvalidInput, NotFound
from infra.settings import get_settings
from training.evaluation.suite import Suite
from training.evaluation.suite_files import SuiteFile, suites_called
from training.recipe import load_recipe
from training.tasks.catalog import get_task

SUMMARIES = """
defaults: {data: {file: calls.jsonl}, samples: 50}
suites:
  - {metric: rougeL, also: [bleu], buckets: [512, 1024]}
  - {name: fluency, metric: perplexity}
  - {task: navigate, data: null, shots: 2}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with suites/summaries.yaml."""
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "summaries.yaml").write_text(SUMMARIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_titles_begin_with_the_files_name_and_paths_with_its_folder(project: Path) -> None:
    suites = suites_called("summaries")
    assert [suite.title("ignored") for suite in suites] == [
        "summaries/test", "summaries/fluency", "summaries/navigate/test-2shot",
    ]  # fmt: skip
    assert [suite.samples for suite in suites] == [50, 50, 50]
    assert [suite.data and suite.data.file for suite in suites] == [*[project / "suites" / "calls.jsonl"] * 2, None]
    assert list(suites[0].bucket_titles("summaries/test").values()) == [
        "summaries/test[0-512]", "summaries/test[512-1024]",
    ]  # fmt: skip
    assert suites_called("suites/summaries.yaml") == suites == suites_called(str(project / "suites" / "summaries.yaml"))


def test_the_working_directory_comes_before_the_home(project: Path) -> None:
    at_home = get_settings().home / "suites"
    at_home.mkdir(parents=True)
    try:
        (at_home / "summaries.yaml").write_text("suites: [{task: web_of_lies}]")
        (at_home / "private.yaml").write_text("suites: [{task: web_of_lies}]")
        assert len(suites_called("summaries")) == 3
        assert suites_called("private")[0].title() == "private/web_of_lies/test"
    finally:
        for path in at_home.iterdir():
            path.unlink()
        at_home.rmdir()


def test_an_unknown_name_leads_to_the_one_that_was_meant(project: Path) -> None:
    with pytest.raises(NotFound, match=r"no suite file 'sumaries'\. Did you mean 'summaries'\?"):
        suites_called("sumaries")
    with pytest.raises(NotFound, match=r"nowhere\.yaml is not there"):
        suites_called("nowhere.yaml")
    with pytest.raises(NotFound, match=r"has no suite 'summaries/fluenzy'\. Did you mean 'summaries/fluency'\?"):
        suites_called("summaries/fluenzy")
    with pytest.raises(NotFound, match="no suite file") as refused:
        suites_called("../../../../etc/passwd")
    assert "passwd.yaml" not in refused.value.remedy


def test_a_title_names_one_suite_of_a_file(project: Path) -> None:
    assert suites_called("summaries/fluency") == suites_called("summaries")[1:2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("suites: [{metrc: rougeL}]", "Did you mean 'metric'?"),
        ("suites: []", "suites is empty"),
        ("defaults: {metrc: rougeL}\nsuites: [{task: navigate}]", "Did you mean 'metric'?"),
        ("suites: [{task: navigate}, {task: navigate, metric: perplexity}]", "two suites are called odd/navigate/test"),
        ("suites: [{metric: rouge}]", "rouge"),
        ("suites: [{buckets: [1024, 512]}]", "rising order"),
        ("suites: [{buckets: [0]}]", "greater than or equal to 1"),
        ("suites: [{metric: bleu, also: [bleu]}]", "named twice"),
        ("suites: [{metric: perplexity, also: [bleu]}]", "not with perplexity"),
        ("suites: [{task: navigate, data: {file: x.jsonl}}]", "task or data, not both"),
        ("suites: [{data: {task: navigate}}]", "name a built-in task with task"),
        ("suites: [{data: {file: x.jsonl, dataset: y}}]", "exactly one of task, file, dataset"),
    ],
)
def test_a_suite_file_with_a_mistake_is_refused_and_explained(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput) as refused:
        SuiteFile.load(path)
    assert said in str(refused.value) and "odd.yaml" in str(refused.value)


def test_a_recipe_names_suite_files_beside_suites_of_its_own(project: Path) -> None:
    text = "adapter: a\nbase: b\ndata: {task: navigate}\nevaluation: "
    (project / "named.yaml").write_text(f"{text}[summaries, {{samples: 7}}, {{name: own, data: {{file: x.csv}}}}]")
    *of_file, own, brought = load_recipe(project / "named.yaml").evaluation
    assert tuple(of_file) == suites_called("summaries")
    assert own == Suite(samples=7)
    assert brought.data is not None and brought.data.file == project / "x.csv"
    stored = load_recipe(project / "named.yaml")
    assert type(stored).model_validate(stored.as_stored()) == stored
    (project / "by-path.yaml").write_text(f"{text}[suites/summaries.yaml]")
    assert load_recipe(project / "by-path.yaml").evaluation == tuple(of_file)
    (project / "wrong.yaml").write_text(f"{text}[sumaries]")
    with pytest.raises(NotFound, match="Did you mean 'summaries'"):
        load_recipe(project / "wrong.yaml")


def test_what_a_suite_does_not_say_is_not_stored_so_that_old_recipes_keep_their_digest() -> None:
    assert set(Suite(task="navigate").model_dump(exclude_none=True)) == {"task", "split", "samples", "shots", "seed"}


def test_a_file_of_ones_own_comes_before_the_one_that_is_shipped(project: Path) -> None:
    assert len(suites_called("general")) == 6, "there is none in this working directory"
    (project / "suites" / "general.yaml").write_text("suites: [{task: navigate}]")
    assert [suite.title() for suite in suites_called("general")] == ["general/navigate/test"]


def test_the_general_suite_that_is_shipped_is_multiple_choice_on_several_tasks(project: Path) -> None:
    suites = suites_called("general")
    assert len(suites) >= 5
    for suite in suites:
        assert suite.metric == "multiple_choice" == get_task(str(suite.task)).metric
        assert suite.title() == f"general/{suite.task}/test"
