"""What belongs to a version beside its own artifact: durable, checked, and never half there."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from infra.errors import Conflict, CorruptArtifact, InvalidInput, NotFound, ServiceUnavailable
from registry import AdapterRegistry
from registry.artifacts import open_artifact_store
from registry.models import JournalEntry, JournalState, VersionState
from tests.registry.conftest import OTHER_BASE
from tests.registry.test_fsck import close, mended, only, snapshots_of

Register = Callable[..., str]


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    folder = tmp_path / "kit"
    (folder / "discriminator").mkdir(parents=True)
    (folder / "kit.json").write_text('{"seeds": 5}')
    (folder / "discriminator" / "weights.txt").write_text("weights")
    return folder


def test_what_is_attached_comes_back_and_a_later_one_goes_before_it(
    registry: AdapterRegistry, register: Register, kit: Path
) -> None:
    address = register()
    assert registry.attachment(address, "migration_kit") is None
    first = registry.attach(address, "migration_kit", kit, {"accuracy": 0.9})
    assert (first.address, first.relation, first.details) == (address, "migration_kit", {"accuracy": 0.9})
    folder = registry.materialise_attachment(first)
    assert (folder / "discriminator" / "weights.txt").read_text() == "weights"
    (kit / "kit.json").write_text("{}")
    second = registry.attach(address, "migration_kit", kit)
    assert registry.attachment(address, "migration_kit") == second
    assert registry.attachments(address) == [second, first]
    assert registry.materialise_attachment(first) == folder, "what was there stays"
    assert registry.fsck() == []


def test_what_is_in_force_on_a_whole_base_is_found_at_once(
    registry: AdapterRegistry, register: Register, kit: Path
) -> None:
    first, second, elsewhere = register(), register("sorting"), register(base_identity=OTHER_BASE)
    registry.attach(first, "migration_kit", kit, {"rows": 1})
    newest = registry.attach(first, "migration_kit", kit, {"rows": 2})
    registry.attach(first, "report", kit)
    registry.attach(elsewhere, "migration_kit", kit)
    assert registry.attachments_on("tiny-a", "migration_kit") == {first: newest}
    assert registry.attachments_on("tiny-b", "migration_kit").keys() == {elsewhere}
    assert second not in registry.attachments_on("tiny-a", "migration_kit")


def test_only_a_ready_version_is_given_anything(
    registry: AdapterRegistry, register: Register, kit: Path, tmp_path: Path
) -> None:
    address = register()
    with pytest.raises(NotFound):
        registry.attach("counting@9", "migration_kit", kit)
    with pytest.raises(InvalidInput):
        registry.attach(address, "", kit)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput):
        registry.attach(address, "migration_kit", tmp_path / "empty")
    with registry.database.engine.begin() as connection:
        connection.execute(sa.text("DROP TRIGGER regraft_versions_kept"))
        connection.execute(sa.text("UPDATE regraft_versions SET state = 'pending'"))
    with pytest.raises(Conflict, match="is pending"):
        registry.attach(address, "migration_kit", kit)
    assert registry.attachments(address) == []


def test_a_store_that_fails_leaves_nothing(registry: AdapterRegistry, register: Register, kit: Path) -> None:
    address = register()
    put = registry.store.put

    def lost(directory: Path) -> object:
        put(directory)
        raise ServiceUnavailable("The store does not answer.")

    registry.store.put = lost  # type: ignore[method-assign]
    with pytest.raises(ServiceUnavailable):
        registry.attach(address, "migration_kit", kit)
    assert registry.attachments(address) == []
    assert set(registry.store.artifacts()) == {registry.get(address).artifact_sha256}
    assert registry.fsck() == []


def test_bytes_that_a_version_and_an_attachment_share_are_kept_while_one_needs_them(
    registry: AdapterRegistry, register: Register, adapter_directory: Callable[..., Path]
) -> None:
    address, directory = register(), adapter_directory(seed=0)
    attached = registry.attach(address, "copy", directory)
    assert attached.artifact_sha256 == registry.get(address).artifact_sha256
    with registry.database.engine.begin() as connection:  # a version that failed with the bytes of an attachment
        connection.execute(sa.text("DROP TRIGGER regraft_versions_kept"))
        connection.execute(sa.text("UPDATE regraft_versions SET state = 'failed', failure = 'x'"))
    registry.fsck(repair=True)
    assert registry.store.contains(attached.artifact_sha256)


def test_a_power_cut_anywhere_in_it_is_mended(
    registry: AdapterRegistry, register: Register, kit: Path, tmp_path: Path
) -> None:
    address = register()
    close(registry)
    homes = snapshots_of(
        lambda registry: registry.attach(address, "migration_kit", kit, {"n": 1}), registry.settings, tmp_path / "cuts"
    )
    outcomes = []
    for home in homes:
        survivor = mended(home)
        assert survivor.get(address).state == VersionState.READY
        found = survivor.attachments(address)
        if found:
            assert (survivor.materialise_attachment(found[0]) / "kit.json").is_file()
        else:
            assert set(survivor.store.artifacts()) == {survivor.get(address).artifact_sha256}
        outcomes.append(len(found))
        close(survivor)
    assert outcomes == sorted(outcomes), "once durable, always durable"
    assert set(outcomes) == {0, 1}


def test_work_that_a_live_process_is_busy_with_is_left_alone(
    registry: AdapterRegistry, register: Register, kit: Path
) -> None:
    address = register()
    put = registry.store.put

    def examined(directory: Path) -> object:
        assert AdapterRegistry(registry.settings).fsck(repair=True) == []
        return put(directory)

    registry.store.put = examined  # type: ignore[method-assign]
    assert registry.attach(address, "migration_kit", kit).address == address
    with registry.database.reading() as session:
        assert not session.scalars(sa.select(JournalEntry).where(JournalEntry.state == JournalState.OPEN)).all()


def test_damage_is_found_refused_and_mended_from_a_copy(
    registry: AdapterRegistry, register: Register, kit: Path, tmp_path: Path
) -> None:
    attached = registry.attach(register(), "migration_kit", kit)
    shutil.copytree(registry.settings.artifacts, tmp_path / "copy")
    manifest = registry.store.manifest(attached.artifact_sha256)
    (blob,) = Path(registry.settings.artifacts).rglob(manifest.files[0].sha256)
    blob.chmod(0o644)
    blob.write_bytes(b"damaged")
    with pytest.raises(CorruptArtifact, match="The migration_kit of counting@1 fails its checksum"):
        registry.materialise_attachment(attached)
    finding = only(registry.fsck())
    assert finding.subject == "counting@1 migration_kit" and "--from" in finding.repair
    copy = registry.settings.model_copy(update={"artifact_store": str(tmp_path / "copy")})
    assert only(registry.fsck(repair=True, source=open_artifact_store(copy))).repaired
    assert registry.fsck() == []
    registry.materialise_attachment(attached)
