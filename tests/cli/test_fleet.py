"""`regraft migrate --all`: a whole base's adapters move; one that cannot stops no other; what is done stays done."""

import json
import os
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from infra.errors import RegraftError
from infra.settings import get_settings
from registry import AdapterRegistry
from registry.attachments import MIGRATION_KIT
from tests.cli.conftest import WriteRecipe, ended, run_here, started
from tests.cli.test_kit import ROWS
from tests.cli.test_lifecycle import clean
from tests.cli.test_migrate import LEARNT
from tests.tiny_models import own_seed, save_tiny_gemma, save_tiny_llama
from training.migration import synthesis

pytestmark = pytest.mark.services

TO = ("--all", "--from", "fleet-old", "--to", "fleet-new")
SHORT = ("--no-filter", "--inputs", "6", "--set", "synthesis.items=2")
SHORT += ("--set", "training.steps=60")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet-data")
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[:40]))
    (folder / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[40:]))
    return folder


@pytest.fixture(scope="module")
def first(regraft_home: Path, write_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory, data: Path) -> str:
    """A version with a kit, on the base that goes away."""
    get_settings.cache_clear()
    bases = tmp_path_factory.mktemp("bases")
    for name, reference in (
        ("old", save_tiny_llama(bases / "old", seed=own_seed(__name__))),
        ("new", save_tiny_gemma(bases / "new", seed=own_seed(__name__))),
    ):
        clean(run_here("base", "add", f"path:{reference}", "--name", f"fleet-{name}"))
    held_out = {"file": str(data / "train.jsonl"), "test": str(data / "test.jsonl"), "fractions": {"validation": 0.1}}
    recipe = write_recipe(
        "fleet-a", base="fleet-old", data=held_out, training=LEARNT, migration_kit={"filtered": False}
    )
    address: str = json.loads(clean(run_here("train", str(recipe), "--json", "--no-evaluate")))["address"]
    (data / "train.jsonl").unlink()
    return address


def policy(adapter: str, line: str) -> None:
    """What promotions of `adapter` ask for; `line` is YAML about its test suite."""
    path = get_settings().home / "policies" / f"{adapter}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"suites: [{{suite: {adapter}/test, {line}}}]\n")


def copy(address: str, name: str, **changes: Any) -> str:
    """The version once more, under another adapter's name; `kit=False` leaves its kit out."""
    registry = AdapterRegistry()
    version = registry.get(address)
    kit = registry.attachment(address, MIGRATION_KIT)
    assert kit is not None
    recipe = {**version.recipe, **changes.get("recipe", {})}
    made = registry.register_version(
        name,
        registry.materialise(address),
        base_identity=version.base.identity_sha256,
        method=version.method,
        recipe={key: value for key, value in recipe.items() if value is not None},
        trainable_parameters=version.trainable_parameters,
        metrics=version.metrics,
    )
    if changes.get("kit", True):
        registry.attach(made.address, MIGRATION_KIT, registry.materialise_attachment(kit), kit.details)
    return made.address


@pytest.fixture(scope="module")
def fleet(first: str, data: Path) -> dict[str, str]:
    """Five more adapters: one in use, one whose test items are gone, one without a kit, one from elsewhere, and one
    that was tested on a part of what it was trained on."""
    registry = AdapterRegistry()
    gone = {**registry.get(first).recipe["data"], "test": str(data / "gone.jsonl")}
    shared = {**registry.get(first).recipe["data"], "test": None}
    made = {
        "used": copy(first, "fleet-b"),
        "fails": copy(first, "fleet-c", recipe={"data": gone}),
        "bare": copy(first, "fleet-d", kit=False),
        "foreign": copy(first, "fleet-e", recipe={"data": None}, kit=False),
        "shared": copy(first, "fleet-f", recipe={"data": shared}),
    }
    registry.set_alias(made["used"], "challenger", actor="ada")
    return made


def test_a_plan_says_who_moves_in_what_order_and_who_cannot(first: str, fleet: dict[str, str]) -> None:
    plan = json.loads(clean(run_here("migrate", *TO, *SHORT, "--dry-run", "--json")))
    assert plan["items"][0]["address"] == fleet["used"], "what is in use comes first"
    obstacles = {item["address"]: item["obstacle"] for item in plan["items"]}
    assert obstacles == {
        first: None,
        fleet["used"]: None,
        fleet["fails"]: None,
        fleet["bare"]: "no migration kit",
        fleet["foreign"]: "imported without a recipe",
        fleet["shared"]: "its test items are part of its training data: --task, or --no-evaluate",
    }
    assert {item["inputs"] for item in plan["items"]} == {6}
    told = " ".join(clean(run_here("migrate", *TO, *SHORT, "--dry-run")).split())
    assert "3 of 6 move from fleet-old to fleet-new, 3 cannot" in told and "trainings" in told
    assert not list(get_settings().runs.glob("fleet-old-*"))
    only = json.loads(clean(run_here("migrate", *TO, "--alias", "challenger", "--dry-run", "--json")))
    assert [item["address"] for item in only["items"]] == [fleet["used"]]


def test_what_cannot_be_meant_is_refused(first: str) -> None:
    for arguments, code, told in (
        (("--all", "--to", "fleet-new"), 2, "--from BASE"),
        ((first, *TO), 2, "NAME@VERSION says something of one version"),
        (("--to", "fleet-new"), 2, "or --all with --from BASE"),
        (("--all", "--from", "fleet-old", "--to", "fleet-old"), 2, "the same base model"),
        (("--all", "--from", "nowhere", "--to", "fleet-new"), 3, "no base model 'nowhere'"),
        (("--all", "--from", "fleet-old", "--to", "nowhere"), 3, "no base model 'nowhere'"),
        ((*TO, "--method", "lorra", "--dry-run"), 3, "Did you mean 'lora'?"),
        ((*TO, "--watch"), 3, "No migration of all adapters from fleet-old to fleet-new was begun here"),
        ((*TO, "--set", "training.stesp=3", "--dry-run"), 2, "stesp is not an option"),
        ((*TO, "--promote", "best", "--no-evaluate", "--dry-run"), 2, "versions that are not measured"),
        ((first, "--to", "fleet-new", "--dry-run"), 2, "--dry-run goes with --all"),
    ):
        result = run_here("migrate", *arguments)
        shown = " ".join(result.err.replace("│", " ").split())
        assert (result.code, told in shown) == (code, True), (arguments, result.err)


def test_all_move_that_can_and_a_second_run_tries_only_what_failed(
    first: str, fleet: dict[str, str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        written.append(1)
        return synthesis_sampled(*arguments, **options)

    synthesis_sampled = synthesis.sampled
    monkeypatch.setattr("training.migration.synthesis.sampled", counted)
    result = run_here("migrate", *TO, *SHORT, "--json")
    moved = {adapter["address"]: adapter for adapter in json.loads(result.out)["adapters"]}
    assert result.code == 7
    assert "gone.jsonl" in moved[fleet["fails"]]["problem"]
    assert moved[fleet["fails"]]["decision"] == "failed"
    assert moved[fleet["bare"]]["decision"] == "cannot move"
    for address in (first, fleet["used"]):
        assert moved[address]["decision"] in ("as good", "not as good")
        assert moved[address]["compared"][0]["samples"] == 20
    rounds = len(written)
    shutil.copy(data / "test.jsonl", data / "gone.jsonl")
    watched = json.loads(clean(run_here("migrate", *TO, "--watch", "--json")))
    assert not watched["running"]
    states = {place["address"]: place["state"] for place in watched["board"]["places"]}
    assert states == {first: "moved", fleet["used"]: "moved", fleet["fails"]: "failed"}
    again = run_here("migrate", *TO, *SHORT, "--json")
    told_so = clean(run_here("migrate", *TO, "--watch"))
    assert f"{fleet['fails']}" in told_so and "1 moved" in told_so and "Nobody is at work" in told_so
    assert len(written) == rounds, "three adapters of one kit share what the target wrote"
    told = {adapter["address"]: adapter for adapter in json.loads(again.out)["adapters"]}
    assert told[fleet["fails"]]["decision"] in ("as good", "not as good")
    assert told[first] == moved[first]
    registry = AdapterRegistry()
    assert {name: len(registry.versions(name)) for name in ("fleet-a", "fleet-b", "fleet-c", "fleet-d")} == {
        "fleet-a": 2,
        "fleet-b": 2,
        "fleet-c": 2,
        "fleet-d": 1,
    }
    page = Path(json.loads(again.out)["report"]).read_text()
    assert all(address in page for address in moved) and page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    assert registry.fsck() == []
    plan = " ".join(clean(run_here("migrate", *TO, "--dry-run")).split())
    assert "0 of 6 move" in plan and "3 are there already" in plan
    stranded = clean(run_here("base", "deprecate", TO[2], "--successor", TO[4], width=160))
    assert "moved already" in stranded and all(address in stranded for address in moved)


def test_what_a_killed_process_left_undone_is_made_good(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = AdapterRegistry()
    old = copy(first, "cut")
    registry.set_alias(old, "spare", actor="ada")
    policy("cut", "minimum: 0, max_regression: null")
    options = ("migrate", *TO, "--alias", "spare", *SHORT, "--set", "allowed_loss=1", "--json")

    def killed(*_: Any, **__: Any) -> None:
        raise RegraftError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(AdapterRegistry, "attach", killed)  # the last thing, after the version is registered
        (moved,) = json.loads(run_here(*options).out)["adapters"]
    assert moved["problem"] == "killed" and registry.attachment(moved["migrated"], MIGRATION_KIT) is None
    (done,) = json.loads(clean(run_here(*options, "--promote", "spare")))["adapters"]
    assert done["migrated"] == moved["migrated"] and done["decision"] == "promoted"
    kits = [registry.attachment(address, MIGRATION_KIT) for address in (old, moved["migrated"])]
    assert kits[0] and kits[1] and kits[0].artifact_sha256 == kits[1].artifact_sha256
    holder = registry.alias("cut", "spare")
    assert holder and holder.address == moved["migrated"]


def test_a_promotion_that_its_policy_refuses_is_told(first: str) -> None:
    registry = AdapterRegistry()
    registry.set_alias(copy(first, "strict"), "strict", actor="ada")
    policy("strict", "minimum: 1.01")
    options = ("--alias", "strict", *SHORT, "--set", "allowed_loss=1", "--promote", "strict", "--json")
    told = run_here("migrate", *TO, *options)
    (adapter,) = json.loads(told.out)["adapters"]
    assert (told.code, adapter["decision"]) == (7, "as good")
    assert "strict was refused: strict/test" in adapter["problem"]


@pytest.mark.slow
def test_a_worker_moves_what_was_queued(first: str) -> None:
    registry = AdapterRegistry()
    copy(first, "queued-a")
    copy(first, "queued-b")
    one = json.loads(clean(run_here("migrate", "queued-a@1", "--to", "fleet-new", *SHORT, "--queue", "--json")))
    assert "Queued as flow run" in clean(run_here("migrate", *TO, *SHORT, "--queue"))
    assert len(registry.versions("queued-a")) == 1, "nothing is done yet"
    worked = ended(started("worker", "--once", REGRAFT_HOME=str(get_settings().home)))
    assert worked.code == 0, worked.err
    assert one["flow_run"] in worked.out + worked.err
    for name in ("queued-a", "queued-b"):
        assert [version.base.name for version in registry.versions(name)] == ["fleet-new", "fleet-old"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("prefect_ray") is None, reason="pip install 'regraft[ray]'")
def test_a_fleet_moves_on_the_workers_of_a_ray_cluster(first: str, data: Path, tmp_path: Path) -> None:
    registry = AdapterRegistry()
    gone = {**registry.get(first).recipe["data"], "test": str(data / "never.jsonl")}
    copy(first, "ray-a")
    copy(first, "ray-c", recipe={"data": gone})
    other = copy(first, "ray-b", kit=False)  # with a kit of its own it goes to the other worker
    kit = registry.attachment(first, MIGRATION_KIT)
    assert kit is not None
    folder = Path(shutil.copytree(registry.materialise_attachment(kit), tmp_path / "kit"))
    content = json.loads((folder / "kit.json").read_text())
    (folder / "kit.json").write_text(json.dumps({**content, "rows": content["rows"] + 1}))
    registry.attach(other, MIGRATION_KIT, folder, kit.details)
    settings = {"REGRAFT_HOME": str(get_settings().home), "REGRAFT_RAY": "local:2"}
    run = ended(started("migrate", *TO, *SHORT, "--json", **settings))
    assert run.code == 7, run.err
    decided = {adapter["address"]: adapter for adapter in json.loads(run.out)["adapters"]}
    assert {decided[f"ray-{name}@1"]["decision"] for name in "ab"} <= {"as good", "not as good"}
    assert "never.jsonl" in decided["ray-c@1"]["problem"]
    assert [len(registry.versions(f"ray-{name}")) for name in "abc"] == [2, 2, 1]
    watched = json.loads(clean(run_here("migrate", *TO, "--watch", "--json")))
    states = {place["address"]: place["state"] for place in watched["board"]["places"]}
    assert (states["ray-a@1"], states["ray-c@1"]) == ("moved", "failed")
    assert registry.fsck() == []


@pytest.mark.slow
def test_fifty_move_and_a_kill_in_the_middle_loses_nothing(first: str) -> None:
    registry = AdapterRegistry()
    names = [f"fifty-{number:02d}" for number in range(50)]
    for name in names:
        copy(first, name)
    options = ("migrate", *TO, "--no-filter", "--inputs", "4", "--set", "synthesis.items=2")
    options += ("--set", "training.steps=5", "--no-evaluate")
    process = started(*options, REGRAFT_HOME=str(get_settings().home))
    while sum(len(registry.versions(name)) > 1 for name in names) < 10:
        assert process.poll() is None, process.communicate()
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {name: [version.address for version in registry.versions(name)] for name in names}
    assert ended(started(*options, REGRAFT_HOME=str(get_settings().home))).code in (0, 7)  # others were here before
    after = {name: [version.address for version in registry.versions(name)] for name in names}
    assert all(len(addresses) == 2 for addresses in after.values())
    assert all(set(before[name]) <= set(after[name]) for name in names)
    assert registry.fsck() == []
