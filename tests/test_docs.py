"""README and docs/, held against the code: every recipe, policy, command, link and table that they show."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import infra.errors
from cli.main import app
from infra.documents import parse
from infra.errors import RegraftError
from infra.settings import Settings
from registry.policy import Policy
from training.data.sources import load_splits
from training.evaluation.suite_files import SuiteFile
from training.methods.catalog import CATALOG as METHODS
from training.methods.catalog import get_method
from training.recipe import load_recipe, recipe_from
from training.selection.options import PoolSelection
from training.tasks.catalog import CATALOG as TASKS
from training.tasks.catalog import get_task

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_TABLE = re.compile(r"^<!-- (?P<mark>[^\n]+?) -->\n(?P<rows>(?:^\|.*\n)+)", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)
_SHELL = {"|", ">", "<", "&&", ";"}


@dataclass(frozen=True)
class Snippet:
    """A fenced block or a table of a page, with the mark in the HTML comment before it."""

    page: Path
    line: int
    mark: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def fences() -> Iterator[Snippet]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in _FENCE.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            yield Snippet(page, line, found["mark"] or "", found["language"], found["text"])


def tables() -> Iterator[Snippet]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in _TABLE.finditer(text):
            yield Snippet(page, text.count("\n", 0, found.start()) + 1, found["mark"], "", found["rows"])


def marked(mark: str) -> list[Snippet]:
    return [snippet for snippet in (*fences(), *tables()) if snippet.mark.partition(":")[0] == mark]


def cells(table: Snippet) -> list[list[str]]:
    """The rows under the heading, cell by cell."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.text.splitlines()]
    assert set("".join(rows[1])) <= set("-: "), f"{table} has no heading"
    return rows[2:]


def plain(cell: str) -> str:
    return cell.strip("`")


def shown(snippets: list[Snippet]) -> Any:
    """Parametrise over snippets; there must be some."""
    assert snippets
    return pytest.mark.parametrize("snippet", snippets, ids=str)


def commands() -> list[tuple[str, str]]:
    """(where, command) of every `regraft …` line in a console fence, continued lines joined."""
    found = []
    for snippet in fences():
        if snippet.language == "console":
            lines = snippet.text.replace("\\\n", " ").splitlines()
            found += [(str(snippet), line) for line in lines if line.startswith("regraft ")]
    return found


@shown(marked("recipe"))
def test_a_recipe_that_is_shown_parses(snippet: Snippet) -> None:
    recipe_from(yaml.safe_load(snippet.text), str(snippet))


@shown(marked("policy"))
def test_a_policy_that_is_shown_parses(snippet: Snippet) -> None:
    parse(Policy, yaml.safe_load(snippet.text), str(snippet))


@shown(marked("suites"))
def test_a_suite_file_that_is_shown_parses(snippet: Snippet) -> None:
    parse(SuiteFile, yaml.safe_load(snippet.text), str(snippet))


@shown(marked("selection"))
def test_a_selection_that_is_shown_parses(snippet: Snippet) -> None:
    parse(PoolSelection, yaml.safe_load(snippet.text), str(snippet))


def test_every_mark_is_one_that_is_tested() -> None:
    known = {"recipe", "policy", "suites", "selection", "fields", "methods", "tasks", "errors", "results"}
    assert {snippet.mark.partition(":")[0] for snippet in (*fences(), *tables()) if snippet.mark} <= known
    yaml_fences = [snippet for snippet in fences() if snippet.language == "yaml"]
    assert [str(snippet) for snippet in yaml_fences if not snippet.mark] == []


@pytest.mark.parametrize(("where", "line"), commands(), ids=lambda value: value if value.startswith("regraft") else "")
def test_a_command_that_is_shown_is_one_that_regraft_understands(where: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    words = words[: next((place for place, word in enumerate(words) if word in _SHELL), len(words))]
    command, (name, *arguments) = typer.main.get_command(app), words
    while commands_below := getattr(command, "commands", None):
        while arguments and arguments[0].startswith("-"):
            assert arguments.pop(0) in {option for parameter in command.params for option in parameter.opts}, where
        assert arguments and arguments[0] in commands_below, where
        name, *arguments = arguments
        command = commands_below[name]
    command.make_context(name, arguments)  # reads every argument and option as `regraft` would; nothing is invoked


@shown([snippet for snippet in fences() if snippet.language == "python"])
def test_python_that_is_shown_imports_what_there_is(snippet: Snippet) -> None:
    for node in ast.walk(ast.parse(snippet.text)):
        if isinstance(node, ast.ImportFrom):
            for imported in node.names:
                assert hasattr(import_module(str(node.module)), imported.name), imported.name


@shown([snippet for snippet in fences() if snippet.language == "toml"])
def test_a_settings_file_that_is_shown_is_one(snippet: Snippet) -> None:
    Settings(**tomllib.loads(snippet.text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_into_the_repository_leads_somewhere(page: Path) -> None:
    astray = []
    for found in _LINK.finditer(page.read_text(encoding="utf-8")):
        place, _, anchor = found["target"].partition("#")
        if "://" in place:
            continue
        target = (page.parent / place).resolve() if place else page
        inside = target.exists() and target.is_relative_to(ROOT)
        if not inside or (anchor and anchor not in anchors(target)):
            astray.append(found["target"])
    assert astray == []


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    titles = (found["title"] for found in _HEADING.finditer(page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_leads_to_every_page() -> None:
    targets = {found["target"] for found in _LINK.finditer(PAGES[0].read_text(encoding="utf-8"))}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= targets


@shown(marked("fields"))
def test_a_table_of_keys_lists_exactly_the_fields_and_their_defaults(snippet: Snippet) -> None:
    module, _, name = snippet.mark.partition(":")[2].strip().partition(":")
    model: type[BaseModel] = getattr(import_module(module), name)
    rows = {plain(row[0]): row[1] for row in cells(snippet)}
    assert set(rows) == set(model.model_fields)
    for key, field in model.model_fields.items():
        assert_default(f"{snippet} {key}", rows[key], field)


def assert_default(where: str, told: str, field: FieldInfo) -> None:
    """A plain default is shown as it is; what is made or chosen at run time is told in words."""
    if field.is_required():
        assert told == "required", where
        return
    default = field.get_default(call_default_factory=False)
    if isinstance(default, tuple):
        default = list(default)
    is_plain = isinstance(default, str | int | float) or (isinstance(default, list) and default)
    if is_plain and all(isinstance(part, str) for part in (default if isinstance(default, list) else [])):
        assert told.startswith("`"), where
        assert yaml.safe_load(plain(told)) == default, where
    else:
        assert not (told.startswith("`") and told.count("`") == 2 and told.endswith("`")), where


def test_the_settings_are_all_told_in_their_table() -> None:
    assert "infra.settings:Settings" in [s.mark.partition(":")[2].strip() for s in marked("fields")]


def test_every_method_with_options_has_its_table() -> None:
    told = {snippet.mark.partition(":")[2].strip() for snippet in marked("fields")}
    types = [get_method(name).config_type for name in METHODS]
    assert {f"{t.__module__}:{t.__name__}" for t in types if t.model_fields} <= told


def test_the_table_of_methods_is_the_catalogue() -> None:
    (snippet,) = marked("methods")
    rows = {plain(row[0]): row for row in cells(snippet)}
    assert set(rows) == set(METHODS)
    for name, row in rows.items():
        card = get_method(name).card
        assert row[3] == {"exact": "exactly", "approximate": "approximately", "no": "no"}[card.merge], name
        numbers = re.findall(r"\d{4}\.\d{5}", card.paper)
        assert re.findall(r"\[(\d{4}\.\d{5})\]", row[4]) == numbers, name


def test_the_table_of_tasks_is_the_catalogue() -> None:
    (snippet,) = marked("tasks")
    rows = {plain(row[0]): row[1] for row in cells(snippet)}
    assert rows == {name: get_task(name).metric.replace("_", " ") for name in TASKS}


def test_the_table_of_errors_has_every_error_with_its_exit_code() -> None:
    (snippet,) = marked("errors")
    kinds = [kind for kind in vars(infra.errors).values() if isinstance(kind, type) and issubclass(kind, RegraftError)]
    own_code = {kind.__name__: kind.exit_code for kind in kinds if "exit_code" in vars(kind)}
    assert {plain(row[1]): int(row[0]) for row in cells(snippet)} == own_code


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_an_example_recipe_parses_and_its_data_are_there(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.adapter == path.stem
    splits = load_splits(recipe.data, recipe.seed)
    assert splits.train
    assert len(splits.test) >= min((suite.samples for suite in recipe.evaluation if suite.task is None), default=1)


@pytest.mark.parametrize("path", sorted((ROOT / "policies").glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_policy_parses_and_asks_for_suites_that_its_recipe_has(path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / path.name)
    own = {suite.title(recipe.data.task or recipe.adapter): suite for suite in recipe.evaluation}
    for line in Policy.load(path).suites:
        assert line.minimum_samples <= own[line.suite].samples


def test_the_page_of_benchmarks_shows_every_result() -> None:
    from benchmarks.table import PAGE, insert, table

    page = PAGE.read_text(encoding="utf-8")
    assert insert(page, table()) == page, "python -m benchmarks.table"
