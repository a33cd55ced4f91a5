"""`regraft kit`: built once from a version's data, shown, and refused where it cannot be built."""

import json
from pathlib import Path
from typing import Any

import pytest

from infra.errors import Interrupted
from infra.settings import get_settings
from registry import AdapterRegistry
from tests.cli.conftest import WriteRecipe, run_here
from tests.cli.test_lifecycle import clean
from tests.tiny_models import own_seed, save_tiny_llama

pytestmark = pytest.mark.services


ROWS = [{"prompt": f"is {number} even", "completion": "yes" if number % 2 == 0 else "no"} for number in range(60)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The private data: a file, which a test may change."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def trained(regraft_home: Path, write_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory, rows: Path) -> str:
    """A version on a base that no other test has."""
    get_settings.cache_clear()
    base = save_tiny_llama(tmp_path_factory.mktemp("kitted"), seed=own_seed(__name__))
    recipe = write_recipe("kitted", base=f"path:{base}", data={"file": str(rows)})
    result = run_here("train", str(recipe), "--json", "--no-evaluate")
    assert (result.code, result.err) == (0, "")
    address: str = json.loads(result.out)["address"]
    return address


@pytest.fixture(scope="module")
def built(trained: str) -> dict[str, Any]:
    """What `regraft kit build --json` printed."""
    record: dict[str, Any] = json.loads(clean(run_here("kit", "build", trained, "--inputs", "12", "--json")))
    return record


def test_a_kit_is_kept_with_its_version_and_shown(built: dict[str, Any], trained: str) -> None:
    assert (built["address"], built["relation"]) == (trained, "migration_kit")
    said = built["details"]
    assert (said["task"], said["seeds"], said["judged_on"]) == ("kitted", 5, 2)
    assert 0 <= said["discriminator"] <= 1
    shown = json.loads(clean(run_here("kit", "show", trained, "--json")))
    assert shown["attachment"]["artifact_sha256"] == built["artifact_sha256"]
    assert shown["kit"]["rows"] == said["rows"]
    told = clean(run_here("kit", "show", trained))
    assert all(seed["prompt"].split()[0] in told for seed in shown["kit"]["seeds"])
    assert "balanced accuracy" in " ".join(told.split())
    assert "migration kit" in clean(run_here("adapters", "show", trained))
    assert AdapterRegistry().fsck() == []
    assert not list((get_settings().runs / f"kit-{trained.replace('@', '-')}").glob("work"))


def test_a_second_kit_must_be_wished_for(built: dict[str, Any], trained: str) -> None:
    refused = run_here("kit", "build", trained)
    assert refused.code == 4 and "has a migration kit" in refused.err and "--again" in refused.err
    again = json.loads(clean(run_here("kit", "build", trained, "--again", "--no-discriminator", "--json")))
    assert again["details"]["discriminator"] is None
    told = clean(run_here("kit", "show", trained))
    assert "none" in told
    assert len(AdapterRegistry().attachments(trained)) == 2


def test_a_training_keeps_a_kit_and_the_next_one_on_the_same_data_has_it_too(
    trained: str, write_recipe: WriteRecipe, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = AdapterRegistry()
    recipe = write_recipe(
        "keeping", base=registry.get(trained).base.reference, data={"file": str(rows)}, migration_kit={"inputs": 12}
    )
    told = clean(run_here("train", str(recipe), "--no-evaluate"))
    assert "migration kit: 5 seeds, discriminator" in " ".join(told.split())
    monkeypatch.setattr("flows.migration_kit.build_kit", None)  # not to be called
    again = json.loads(
        clean(run_here("train", str(recipe), "--no-evaluate", "--json", "--set", "training.learning_rate=0.001"))
    )
    assert again["migration_kit"]["discriminator"] is not None
    kits = [registry.attachment(f"keeping@{number}", "migration_kit") for number in (1, 2)]
    assert kits[0] and kits[1] and kits[0].artifact_sha256 == kits[1].artifact_sha256
    without = json.loads(clean(run_here("train", str(recipe), "--no-evaluate", "--no-kit", "--json")))
    assert without["migration_kit"] is None
    assert registry.attachment(without["address"], "migration_kit") is None
    assert registry.fsck() == []


def test_a_kit_that_cannot_be_built_leaves_the_training_what_it_is(
    trained: str, write_recipe: WriteRecipe, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AdapterRegistry().get(trained).base.reference
    recipe = write_recipe("poorly", base=base, data={"file": str(rows)}, migration_kit={"inputs": 12})
    with monkeypatch.context() as patched:
        patched.setattr("training.migration.synthesis.sampled", lambda *_, **__: [])  # the base writes nothing
        result = run_here("train", str(recipe), "--no-evaluate", "--json")
    assert json.loads(result.out)["migration_kit"]["discriminator"] is None
    assert "poorly@1 keeps a kit without a discriminator" in " ".join(result.err.split())
    refused = run_here("train", str(recipe), "--set", "migration_kit.redact=nowhere:f")
    assert refused.code == 2 and "nowhere:f" in refused.err
    assert [version.address for version in AdapterRegistry().versions("poorly")] == ["poorly@1"]

    def stopped(*_: object, **__: object) -> None:
        raise Interrupted("Stopped.", "")

    monkeypatch.setattr("flows.migration_kit.build_kit", stopped)
    result = run_here("train", str(recipe), "--no-evaluate", "--set", "seed=3")
    assert result.code == 130
    assert "poorly@2 is trained and registered" in result.err and "regraft kit build poorly@2" in result.err
    monkeypatch.undo()
    built = json.loads(clean(run_here("kit", "build", "poorly@2", "--seeds", "3", "--json")))
    assert (built["details"]["seeds"], built["details"]["judged_on"]) == (3, 2), "the rest is as the recipe says"


def test_what_cannot_be_built_or_shown_says_why(trained: str, tmp_path: Path) -> None:
    clean(run_here("export", trained, str(tmp_path / "out")))
    (tmp_path / "out" / "regraft.json").unlink()
    base = AdapterRegistry().get(trained).base.name
    clean(run_here("import", str(tmp_path / "out"), "kit-import", "--base", base))
    for arguments, code, told in (
        (("build", "kit-import@1"), 2, "was imported"),
        (("show", "kit-import@1"), 3, "has no migration kit"),
        (("show", "nobody@1"), 3, "There is no adapter"),
        (("build", trained, "--again", "--redact", "nowhere:f"), 2, "cannot be found"),
        (("build", trained, "--again", "--inputs", "1"), 2, "greater than or equal to 2"),
        (("build", trained, "--again", "--inputs", "2"), 2, "too few"),
    ):
        result = run_here("kit", *arguments)
        assert (result.code, told in " ".join(result.err.replace("│", " ").split())) == (code, True), result.err


def test_data_that_have_changed_make_no_kit(trained: str, rows: Path) -> None:
    whole = rows.read_text()
    try:
        rows.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[:50]))
        refused = run_here("kit", "build", trained, "--again")
        assert refused.code == 2 and f"are not those that {trained} was trained on" in refused.err
        rows.unlink()
        assert run_here("kit", "build", trained, "--again").code == 3
    finally:
        rows.write_text(whole)
