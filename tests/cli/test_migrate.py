"""`regraft migrate`: a version moves to another architecture, with a record of how, and refusals before any work."""

import json
import os
import signal
import subprocess
import sys
import time
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from flows.evaluate_adapter import record_result
from flows.migration_plan import Plan, plan_migration
from infra.errors import Interrupted, InvalidInput
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.attachments import MIGRATION_KIT
from tests.cli.conftest import WriteRecipe, ended, run_here, started
from tests.cli.test_kit import ROWS
from tests.cli.test_lifecycle import clean
from tests.tiny_models import own_seed, save_tiny_gemma, save_tiny_llama, save_tiny_masked
from training.data.example import Example
from training.migration.labelling import Labelled, label
from training.migration.options import MigrationOptions, options_from
from training.migration.synthesis import Pool
from training.trainer import train_recipe

pytestmark = pytest.mark.services

SHORT = ("--inputs", "10", "--set", "synthesis.items=2", "--set", "training.steps=100", "--json")

LEARNT = {"steps": 150, "batch_size": 8, "learning_rate": 0.01}  # to say yes or no, whatever is asked


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[:40]))
    (folder / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[40:]))
    return folder


@pytest.fixture(scope="module")
def source(regraft_home: Path, write_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory, data: Path) -> str:
    """A version with a kit, on a Llama."""
    get_settings.cache_clear()
    bases = tmp_path_factory.mktemp("bases")
    for name, reference in (
        ("old", save_tiny_llama(bases / "old", seed=own_seed(__name__))),
        ("new", save_tiny_gemma(bases / "new", seed=own_seed(__name__))),
    ):
        clean(run_here("base", "add", f"path:{reference}", "--name", f"migrate-{name}"))
    held_out = {"file": str(data / "train.jsonl"), "test": str(data / "test.jsonl"), "fractions": {"validation": 0.1}}
    recipe = write_recipe("evens", base="migrate-old", data=held_out, training=LEARNT)
    address: str = json.loads(clean(run_here("train", str(recipe), "--json", "--no-evaluate")))["address"]
    clean(run_here("kit", "build", address, "--inputs", "12"))
    return address


# A process that cannot open a file, there or not, whoever it runs as.
WITHOUT = """
import sys
private = sys.argv.pop(1)
def deny(event, arguments):
    if event == "open" and str(arguments[0]).startswith(private):
        raise PermissionError(f"{arguments[0]} is private")
sys.addaudithook(deny)
from cli.main import main
main()
"""


@pytest.fixture(scope="module")
def migrated(source: str, data: Path) -> dict[str, Any]:
    """What `regraft migrate --json` printed, in a process that cannot open the training rows, which are not there."""
    hidden = data / "train.jsonl"
    rows = hidden.read_text()
    hidden.unlink()
    command = ["migrate", source, "--to", "migrate-new", "--no-filter", *SHORT]
    try:
        result = subprocess.run(
            [sys.executable, "-c", WITHOUT, str(hidden), *command],
            env={**os.environ, "REGRAFT_HOME": str(get_settings().home)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
    finally:
        hidden.write_text(rows)
    assert result.returncode in (0, 7), result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_new_version_stands_on_the_new_base_and_says_where_it_came_from(
    migrated: dict[str, Any], source: str
) -> None:
    registry = AdapterRegistry()
    version = registry.get(migrated["address"])
    assert (version.adapter, version.base.name, version.method) == ("evens", "migrate-new", "lora")
    (edge,) = [edge for edge in registry.lineage(version.address).edges if edge.child == version.address]
    assert (edge.parent, edge.relation) == (source, "migrated_from")
    assert edge.details["inputs"] == migrated["inputs"] <= 10
    assert edge.details["synthetic_fingerprint"] == version.dataset.fingerprint
    assert version.dataset.name == f"synthetic for {source}"
    assert version.dataset.rows == migrated["inputs"] + 5, "with the seeds"
    assert version.recipe["migrated_from"] == source
    (suite,) = migrated["compared"]
    assert suite["samples"] == 20
    assert migrated["passed"] is suite["passed"]
    assert {e.suite for e in registry.evaluations(version.address)} == {suite["suite"]}
    assert {e.suite for e in registry.evaluations(source)} == {suite["suite"]}
    assert registry.fsck() == []
    assert not list(get_settings().runs.glob("migrate-evens-*/work"))


def test_three_inputs_a_row_are_learnt_and_passed_over_often_enough(source: str) -> None:
    def planned(changes: dict[str, Any], **options: Any) -> Plan:
        recipe = AdapterRegistry().get(source).recipe
        chosen = options_from(recipe, None, None, True, {**options, **changes})
        return plan_migration(source, "migrate-new", chosen, (), (), True, None, None)

    plan = planned({})
    assert plan.kit is not None
    rows, batch, steps = plan.kit.rows, plan.recipe.training.batch_size, plan.recipe.training.steps
    assert rows < 250 and steps is not None
    assert (plan.inputs, plan.written, plan.least) == (3 * rows, 3 * rows, rows)
    assert plan.student.training.steps == max(steps, ceil(2.5 * 3 * rows / batch))
    assert planned({"passes": 100}).student.training.steps == ceil(100 * 3 * rows / batch)
    assert planned({"training.steps": 7}).student.training.steps == 7, "what is said holds"
    assert planned({"training.learning_rate": 1e-4, "passes": 100}).student.training.steps == ceil(
        100 * 3 * rows / batch
    )
    assert planned({"training.epochs": 2}).student.training.epochs == 2
    with pytest.raises(InvalidInput, match=r"training\.steps and passes both say"):
        planned({"training.steps": 7, "passes": 3})
    with pytest.raises(InvalidInput, match="surplus"):
        planned({"surplus": float("inf")})
    paper = planned({"preset": "paper"})
    assert (paper.inputs, paper.written, paper.least, paper.student.training.steps) == (rows, rows, rows, steps)


def test_of_more_than_is_learnt_what_looks_real_is_chosen(source: str) -> None:
    def planned(**options: Any) -> Plan:
        return plan_migration(source, "migrate-new", MigrationOptions(inputs=10, **options), (), (), True, None, None)

    plan = planned(surplus=3)
    assert plan.written == 30
    assert plan.kit is not None
    written = tuple("x" * length + letter for length in range(plan.kit.longest) for letter in "abcdefghij")
    chosen = plan.chosen(Pool(written, (), ()))
    assert len(set(chosen)) == 10 and set(chosen) < set(written)
    assert tuple(chosen) != written[:10], "they have the real inputs' lengths"
    assert planned().written == planned().least == 10
    answered = Labelled((Example("is 7 even", "no"),), 0, 0)
    assert plan.learnt(answered) == (*answered.examples, *plan.seeds)
    paper = planned(preset="paper")
    assert paper.learnt(answered) == answered.examples
    assert paper.written == 10
    assert paper.chosen(Pool(written[:10], (), ())) == written[:10]


def test_an_alias_moves_with_it_though_the_training_data_are_gone(migrated: dict[str, Any], data: Path) -> None:
    hidden = data / "train.jsonl"
    rows = hidden.read_text()
    hidden.unlink()
    options = ("--as", "evens-promoted", "--set", "allowed_loss=1", "--promote", "production")
    try:
        moved = json.loads(clean(run_here("migrate", migrated["source"], "--to", "migrate-new", *SHORT, *options)))
    finally:
        hidden.write_text(rows)
    assert moved["promotion"]["moved"]
    holder = AdapterRegistry().alias("evens-promoted", "production")
    assert holder and holder.address == moved["address"]


def test_the_kit_travels_with_it_and_the_chain_goes_on(migrated: dict[str, Any], source: str) -> None:
    registry = AdapterRegistry()
    kits = [registry.attachment(address, "migration_kit") for address in (source, migrated["address"])]
    assert kits[0] and kits[1] and kits[0].artifact_sha256 == kits[1].artifact_sha256
    assert migrated["chain"] == []
    result = run_here("migrate", migrated["address"], "--to", "migrate-old", "--method", "dora", *SHORT)
    assert result.code in (0, 7), result.err
    back = json.loads(result.out)
    links = [(link["address"], link["base"]) for link in back["chain"]]
    assert links == [
        (source, "migrate-old"),
        (migrated["address"], "migrate-new"),
        (back["address"], "migrate-old"),
    ]
    (suite,) = migrated["compared"]
    (again,) = back["compared"]
    measured = [link["measured"][suite["suite"]][0] for link in back["chain"]]
    assert measured == [suite["teacher"][0], suite["student"][0], again["student"][0]]
    assert registry.get(back["address"]).method == "dora"
    refused = run_here("kit", "build", migrated["address"], "--again")
    assert refused.code == 2 and f"regraft kit build {source}" in refused.err
    told = clean(run_here("lineage", back["address"]))
    assert source in told and migrated["address"] in told


def test_logits_are_learnt_where_both_bases_share_a_vocabulary(migrated: dict[str, Any], source: str) -> None:
    distilled = ("--set", "distillation.of=logits", "--set", "distillation.top_k=8", "--set", "training.steps=20")
    moved = json.loads(clean(run_here("migrate", source, "--to", "migrate-new", "--no-evaluate", *SHORT, *distilled)))
    registry = AdapterRegistry()
    (edge,) = [edge for edge in registry.lineage(moved["address"]).edges if edge.child == moved["address"]]
    assert edge.details["options"]["distillation"] == {"of": "logits", "temperature": 2.0, "weight": 0.5, "top_k": 8}
    losses = [registry.get(address).metrics["final_loss"] for address in (moved["address"], migrated["address"])]
    assert losses[0] != losses[1]
    packed = run_here("migrate", source, "--to", "migrate-new", *distilled, "--set", "training.packing=true")
    assert packed.code == 2 and "not packed" in packed.err


def test_no_training_row_but_the_seeds_is_anywhere(migrated: dict[str, Any], source: str) -> None:
    registry, home = AdapterRegistry(), get_settings().home
    kit = registry.attachment(source, "migration_kit")
    assert kit is not None
    seeds = {
        seed["prompt"] for seed in json.loads((registry.materialise_attachment(kit) / "kit.json").read_text())["seeds"]
    }
    private = [row["prompt"] for row in ROWS[:40] if row["prompt"] not in seeds]
    assert len(private) == 35
    assert files_with(private, home) == []
    assert files_with([min(seeds)], home), "one would have been found"


# Artifacts, checkpoints, logs, the databases of registry, MLflow and Prefect; in a process of its own, since whoever
# closes a file gives up all locks that SQLite has on it in the same process.
SEARCH = """
import json, pathlib, sys
texts = [text.encode() for text in json.load(sys.stdin)]
for path in pathlib.Path(sys.argv[1]).rglob("*"):
    if path.is_file():
        content = path.read_bytes()
        if any(text in content for text in texts):
            print(path)
"""


def files_with(texts: list[str], folder: Path) -> list[str]:
    """Paths of the files under `folder` that hold any of the texts."""
    command = [sys.executable, "-c", SEARCH, str(folder)]
    told = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
    return told.stdout.splitlines()


def test_a_migrated_version_is_not_trained_again_as_if_on_data(migrated: dict[str, Any], source: str) -> None:
    refused = run_here("train", migrated["address"])
    assert refused.code == 2
    assert f"regraft migrate {source} --to migrate-new" in refused.err


def test_seeds_from_a_file_serve_where_there_is_no_kit(source: str, data: Path, write_recipe: WriteRecipe) -> None:
    recipe = write_recipe("kitless", base="migrate-old", data={"file": str(data / "train.jsonl")}, training=LEARNT)
    address = json.loads(clean(run_here("train", str(recipe), "--json", "--no-evaluate")))["address"]
    refused = run_here("migrate", address, "--to", "migrate-new")
    assert refused.code == 2 and "has no migration kit" in refused.err and "--seeds" in refused.err
    unmeasured = run_here("migrate", address, "--to", "migrate-new", "--seeds", str(data / "test.jsonl"))
    assert unmeasured.code == 2 and "held out of its training examples" in unmeasured.err
    few = data / "few.jsonl"
    few.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[40:43]))
    moved = run_here("migrate", address, "--to", "migrate-new", "--seeds", str(few), "--no-evaluate", *SHORT)
    assert json.loads(clean(moved))["acceptance"] is None


def test_a_migration_that_was_stopped_goes_on(
    source: str, migrated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Interrupted("Stopped.", "Run it again.")

    options = ("--to", "migrate-new", "--set", "seed=5", "--no-evaluate", *SHORT)
    with monkeypatch.context() as patched:
        patched.setattr("flows.migrate_adapter.label", stopped)
        assert run_here("migrate", source, *options).code == 130
    (kept,) = get_settings().runs.glob("migrate-evens-*/work/inputs.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr("training.migration.synthesis.sampled", stopped)  # everything is written already
        patched.setattr("flows.migrate_adapter.train_recipe", stopped)
        assert run_here("migrate", source, *options).code == 130
    assert (kept.parent / "answers.jsonl").is_file()
    monkeypatch.setattr("flows.migrate_adapter.label", label_nothing_new)
    before = {version.address for version in AdapterRegistry().versions("evens")}
    moved = json.loads(clean(run_here("migrate", source, *options)))
    assert moved["address"] not in before and not kept.exists()


def test_one_that_was_killed_when_its_version_stood_makes_no_second_one(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--to", "migrate-new", "--set", "seed=6", *SHORT)

    def killed(registry: AdapterRegistry, address: str, *results: Any) -> None:
        if address != source:
            raise Interrupted("Killed.", "Run it again.")
        record_result(registry, address, *results)

    before = {version.address for version in AdapterRegistry().versions("evens")}
    with monkeypatch.context() as patched:
        patched.setattr("flows.migrate_adapter.record_result", killed)
        assert run_here("migrate", source, *options).code == 130
    (left,) = {version.address for version in AdapterRegistry().versions("evens")} - before
    assert AdapterRegistry().attachment(left, MIGRATION_KIT) is None
    moved = run_here("migrate", source, *options)
    assert moved.code in (0, 7), "so short a training makes a poor adapter"
    assert json.loads(moved.out)["address"] == left
    assert AdapterRegistry().attachment(left, MIGRATION_KIT) is not None
    assert len(AdapterRegistry().evaluations(left)) == 1


def test_answers_are_settled_between_both_adapters_and_a_stop_loses_none_of_it(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--to", "migrate-new", "--set", "answers=settled", "--no-evaluate", *SHORT)
    refused = run_here("migrate", source, *options, "--set", "distillation.of=logits")
    assert refused.code == 2 and "answers=old" in refused.err

    def stopped(*_: object, **__: object) -> None:
        raise Interrupted("Stopped.", "Run it again.")

    trained: list[tuple[str, ...]] = []

    def noted(recipe: Any, base: Any, examples: Any, *rest: Any, **more: Any) -> Any:
        trained.append(tuple(example.prompt for example in examples))
        return train_recipe(recipe, base, examples, *rest, **more)

    monkeypatch.setattr("flows.migrate_adapter.train_recipe", noted)
    with monkeypatch.context() as patched:
        patched.setattr("training.migration.second_opinion.settled", stopped)
        assert run_here("migrate", source, *options).code == 130
    moved = json.loads(clean(run_here("migrate", source, *options)))
    one, other, last = trained
    seeds = set(one) & set(other)
    assert len(seeds) == 5 and set(last) == set(one) | set(other), "halves that share the seeds, then all"
    (edge,) = AdapterRegistry().lineage(moved["address"]).edges[-1:]
    assert edge.details["options"]["answers"] == "settled"
    assert 0 <= edge.details["answers_changed"] <= moved["inputs"]


def test_the_same_migration_again_is_not_made_again(migrated: dict[str, Any], source: str) -> None:
    before = {version.address for version in AdapterRegistry().versions("evens")}
    again = run_here("migrate", source, "--to", "migrate-new", "--no-filter", *SHORT)
    told = json.loads(again.out)
    assert told["existed"] and told["address"] == migrated["address"] and told["compared"] == migrated["compared"]
    assert {version.address for version in AdapterRegistry().versions("evens")} == before


def test_the_lineage_shows_who_has_a_kit(migrated: dict[str, Any], source: str) -> None:
    nodes = json.loads(clean(run_here("lineage", source, "--json")))["nodes"]
    kits = {node["address"]: node["attachments"] for node in nodes}
    assert kits[source] == kits[migrated["address"]] == ["migration_kit"]
    assert "+ migration kit" in clean(run_here("lineage", source, width=160))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_it_is_told_that_it_goes_on(source: str, number: signal.Signals) -> None:
    process = started("migrate", source, "--to", "migrate-new", "--set", "seed=7", "--no-evaluate", *SHORT)
    deadline = time.monotonic() + 120
    while str(process.pid) not in {held.read_text() for held in get_settings().runs.glob("migrate-evens-*/*.pid")}:
        assert process.poll() is None, ended(process).err
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.05)
    os.killpg(process.pid, number)
    told = ended(process)
    assert told.code == 130, told
    assert "goes on" in " ".join(told.err.split())


def label_nothing_new(*arguments: Any, **options: Any) -> Any:
    """As `label`, of inputs whose answers are all there."""
    return label(None, *arguments[1:], **options)  # type: ignore[arg-type]


def test_what_cannot_be_migrated_is_refused_before_any_work(source: str, tmp_path: Path) -> None:
    masked = save_tiny_masked(tmp_path / "masked")
    empty, nameless = tmp_path / "empty.jsonl", tmp_path / "nameless.jsonl"
    empty.touch()
    nameless.write_text('{"question": "1", "answer": "2"}\n')
    for arguments, code, told in (
        (("nobody@1", "--to", "migrate-new"), 3, "There is no adapter"),
        ((source, "--to", "nowhere"), 3, "There is no base model"),
        ((source, "--to", "migrate-old"), 2, "stands on migrate-old already"),
        ((source, "--to", "migrate-new", "--method", "lorra"), 3, "Did you mean 'lora'?"),
        ((source, "--to", "migrate-new", "--set", "inptus=3"), 2, "inptus is not an option"),
        ((source, "--to", "migrate-new", "--set", "training.stesp=3"), 2, "training.stesp is not an option"),
        ((source, "--to", "migrate-new", "--set", "method.rnak=3"), 2, "rnak is not an option"),
        ((source, "--to", "migrate-new", "--promote", "v3"), 2, "v3"),
        ((source, "--to", "migrate-new", "--seeds", str(empty)), 2, "holds no examples"),
        ((source, "--to", "migrate-new", "--seeds", str(tmp_path / "none.jsonl")), 3, "is not there"),
        ((source, "--to", "migrate-new", "--seeds", str(nameless)), 2, '{"prompt": "…", "completion": "…"}'),
        ((source, "--to", "migrate-new", "--promote", "best", "--no-evaluate"), 2, "that is not measured"),
        ((source, "--to", f"path:{masked}", "--no-evaluate"), 2, "writes no text"),
    ):
        result = run_here("migrate", *arguments)
        assert (result.code, told in result.err) == (code, True), (arguments, result.err)
    assert not [
        edge for edge in AdapterRegistry().lineage(source).edges if edge.parent == source and "masked" in edge.child
    ]
