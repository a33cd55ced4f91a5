"""What a power cut leaves at every line of the registry's code, and what `fsck` makes of it."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import sqlalchemy as sa

import registry as registry_package
from infra.settings import Settings
from registry import AdapterRegistry
from registry.artifacts import open_artifact_store
from registry.fsck import Finding
from registry.models import JournalEntry, JournalState, VersionState
from tests.forked import forked
from tests.registry.conftest import BASE

Register = Callable[..., str]
CODE = str(Path(registry_package.__file__).parent)


class Snapshots:
    """Copies a home whenever something in it has changed: what a `kill -9` at that line would leave on the disk."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.home, self.folder = home, folder
        self.seen = self._state()
        self.taken = 0
        folder.mkdir()

    def __call__(self, frame: FrameType, event: str, argument: object) -> object:
        """Trace function: looks before every line of the registry's own code, and when it returns or raises."""
        if not frame.f_code.co_filename.startswith(CODE):
            return None
        state = self._state()
        if state != self.seen:
            self.seen = state
            # Locks die with their process, and SQLite's shared memory is built anew from its log.
            shutil.copytree(
                self.home, self.folder / f"{self.taken:03}", ignore=shutil.ignore_patterns("*-shm", "*.lock")
            )
            self.taken += 1
        return self

    def _state(self) -> dict[str, tuple[int, int]]:
        state = {}
        for folder, _, names in os.walk(self.home):
            for name in names:
                path = Path(folder, name)
                if path.suffix != ".lock" and not name.endswith("-shm"):
                    status = path.stat()
                    state[str(path)] = (status.st_size, status.st_mtime_ns)
        return state


def snapshots_of(work: Callable[[AdapterRegistry], object], settings: Settings, folder: Path) -> list[Path]:
    """The homes that a power cut could leave, made in a process that is dead by the time they are looked at."""

    def run() -> None:
        registry = AdapterRegistry(settings)
        registry.adapters()
        registry.tracking.aliases("nobody")
        recorder = Snapshots(settings.home, folder)
        sys.settrace(recorder)
        work(registry)
        sys.settrace(None)

    _, status = os.waitpid(forked(run), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return sorted(folder.iterdir())


def mended(home: Path) -> AdapterRegistry:
    """The registry in that home after one repair; a second examination must find nothing."""
    registry = AdapterRegistry(Settings(home=home))
    first = registry.fsck(repair=True)
    assert all(finding.repaired for finding in first), first
    assert AdapterRegistry(Settings(home=home)).fsck() == []
    with registry.database.reading() as session:
        assert session.scalars(sa.select(JournalEntry).where(JournalEntry.state == JournalState.OPEN)).all() == []
    return registry


def states(registry: AdapterRegistry) -> dict[str, str]:
    found = [version for state in VersionState for version in registry.search(state=state)]
    return {version.address: str(version.state) for version in found}


def close(registry: AdapterRegistry) -> None:
    """Close all databases: no connection may be open across a fork."""
    client = registry.tracking._client
    for engine in (
        registry.database.engine,
        client._tracking_client.store.engine,
        client._get_registry_client().store.engine,
    ):
        engine.dispose()


def test_a_power_cut_anywhere_in_a_registration_is_mended(
    registry: AdapterRegistry, register: Register, adapter_directory: Callable[..., Path], tmp_path: Path
) -> None:
    register()
    registry.promote("counting@1", "production", None, actor="ada", force=True, reason="first")
    close(registry)
    directory = adapter_directory(seed=77)

    def work(registry: AdapterRegistry) -> None:
        registry.register_version(
            "counting", directory, base_identity=BASE, method="lora", recipe={}, trainable_parameters=1
        )

    outcomes = []
    for home in snapshots_of(work, registry.settings, tmp_path / "cuts"):
        survivor = mended(home)
        found = states(survivor)
        assert found.pop("counting@1") == "ready", "nothing that was ready is lost"
        assert survivor.get("counting@production").address == "counting@1"
        assert set(found.values()) <= {"ready", "failed"}
        if found.get("counting@2") == "ready":
            assert (survivor.materialise("counting@2") / "adapter_model.safetensors").is_file()
        elif found:
            assert not survivor.store.contains(survivor.get("counting@2").artifact_sha256)
        outcomes.append(found.get("counting@2", "never heard of"))
        close(survivor)
    assert outcomes == sorted(outcomes, key=["never heard of", "failed", "ready"].index), "once durable, always durable"
    assert {"failed", "ready"} <= set(outcomes)


def test_a_power_cut_anywhere_in_a_promotion_is_mended(
    registry: AdapterRegistry, register: Register, tmp_path: Path
) -> None:
    for _ in range(2):
        register()
    registry.promote("counting@1", "production", None, actor="ada", force=True, reason="first")
    close(registry)

    def work(registry: AdapterRegistry) -> None:
        registry.promote("counting@2", "production", None, actor="ada", force=True, reason="second")

    homes = snapshots_of(work, registry.settings, tmp_path / "cuts")
    assert len(homes) >= 3, "decided, mirrored, journal closed"
    (unmirrored,) = AdapterRegistry(Settings(home=homes[0])).fsck()
    assert unmirrored.subject == "counting@production"
    for home in homes:
        survivor = mended(home)
        holder = survivor.alias("counting", "production")
        moves = survivor.history("counting")
        assert (holder.address, holder.generation) == (moves[0].to_address, moves[0].generation)
        assert survivor.tracking.aliases("counting") == {"production": survivor.get(holder.address).mlflow_version}
        assert holder.address == "counting@2", "the first durable step decides"
        close(survivor)


def test_a_power_cut_during_a_repair_is_mended_too(
    registry: AdapterRegistry, register: Register, tmp_path: Path
) -> None:
    first, second = register(), register()
    registry.set_alias(first, "challenger", actor="ada")
    registry.tracking.delete_version("counting", uid_of(registry, second))
    registry.tracking.set_alias("counting", "elsewhere", 1)
    leave_pending(registry, register())
    close(registry)
    for home in snapshots_of(lambda registry: registry.fsck(repair=True), registry.settings, tmp_path / "cuts"):
        survivor = mended(home)
        assert set(states(survivor).values()) == {"ready"}
        close(survivor)


def test_a_process_that_is_killed_while_it_stores_leaves_nothing_half_done(
    registry: AdapterRegistry, register: Register, adapter_directory: Callable[..., Path], tmp_path: Path
) -> None:
    register()
    close(registry)
    directory, reached = adapter_directory(seed=5), tmp_path / "reached"

    def run() -> None:
        mine = AdapterRegistry(registry.settings)
        put = mine.store.put

        def stores_and_waits(directory: Path) -> object:
            stored = put(directory)
            reached.touch()
            signal.pause()
            return stored

        mine.store.put = stores_and_waits  # type: ignore[method-assign]
        mine.register_version(
            "counting", directory, base_identity=BASE, method="lora", recipe={}, trainable_parameters=1
        )

    child = forked(run)
    while not reached.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it lives"
        time.sleep(0.01)
    fresh = AdapterRegistry(registry.settings)
    assert fresh.fsck(repair=True) == [], "a living process is left to its work"
    assert [version.address for version in fresh.versions("counting")] == ["counting@1"]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (finding,) = fresh.fsck()
    assert (finding.subject, finding.repaired) == ("counting@2", False)
    assert mended(registry.settings.home).get("counting@2").state == VersionState.READY


# ---- what is found, one by one


def uid_of(registry: AdapterRegistry, address: str) -> str:
    from registry import versions

    with registry.database.reading() as session:
        return versions.find(session, address).uid


def leave_pending(registry: AdapterRegistry, address: str) -> None:
    """A row as no code of ours leaves it: pending, and no journal entry speaks of it."""
    uid = uid_of(registry, address)
    with registry.database.engine.begin() as connection:
        connection.execute(sa.text("DROP TRIGGER regraft_versions_kept"))
        connection.execute(sa.text("UPDATE regraft_versions SET state = 'pending' WHERE uid = :uid"), {"uid": uid})


def damage(registry: AdapterRegistry, address: str) -> None:
    manifest = registry.store.manifest(registry.get(address).artifact_sha256)
    weights = next(file for file in manifest.files if file.path.endswith(".safetensors"))
    (blob,) = Path(registry.settings.artifacts).rglob(weights.sha256)
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_pending_row_without_a_journal_entry_is_completed(registry: AdapterRegistry, register: Register) -> None:
    leave_pending(registry, register())
    assert only(registry.fsck(repair=True)).repaired
    assert registry.fsck() == []
    assert registry.get("counting@1").state == VersionState.READY


def test_a_damaged_artifact_is_found_only_by_reading_it_and_restored_from_a_copy(
    registry: AdapterRegistry, register: Register, tmp_path: Path
) -> None:
    register()
    copy = tmp_path / "copy"
    shutil.copytree(registry.settings.artifacts, copy)
    damage(registry, "counting@1")
    assert registry.fsck(deep=False) == []
    finding = only(registry.fsck(repair=True))
    assert (finding.subject, finding.repaired) == ("counting@1", False) and "--from" in finding.repair
    assert registry.get("counting@1").state == VersionState.READY, "not given up"
    source = open_artifact_store(Settings(home=registry.settings.home, artifact_store=str(copy)))
    assert only(registry.fsck(repair=True, source=source)).repaired
    assert registry.fsck() == []
    registry.materialise("counting@1")


def test_a_copy_that_is_damaged_itself_repairs_nothing(
    registry: AdapterRegistry, register: Register, tmp_path: Path
) -> None:
    register()
    damage(registry, "counting@1")
    shutil.copytree(registry.settings.artifacts, tmp_path / "copy")
    source = open_artifact_store(Settings(home=registry.settings.home, artifact_store=str(tmp_path / "copy")))
    assert not only(registry.fsck(repair=True, source=source)).repaired


def test_a_missing_artifact_is_found_at_a_glance(registry: AdapterRegistry, register: Register) -> None:
    version = registry.get(register())
    registry.store.delete(version.artifact_sha256)
    finding = only(registry.fsck(deep=False))
    assert finding.subject == "counting@1" and version.artifact_sha256[:12] in finding.problem


def test_a_version_that_mlflow_lost_is_recorded_again(registry: AdapterRegistry, register: Register) -> None:
    first, second = register(), register()
    registry.set_alias(first, "challenger", actor="ada")
    registry.tracking.delete_version("counting", uid_of(registry, first))
    subjects = [finding.subject for finding in registry.fsck(repair=True)]
    assert subjects == [first, "counting@challenger"]
    assert registry.fsck() == []
    assert registry.get(first).mlflow_version == 3
    assert registry.tracking.aliases("counting") == {"challenger": 3}
    assert registry.get(second).mlflow_version == 2


def test_an_mlflow_that_was_lost_entirely_is_filled_again(
    registry: AdapterRegistry, register: Register, fresh_home: Path
) -> None:
    for _ in range(2):
        register()
    registry.promote("counting@2", "production", None, actor="ada", force=True, reason="x")
    for path in registry.settings.home.glob("mlflow.db*"):
        path.unlink()
    shutil.copy(fresh_home / "mlflow.db", registry.settings.home)
    fresh = AdapterRegistry(registry.settings)
    assert all(finding.repaired for finding in fresh.fsck(repair=True))
    assert fresh.fsck() == []
    assert fresh.tracking.aliases("counting") == {"production": fresh.get("counting@2").mlflow_version}


def test_an_alias_moved_by_hand_in_mlflow_is_moved_back(registry: AdapterRegistry, register: Register) -> None:
    first, second = register(), register()
    registry.promote(first, "production", None, actor="ada", force=True, reason="x")
    registry.tracking.set_alias("counting", "production", 2)
    registry.tracking.set_alias("counting", "stray", 2)
    production, stray = registry.fsck()
    assert production.problem == f"is {second} in MLflow, {first} here"
    assert stray.problem == f"is {second} in MLflow, unset here"
    registry.fsck(repair=True)
    assert registry.tracking.aliases("counting") == {"production": 1}
    assert registry.fsck() == []


def test_an_alias_moved_by_hand_in_mlflow_can_be_adopted_and_is_written_down(
    registry: AdapterRegistry, register: Register
) -> None:
    first, second = register(), register()
    registry.promote(first, "production", None, actor="ada", force=True, reason="x")
    registry.tracking.set_alias("counting", "production", 2)
    registry.tracking.set_alias("counting", "stray", 1)
    registry.tracking.set_alias("counting", "No_Good", 1)
    findings = {finding.subject: finding.repaired for finding in registry.fsck(repair=True, adopt_mlflow=True)}
    assert findings == {"counting@No_Good": False, "counting@production": True, "counting@stray": True}
    assert registry.get("counting@production").address == second
    assert registry.get("counting@stray").address == first
    log = {line.alias: (line.decision, line.actor) for line in reversed(registry.history("counting"))}
    assert log == {"production": ("forced", "fsck"), "stray": ("moved", "fsck")}


def test_what_others_keep_in_the_same_mlflow_and_store_is_left_alone(
    registry: AdapterRegistry, register: Register, adapter_directory: Callable[..., Path]
) -> None:
    register()
    client = registry.tracking._client
    theirs = client.create_model_version("counting", source="s3://x/y").version
    client.set_registered_model_alias("counting", "theirs", theirs)
    foreign = registry.store.put(adapter_directory(seed=9)).sha256
    assert registry.fsck(repair=True) == []
    assert registry.store.contains(foreign)
    assert "theirs" in registry.tracking.aliases("counting")


def test_leftovers_of_a_failed_registration_are_removed(
    registry: AdapterRegistry,
    register: Register,
    adapter_directory: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = adapter_directory(seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(registry.store, "put", lambda directory: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            registry.register_version(
                "counting", directory, base_identity=BASE, method="lora", recipe={}, trainable_parameters=1
            )
    failed = registry.get("counting@1")
    assert registry.store.put(directory).sha256 == failed.artifact_sha256
    registry.tracking.ensure_version("counting", uid_of(registry, "counting@1"), source="x:/y", run_id=None, tags={})
    assert [finding.repaired for finding in registry.fsck(repair=True)] == [True, True]
    assert not registry.store.contains(failed.artifact_sha256)
    assert registry.tracking.versions("counting") == {}
    assert registry.fsck() == []


def test_an_alias_of_a_version_that_is_not_ready_goes_back(registry: AdapterRegistry, register: Register) -> None:
    first, second = register(), register()
    for address in (first, second):
        registry.promote(address, "production", None, actor="ada", force=True, reason="x", expected_generation=None)
    with registry.database.engine.begin() as connection:
        connection.execute(sa.text("UPDATE regraft_versions SET state = 'retired' WHERE number = 2"))
    finding = only(registry.fsck(repair=True))
    assert finding.repaired and finding.problem == f"points at {second}, which is retired"
    assert registry.get("counting@production").address == first
    assert registry.history("counting")[0].actor == "fsck"
    assert registry.fsck() == []
