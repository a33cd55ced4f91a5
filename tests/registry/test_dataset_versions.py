"""Chosen rows as versions of a data set: durable, checked, never half there, linked from what was trained on them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import CorruptArtifact, InvalidInput, NotFound, ServiceUnavailable
from registry import AdapterRegistry
from registry.records import DatasetRecord, DatasetVersionRecord
from tests.registry.test_fsck import close, mended, only, snapshots_of

Register = Callable[..., str]
ORIGIN = {"method": "random", "seed": 0}


@pytest.fixture
def chosen(tmp_path: Path) -> Path:
    folder = tmp_path / "chosen"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "1 + 1", "completion": "2"}\n')
    return folder


def kept(
    registry: AdapterRegistry, folder: Path, fingerprint: str = "f" * 64, **changes: object
) -> DatasetVersionRecord:
    return registry.keep_dataset("sums", folder, fingerprint=fingerprint, rows=1, origin={**ORIGIN, **changes})


def test_each_choice_is_a_version_and_the_same_one_is_found_again(registry: AdapterRegistry, chosen: Path) -> None:
    first = kept(registry, chosen)
    assert (first.address, first.rows, first.origin) == ("sums@1", 1, ORIGIN)
    (chosen / "report.html").write_text("another page about the same rows")
    assert kept(registry, chosen) == first
    second, third = kept(registry, chosen, "e" * 64), kept(registry, chosen, seed=1)
    assert [record.number for record in (second, third)] == [2, 3]
    assert registry.dataset("sums") == third and registry.dataset("sums@1") == first
    assert registry.datasets() == [third, second, first]
    assert (registry.materialise_dataset("sums@1") / "rows.jsonl").read_bytes() == (chosen / "rows.jsonl").read_bytes()
    assert registry.fsck() == []


def test_what_is_not_there_is_told_with_what_is(registry: AdapterRegistry, chosen: Path) -> None:
    with pytest.raises(NotFound, match="There is no data set 'sums'"):
        registry.dataset("sums")
    kept(registry, chosen)
    with pytest.raises(NotFound) as refused:
        registry.dataset("sum")
    assert "sums" in refused.value.remedy
    with pytest.raises(NotFound) as refused:
        registry.dataset("sums@7")
    assert refused.value.remedy == "There are: sums@1."
    with pytest.raises(InvalidInput, match="not the address of a data set"):
        registry.dataset("sums@production")
    with pytest.raises(InvalidInput):
        registry.keep_dataset("No Name", chosen, fingerprint="f" * 64, rows=1, origin={})


def test_versions_that_were_trained_on_it_are_found(
    registry: AdapterRegistry, register: Register, chosen: Path
) -> None:
    kept(registry, chosen)
    kept(registry, chosen, seed=1)
    drawn = DatasetRecord("sums", "d" * 64, 1, {"file": "rows.jsonl"}, drawn_from="sums@1")
    first, second = register(dataset=drawn), register("sorting", dataset=drawn)
    register(dataset=DatasetRecord("sums", "c" * 64, 1, {}))
    assert [version.address for version in registry.trained_on("sums@1")] == [first, second]
    assert registry.trained_on("sums@2") == []
    assert registry.get(first).dataset == drawn
    with pytest.raises(NotFound):
        register(dataset=DatasetRecord("sums", "b" * 64, 1, {}, drawn_from="sums@9"))
    assert registry.fsck() == []


def test_rows_that_were_known_by_their_content_alone_are_linked_later(
    registry: AdapterRegistry, register: Register, chosen: Path
) -> None:
    before = register(dataset=DatasetRecord("sums", "d" * 64, 1, {}))
    kept(registry, chosen)
    after = register(dataset=DatasetRecord("sums", "d" * 64, 1, {}, drawn_from="sums@1"))
    assert [version.address for version in registry.trained_on("sums")] == [before, after], "the same rows"


def test_a_store_that_fails_leaves_nothing(registry: AdapterRegistry, chosen: Path) -> None:
    put = registry.store.put

    def lost(directory: Path) -> object:
        put(directory)
        raise ServiceUnavailable("The store does not answer.")

    registry.store.put = lost  # type: ignore[method-assign]
    with pytest.raises(ServiceUnavailable):
        kept(registry, chosen)
    assert registry.datasets() == [] and set(registry.store.artifacts()) == set()
    assert registry.fsck() == []


def test_a_power_cut_anywhere_in_it_is_mended(registry: AdapterRegistry, chosen: Path, tmp_path: Path) -> None:
    close(registry)
    outcomes = []
    for home in snapshots_of(lambda registry: kept(registry, chosen), registry.settings, tmp_path / "cuts"):
        survivor = mended(home)
        found = survivor.datasets()
        if found:
            assert (survivor.materialise_dataset("sums@1") / "rows.jsonl").is_file()
        else:
            assert set(survivor.store.artifacts()) == set()
        outcomes.append(len(found))
        close(survivor)
    assert outcomes == sorted(outcomes), "once durable, always durable"
    assert set(outcomes) == {0, 1}


def test_damage_is_found_and_refused(registry: AdapterRegistry, chosen: Path) -> None:
    record = kept(registry, chosen)
    manifest = registry.store.manifest(record.artifact_sha256)
    (blob,) = Path(registry.settings.artifacts).rglob(manifest.files[0].sha256)
    blob.chmod(0o644)
    blob.write_bytes(b"damaged")
    with pytest.raises(CorruptArtifact, match="The data set sums@1 fails its checksum"):
        registry.materialise_dataset("sums")
    assert only(registry.fsck()).subject == "data set sums@1"
