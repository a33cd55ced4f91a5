"""The claims that every artifact store must fulfil; test_artifacts.py and test_s3_store.py run them on theirs."""

import hashlib
import json
import os
import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from infra.errors import Conflict, CorruptArtifact, InvalidInput, NotFound, ServiceUnavailable
from registry.artifacts import Manifest, StoredFile
from registry.content_store import ContentAddressedStore

EVERYTHING = timedelta(0)
PARTS = 8 << 20  # an S3 part


class StoredBytes(ABC):
    """A store together with a hand on the bytes beneath it, to damage them as a failing disk would."""

    store: ContentAddressedStore

    @abstractmethod
    def blobs(self) -> set[str]: ...

    @abstractmethod
    def write_blob(self, sha256: str, content: bytes) -> None: ...

    @abstractmethod
    def remove_blob(self, sha256: str) -> None: ...

    @abstractmethod
    def write_manifest(self, sha256: str, content: bytes) -> None: ...


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class ArtifactStoreContract:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        directory = tmp_path / "adapter"
        (directory / "kit").mkdir(parents=True)
        (directory / "adapter_config.json").write_text('{"r": 8}')
        (directory / "kit" / "seeds é.jsonl").write_text('{"text": "one"}\n')
        (directory / "empty").write_bytes(b"")
        weights = np.random.default_rng(0).standard_normal((64, 33)).astype(np.float32)
        save_file({"layer.lora_A.weight": weights}, directory / "adapter_model.safetensors")
        return directory

    def test_put_answers_with_what_hashlib_says_of_every_file(self, bytes_of: StoredBytes, directory: Path) -> None:
        manifest = bytes_of.store.put(directory)
        expected = {path: (len(content), sha256(content)) for path, content in contents(directory).items()}
        assert {file.path: (file.size, file.sha256) for file in manifest.files} == expected
        assert manifest.size_bytes == sum(size for size, _ in expected.values())
        assert manifest.sha256 == sha256(manifest.to_json().encode())
        assert bytes_of.blobs() == {digest for _, digest in expected.values()}

    def test_what_is_fetched_is_what_was_put(self, bytes_of: StoredBytes, directory: Path, tmp_path: Path) -> None:
        store = bytes_of.store
        (directory / "large").write_bytes(np.random.default_rng(1).bytes(2 * PARTS + 3))
        (directory / "one part").write_bytes(bytes(PARTS))
        manifest = store.put(directory)
        store.fetch(manifest.sha256, tmp_path / "deep" / "copy")
        assert contents(tmp_path / "deep" / "copy") == contents(directory)
        assert store.manifest(manifest.sha256) == manifest
        assert store.verify(manifest.sha256) == []
        assert not list((tmp_path / "deep").glob(".*"))

    def test_the_same_content_is_stored_once(self, bytes_of: StoredBytes, directory: Path) -> None:
        store = bytes_of.store
        first = store.put(directory)
        assert store.put(directory) == first
        (directory / "twin.json").write_text('{"r": 8}')
        second = store.put(directory)
        assert second.sha256 != first.sha256
        assert bytes_of.blobs() == {file.sha256 for file in first.files}
        assert set(store.artifacts()) == {first.sha256, second.sha256}

    def test_an_unknown_artifact_is_not_found(self, bytes_of: StoredBytes, tmp_path: Path) -> None:
        store, unknown = bytes_of.store, sha256(b"nothing")
        assert not store.contains(unknown)
        assert store.verify(unknown) != []
        for act in (
            store.manifest,
            store.delete,
            lambda a: store.fetch(a, tmp_path / "x"),
            lambda a: [*store.read_blob(a)],
        ):
            with pytest.raises(NotFound):
                act(unknown)
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize("address", ["../../etc/passwd", "", "A" * 64, "a" * 63, "a" * 64 + "\n", "/" + "a" * 63])
    def test_only_an_address_is_looked_up(self, bytes_of: StoredBytes, address: str) -> None:
        store = bytes_of.store
        for act in (store.manifest, store.contains, store.delete, lambda a: next(store.read_blob(a))):
            with pytest.raises(InvalidInput):
                act(address)

    @pytest.mark.parametrize("position", [0, -1, 4000])
    def test_a_flipped_bit_of_a_tensor_is_caught(
        self, bytes_of: StoredBytes, directory: Path, tmp_path: Path, position: int
    ) -> None:
        store = bytes_of.store
        manifest = store.put(directory)
        weights = next(file for file in manifest.files if file.path == "adapter_model.safetensors")
        content = bytearray((directory / weights.path).read_bytes())
        content[position] ^= 0x10
        bytes_of.write_blob(weights.sha256, bytes(content))
        (problem,) = store.verify(manifest.sha256)
        assert weights.path in problem and weights.sha256[:12] in problem and sha256(content)[:12] in problem
        with pytest.raises(CorruptArtifact, match=r"adapter_model\.safetensors"):
            store.fetch(manifest.sha256, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
        assert {path.name for path in tmp_path.iterdir()} <= {"adapter", "store", "other"}

    def test_a_truncated_a_grown_and_a_missing_blob_are_caught(
        self, bytes_of: StoredBytes, directory: Path, tmp_path: Path
    ) -> None:
        store = bytes_of.store
        manifest = store.put(directory)
        by_path = {file.path: file for file in manifest.files}
        bytes_of.write_blob(by_path["adapter_model.safetensors"].sha256, b"short")
        bytes_of.write_blob(by_path["empty"].sha256, b"no longer")
        bytes_of.remove_blob(by_path["adapter_config.json"].sha256)
        problems = store.verify(manifest.sha256)
        assert len(problems) == 3
        assert "missing" in next(p for p in problems if p.startswith("adapter_config.json"))
        assert "5 bytes" in next(p for p in problems if p.startswith("adapter_model.safetensors"))
        with pytest.raises(CorruptArtifact, match="missing"):
            store.fetch(manifest.sha256, tmp_path / "copy")
        bytes_of.write_blob(by_path["adapter_config.json"].sha256, b'{"r": 8}')
        with pytest.raises(CorruptArtifact, match="checksum"):
            store.fetch(manifest.sha256, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()

    def test_a_changed_manifest_is_caught(self, bytes_of: StoredBytes, directory: Path, tmp_path: Path) -> None:
        store = bytes_of.store
        manifest = store.put(directory)
        bytes_of.write_manifest(manifest.sha256, Manifest(manifest.files[:1]).to_json().encode())
        for act in (store.manifest, lambda a: store.fetch(a, tmp_path / "copy")):
            with pytest.raises(CorruptArtifact):
                act(manifest.sha256)
        assert store.verify(manifest.sha256) != []

    @pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "a/../../evil", "a//b", ".", "", "nul\0", "a\\b", "a\nb"])
    def test_a_hostile_manifest_writes_nothing(
        self, bytes_of: StoredBytes, directory: Path, tmp_path: Path, path: str
    ) -> None:
        store = bytes_of.store
        stored = store.put(directory).files[0]
        hostile = Manifest((StoredFile(path, stored.size, stored.sha256),))
        bytes_of.write_manifest(hostile.sha256, hostile.to_json().encode())
        before = contents(tmp_path)
        with pytest.raises(CorruptArtifact):
            store.fetch(hostile.sha256, tmp_path / "in" / "copy")
        assert store.verify(hostile.sha256) != []
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("content", [b"\xff", b"", b"null", b'{"files":[],"format":1}', b"[" * 100_000])
    def test_a_manifest_that_is_none_is_corrupt(self, bytes_of: StoredBytes, content: bytes) -> None:
        bytes_of.write_manifest(sha256(content), content)
        with pytest.raises(CorruptArtifact):
            bytes_of.store.manifest(sha256(content))

    def test_a_manifest_in_another_spelling_is_corrupt(self, bytes_of: StoredBytes, directory: Path) -> None:
        text = bytes_of.store.put(directory).to_json().encode()
        for spelling in (text + b"\n", text.replace(b",", b", "), text.replace(b'"path":"empty"', b'"path":"\xff"')):
            bytes_of.write_manifest(sha256(spelling), spelling)
            with pytest.raises(CorruptArtifact):
                bytes_of.store.manifest(sha256(spelling))

    def test_put_mends_a_damaged_blob(self, bytes_of: StoredBytes, directory: Path) -> None:
        store = bytes_of.store
        manifest = store.put(directory)
        for file in manifest.files:
            bytes_of.write_blob(file.sha256, b"x" * file.size + b"y")
        assert len(store.verify(manifest.sha256)) == len(manifest.files)
        store.put(directory)
        assert store.verify(manifest.sha256) == []

    @pytest.mark.parametrize("part", ["_write_blob", "_write_manifest"])
    def test_a_store_that_does_not_keep_what_it_is_given_is_found_out(
        self, bytes_of: StoredBytes, directory: Path, monkeypatch: pytest.MonkeyPatch, part: str
    ) -> None:
        store = bytes_of.store
        write = getattr(store, part)

        def write_on_a_failing_disk(name: str, *content) -> None:  # type: ignore[no-untyped-def]
            write(name, *content)
            size = len(content[0]) if part == "_write_manifest" else content[0]
            getattr(bytes_of, part.removeprefix("_"))(name, b"\0" * size)

        monkeypatch.setattr(store, part, write_on_a_failing_disk)
        with pytest.raises(ServiceUnavailable, match="did not keep"):
            store.put(directory)
        monkeypatch.undo()
        manifest = store.put(directory)
        assert store.verify(manifest.sha256) == []

    def test_delete_keeps_the_blobs_that_others_use(self, bytes_of: StoredBytes, directory: Path) -> None:
        store = bytes_of.store
        first = store.put(directory)
        (directory / "adapter_config.json").write_text('{"r": 16}')
        second = store.put(directory)
        store.delete(first.sha256)
        assert not store.contains(first.sha256)
        assert store.verify(second.sha256) == []
        assert bytes_of.blobs() == {file.sha256 for file in second.files}
        store.delete(second.sha256)
        assert bytes_of.blobs() == set() and list(store.artifacts()) == []

    def test_delete_spares_blobs_while_another_manifest_cannot_be_read(
        self, bytes_of: StoredBytes, directory: Path
    ) -> None:
        store = bytes_of.store
        first = store.put(directory)
        (directory / "adapter_config.json").write_text('{"r": 16}')
        second = store.put(directory)
        bytes_of.write_manifest(second.sha256, b"{")
        store.delete(first.sha256)
        assert {file.sha256 for file in second.files} <= bytes_of.blobs()
        bytes_of.write_manifest(second.sha256, second.to_json().encode())
        assert store.verify(second.sha256) == []
        assert store.sweep(EVERYTHING) == 1
        assert bytes_of.blobs() == {file.sha256 for file in second.files}

    def test_sweep_takes_old_orphans_only(self, bytes_of: StoredBytes, directory: Path) -> None:
        store = bytes_of.store
        manifest = store.put(directory)
        bytes_of.write_blob(sha256(b"orphan"), b"orphan")
        assert store.sweep() == 0
        assert sha256(b"orphan") in bytes_of.blobs()
        assert store.sweep(EVERYTHING) == 1
        assert bytes_of.blobs() == {file.sha256 for file in manifest.files}

    def test_repair_restores_what_is_missing_or_changed(
        self, bytes_of: StoredBytes, other_bytes_of: StoredBytes, directory: Path
    ) -> None:
        store, source = bytes_of.store, other_bytes_of.store
        manifest = store.put(directory)
        source.put(directory)
        assert store.repair(manifest.sha256, source) == []
        by_path = {file.path: file for file in manifest.files}
        bytes_of.remove_blob(by_path["adapter_config.json"].sha256)
        bytes_of.write_blob(by_path["adapter_model.safetensors"].sha256, b"rubbish")
        bytes_of.write_manifest(manifest.sha256, b"rubbish")
        restored = store.repair(manifest.sha256, source)
        assert len(restored) == 3
        assert store.verify(manifest.sha256) == []

    def test_repair_takes_nothing_corrupt_and_restores_the_rest(
        self, bytes_of: StoredBytes, other_bytes_of: StoredBytes, directory: Path
    ) -> None:
        store, source = bytes_of.store, other_bytes_of.store
        manifest = store.put(directory)
        source.put(directory)
        by_path = {file.path: file for file in manifest.files}
        config, weights = by_path["adapter_config.json"], by_path["adapter_model.safetensors"]
        bytes_of.remove_blob(config.sha256)
        bytes_of.remove_blob(weights.sha256)
        other_bytes_of.write_blob(weights.sha256, bytes(weights.size))
        with pytest.raises(CorruptArtifact, match=r"adapter_model\.safetensors"):
            store.repair(manifest.sha256, source)
        assert config.sha256 in bytes_of.blobs() and weights.sha256 not in bytes_of.blobs()
        with pytest.raises(NotFound):
            source.repair(sha256(b"nowhere"), store)

    def test_fetch_refuses_a_destination_in_use(self, bytes_of: StoredBytes, directory: Path, tmp_path: Path) -> None:
        store = bytes_of.store
        manifest = store.put(directory)
        (tmp_path / "empty").mkdir()
        store.fetch(manifest.sha256, tmp_path / "empty")
        before = contents(tmp_path)
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        for occupied in (tmp_path / "empty", directory / "adapter_config.json", tmp_path / "link"):
            with pytest.raises(Conflict):
                store.fetch(manifest.sha256, occupied)
        assert contents(tmp_path) == before

    def test_put_refuses_links_special_files_odd_names_and_nothing(
        self, bytes_of: StoredBytes, directory: Path, tmp_path: Path
    ) -> None:
        store = bytes_of.store
        (tmp_path / "secret").write_text("s")
        offers = {
            "a link to a file": lambda d: (d / "f").symlink_to(tmp_path / "secret"),
            "a link to a folder": lambda d: (d / "f").symlink_to(tmp_path, target_is_directory=True),
            "a pipe": lambda d: os.mkfifo(d / "f"),
            "a newline": lambda d: (d / "a\nb").write_text("x"),
            "a backslash": lambda d: (d / "a\\b").write_text("x"),
            "not UTF-8": lambda d: Path(os.fsdecode(os.fsencode(d) + b"/\xff")).write_text("x"),
            "nothing": lambda d: None,
        }
        for name, offer in offers.items():
            offered = tmp_path / "offers" / name
            offered.mkdir(parents=True)
            offer(offered)
            with pytest.raises(InvalidInput):
                store.put(offered)
        with pytest.raises(NotFound):
            store.put(tmp_path / "nowhere")
        assert list(store.artifacts()) == [] and bytes_of.blobs() == set()

    @pytest.mark.parametrize("size", [1000, 2 * PARTS + 3])
    def test_a_file_that_changes_while_it_is_stored_is_not_stored(
        self, bytes_of: StoredBytes, directory: Path, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        store = bytes_of.store
        victim = directory / "zzz"
        victim.write_bytes(bytes(size))
        write = store._write_blob

        def write_while_somebody_else_does(digest: str, size: int, chunks) -> None:  # type: ignore[no-untyped-def]
            with victim.open("r+b") as file:
                file.write(b"changed")
            write(digest, size, chunks)

        monkeypatch.setattr(store, "_write_blob", write_while_somebody_else_does)
        with pytest.raises(Conflict, match="zzz"):
            store.put(directory)
        assert list(store.artifacts()) == []
        assert sha256(bytes(size)) not in bytes_of.blobs()

    def test_a_deletion_in_between_takes_nothing_from_a_put(
        self, bytes_of: StoredBytes, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = bytes_of.store
        old = store.put(directory)
        (directory / "new").write_text("new")
        lock, deleted = store._lock, []

        def lock_after_a_deletion():  # type: ignore[no-untyped-def]
            if not deleted:
                deleted.append(True)
                store.delete(old.sha256)
            return lock()

        monkeypatch.setattr(store, "_lock", lock_after_a_deletion)
        new = store.put(directory)
        assert deleted and not store.contains(old.sha256)
        assert store.verify(new.sha256) == []

    def test_many_may_put_the_same_at_once(self, bytes_of: StoredBytes, directory: Path) -> None:
        start = threading.Barrier(4)

        def put(_: int) -> Manifest:
            start.wait()
            return bytes_of.store.put(directory)

        with ThreadPoolExecutor(4) as pool:
            manifests = set(pool.map(put, range(4)))
        assert len(manifests) == 1
        assert bytes_of.store.verify(manifests.pop().sha256) == []
        assert bytes_of.store.sweep(EVERYTHING) == 0

    def test_manifests_are_plain_json(self, bytes_of: StoredBytes, directory: Path) -> None:
        manifest = bytes_of.store.put(directory)
        document = json.loads(manifest.to_json())
        assert [entry["path"] for entry in document["files"]] == sorted(contents(directory))
        assert Manifest.from_json(manifest.to_json()) == manifest
