"""Manifests, and the artifact store in a folder."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import CorruptArtifact, InvalidInput, RegraftError, ServiceUnavailable
from infra.settings import Settings
from registry.artifacts import Manifest, StoredFile, open_artifact_store
from registry.local_store import LocalArtifactStore
from tests.forked import forked
from tests.registry.artifact_store_contract import EVERYTHING, ArtifactStoreContract, StoredBytes, contents, sha256


class FolderBytes(StoredBytes):
    def __init__(self, root: Path) -> None:
        self.root, self.store = root, LocalArtifactStore(root)

    def blobs(self) -> set[str]:
        return {path.name for path in (self.root / "blobs").rglob("*") if path.is_file()}

    def write_blob(self, sha256: str, content: bytes) -> None:
        self._overwrite(self.root / "blobs" / sha256[:2] / sha256, content)

    def remove_blob(self, sha256: str) -> None:
        (self.root / "blobs" / sha256[:2] / sha256).unlink()

    def write_manifest(self, sha256: str, content: bytes) -> None:
        self._overwrite(self.root / "manifests" / f"{sha256}.json", content)

    def _overwrite(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content)


class TestFolderStore(ArtifactStoreContract):
    @pytest.fixture
    def bytes_of(self, tmp_path: Path) -> FolderBytes:
        return FolderBytes(tmp_path / "store")

    @pytest.fixture
    def other_bytes_of(self, tmp_path: Path) -> FolderBytes:
        return FolderBytes(tmp_path / "other")

    def test_stored_files_are_read_only(self, bytes_of: FolderBytes, directory: Path) -> None:
        bytes_of.store.put(directory)
        files = [p for part in ("blobs", "manifests") for p in (bytes_of.root / part).rglob("*") if p.is_file()]
        assert files and all(path.stat().st_mode & 0o777 == 0o444 for path in files)

    def test_a_put_that_does_not_fit_says_so_and_leaves_nothing(self, bytes_of: FolderBytes, tmp_path: Path) -> None:
        (tmp_path / "large").mkdir()
        (tmp_path / "large" / "weights").write_bytes(os.urandom(300_000))
        program = """
            import resource, sys
            from pathlib import Path
            from infra.errors import ServiceUnavailable
            from registry.local_store import LocalArtifactStore
            store = LocalArtifactStore(Path(sys.argv[1]))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                store.put(Path(sys.argv[2]))
            except ServiceUnavailable as error:
                print(error)
        """
        command = [sys.executable, "-c", textwrap.dedent(program), str(bytes_of.root), str(tmp_path / "large")]
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
        assert "300,000 bytes are needed" in said and "are free" in said and str(bytes_of.root) in said
        assert [name for name in contents(bytes_of.root) if name != "lock"] == []

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_disk_that_fills_up_leaves_neither_a_blob_nor_a_half_fetched_directory(
        self, bytes_of: FolderBytes, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        manifest = bytes_of.store.put(directory)
        (directory / "more").write_text("more")
        before = contents(tmp_path)

        def no_room(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", no_room)
        with pytest.raises(ServiceUnavailable, match="are needed"):
            bytes_of.store.put(directory)
        with pytest.raises(ServiceUnavailable, match=f"{manifest.size_bytes:,} bytes are needed"):
            bytes_of.store.fetch(manifest.sha256, tmp_path / "copy")
        assert contents(tmp_path) == before and not (tmp_path / "copy").exists()

    def test_a_crash_at_any_file_operation_of_a_put_loses_and_breaks_nothing(
        self, directory: Path, tmp_path: Path
    ) -> None:
        (directory / "adapter_config.json").unlink()
        outcomes = set()
        for fatal in range(1, 1000):
            root = tmp_path / f"store{fatal}"
            store = LocalArtifactStore(root)
            (tmp_path / "first").mkdir(exist_ok=True)
            (tmp_path / "first" / "file").write_text("registered before")
            ready = store.put(tmp_path / "first")
            if not _dies_at_operation(fatal, lambda store=store: store.put(directory)):  # type: ignore[misc]
                break
            found = set(store.artifacts())
            assert ready.sha256 in found
            assert all(store.verify(artifact) == [] for artifact in found)
            outcomes.add(len(found))
            manifest = store.put(directory)
            store.sweep(EVERYTHING)
            assert store.verify(manifest.sha256) == [] and store.verify(ready.sha256) == []
            assert list((root / "temporary").iterdir()) == []
        assert outcomes == {1, 2}  # some died before the manifest and some after: the loop met the interesting places
        assert fatal > 20

    def test_sweep_leaves_the_temporary_files_of_living_writers(self, bytes_of: FolderBytes) -> None:
        old, young = bytes_of.root / "temporary" / "old", bytes_of.root / "temporary" / "young"
        old.write_bytes(b"half")
        young.write_bytes(b"half")
        two_days_ago = time.time() - timedelta(days=2).total_seconds()
        os.utime(old, (two_days_ago, two_days_ago))
        assert bytes_of.store.sweep() == 1
        assert not old.exists() and young.exists()
        assert bytes_of.store.sweep(EVERYTHING) == 1

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ServiceUnavailable, match=re.escape(str(tmp_path / "file"))):
            LocalArtifactStore(tmp_path / "file" / "store")


def _dies_at_operation(fatal: int, work) -> bool:  # type: ignore[no-untyped-def]
    """Run `work` in a child that is killed just before its `fatal`-th call that changes a file; whether it was."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in {"os.rename", "os.mkdir", "os.chmod", "os.remove"}:
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched() -> None:
        sys.addaudithook(hook)
        work()

    _, status = os.waitpid(forked(watched), 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


PATHS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
FILES = st.builds(StoredFile, PATHS, st.integers(0, 2**70), st.binary().map(sha256))


@given(st.lists(FILES, max_size=5))
def test_a_manifest_is_refused_or_comes_back_equal(files: list[StoredFile]) -> None:
    manifest = Manifest(tuple(sorted(files, key=lambda file: file.path)))
    try:
        again = Manifest.from_json(manifest.to_json())
    except CorruptArtifact:
        return
    assert again == manifest
    root = Path("/store/copy")
    assert all(os.path.normpath(root / file.path) == str(root / file.path) for file in again.files)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_json_breaks_the_manifest_reader(document: object) -> None:
    for text in (json.dumps(document), json.dumps({"format": 1, "files": document}), json.dumps({"format": document})):
        with pytest.raises(CorruptArtifact):
            Manifest.from_json(text)


GOOD = {"path": "a", "size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "files",
    [
        [],
        [GOOD, GOOD],
        [{**GOOD, "path": "b"}, GOOD],
        [GOOD, {**GOOD, "path": "a/b"}],
        [{**GOOD, "size": -1}],
        [{**GOOD, "size": True}],
        [{**GOOD, "size": 1.0}],
        [{**GOOD, "sha256": "0" * 63}],
        [{**GOOD, "sha256": 0}],
        [{**GOOD, "path": None}],
        [{**GOOD, "mode": 0o777}],
        [{"path": "a", "size": 1}],
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(files: list[dict[str, object]]) -> None:
    text = json.dumps({"files": files, "format": 1}, sort_keys=True, separators=(",", ":"))
    with pytest.raises(CorruptArtifact):
        Manifest.from_json(text)


def test_the_address_of_a_manifest_never_changes() -> None:
    manifest = Manifest((StoredFile("adapter_config.json", 2, sha256(b"{}")),))
    text = f'{{"files":[{{"path":"adapter_config.json","sha256":"{sha256(b"{}")}","size":2}}],"format":1}}'
    assert manifest.to_json() == text
    assert manifest.sha256 == sha256(text.encode())


def test_the_setting_opens_a_folder_and_refuses_other_urls(tmp_path: Path) -> None:
    store = open_artifact_store(Settings(home=tmp_path))
    assert store.url == str(tmp_path / "artifacts")
    with pytest.raises(InvalidInput, match="gs://"):
        open_artifact_store(Settings(home=tmp_path, artifact_store="gs://user:password@bucket"))


def test_a_folder_in_the_place_of_a_blob_is_a_problem_and_no_traceback(tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path / "store")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_text("x")
    manifest = store.put(tmp_path / "a")
    blob = next((tmp_path / "store" / "blobs").rglob(manifest.files[0].sha256))
    blob.unlink()
    blob.mkdir()  # a folder where a file should be
    assert store.verify(manifest.sha256) != []
    with pytest.raises(RegraftError):
        store.fetch(manifest.sha256, tmp_path / "copy")
