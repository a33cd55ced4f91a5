"""The artifact store in S3, against a real SeaweedFS server."""

import itertools
import time
import traceback
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

import registry.s3_store as s3_store
from infra.errors import Conflict, NotFound, ServiceUnavailable
from infra.object_storage import s3_client
from infra.settings import Settings
from registry.artifacts import open_artifact_store
from registry.local_store import LocalArtifactStore
from registry.s3_store import S3ArtifactStore
from tests.registry.artifact_store_contract import EVERYTHING, PARTS, ArtifactStoreContract, StoredBytes, sha256
from tests.services import S3Server, free_ports, s3_server

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def settings_of(server: S3Server, **changes: Any) -> Settings:
    values = {
        "s3_endpoint_url": server.endpoint,
        "s3_access_key_id": SecretStr(server.access_key_id),
        "s3_secret_access_key": SecretStr(server.secret_access_key),
        "artifact_store": f"s3://{server.bucket}/{uuid.uuid4().hex}",
    }
    return Settings(**{**values, **changes})


class BucketBytes(StoredBytes):
    def __init__(self, server: S3Server) -> None:
        self.client = s3_client(settings_of(server))
        self.bucket, self.prefix = server.bucket, uuid.uuid4().hex
        self.store = S3ArtifactStore(self.client, self.bucket, self.prefix)

    def keys(self, kind: str) -> list[str]:
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.prefix}/{kind}")
        return [entry["Key"] for entry in listed.get("Contents", [])]

    def blobs(self) -> set[str]:
        return {key.rsplit("/", 1)[-1] for key in self.keys("blobs/")}

    def write_blob(self, sha256: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/blobs/{sha256[:2]}/{sha256}", Body=content)

    def remove_blob(self, sha256: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/blobs/{sha256[:2]}/{sha256}")

    def write_manifest(self, sha256: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/manifests/{sha256}.json", Body=content)


class TestS3Store(ArtifactStoreContract):
    @pytest.fixture
    def bytes_of(self, server: S3Server) -> BucketBytes:
        return BucketBytes(server)

    @pytest.fixture
    def other_bytes_of(self, server: S3Server) -> BucketBytes:
        return BucketBytes(server)

    def test_a_large_file_goes_up_in_parts_and_a_small_one_whole(self, bytes_of: BucketBytes, directory: Path) -> None:
        (directory / "large").write_bytes(bytes(range(256)) * (PARTS // 128))
        manifest = bytes_of.store.put(directory)
        etags = {}
        for file in manifest.files:
            key = f"{bytes_of.prefix}/blobs/{file.sha256[:2]}/{file.sha256}"
            etags[file.path] = bytes_of.client.head_object(Bucket=bytes_of.bucket, Key=key)["ETag"].strip('"')
        assert etags.pop("large").endswith("-2")
        assert all("-" not in etag for etag in etags.values())

    def test_a_put_leaves_no_lock_and_no_half_upload(self, bytes_of: BucketBytes, directory: Path) -> None:
        bytes_of.store.put(directory)
        assert {key.split("/")[1] for key in bytes_of.keys("")} == {"blobs", "manifests"}
        assert "Uploads" not in bytes_of.client.list_multipart_uploads(Bucket=bytes_of.bucket, Prefix=bytes_of.prefix)

    def test_an_upload_that_fails_midway_leaves_nothing(self, bytes_of: BucketBytes) -> None:
        def chunks() -> Iterator[bytes]:
            for _ in range(20):
                yield bytes(1 << 20)
            raise Conflict("the source went away")

        name = sha256(b"never whole")
        with pytest.raises(Conflict, match="went away"):
            bytes_of.store._write_blob(name, 30 << 20, chunks())
        assert bytes_of.keys("") == []
        assert "Uploads" not in bytes_of.client.list_multipart_uploads(Bucket=bytes_of.bucket, Prefix=bytes_of.prefix)

    def test_sweep_aborts_half_uploads_but_not_those_of_living_writers(self, bytes_of: BucketBytes) -> None:
        key = f"{bytes_of.prefix}/blobs/00/{'0' * 64}"
        bytes_of.client.create_multipart_upload(Bucket=bytes_of.bucket, Key=key)
        assert bytes_of.store.sweep() == 0
        assert bytes_of.store.sweep(EVERYTHING) == 1
        assert "Uploads" not in bytes_of.client.list_multipart_uploads(Bucket=bytes_of.bucket, Prefix=bytes_of.prefix)

    def test_the_lock_admits_one_at_a_time(self, bytes_of: BucketBytes) -> None:
        inside: list[int] = []
        most = itertools.count()

        def visit(number: int) -> int:
            with bytes_of.store._lock() as still_held:
                inside.append(number)
                next(most)
                time.sleep(0.02)
                still_held()
                seen = len(inside)
                inside.remove(number)
            return seen

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(visit, range(12))) == {1}
        assert next(most) == 12
        assert bytes_of.keys("lock") == []

    def test_the_lock_of_a_dead_holder_runs_out(
        self, bytes_of: BucketBytes, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bytes_of.client.put_object(Bucket=bytes_of.bucket, Key=f"{bytes_of.prefix}/lock", Body=b"a dead holder's")
        monkeypatch.setattr(s3_store, "LEASE", timedelta(seconds=2))
        manifest = bytes_of.store.put(directory)
        assert bytes_of.store.verify(manifest.sha256) == []
        assert bytes_of.keys("lock") == []

    def test_whoever_held_the_lock_too_long_may_not_go_on(
        self, bytes_of: BucketBytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with bytes_of.store._lock() as still_held:
            still_held()
            monkeypatch.setattr(s3_store, "LEASE", timedelta(0))
            with pytest.raises(Conflict):
                still_held()

    def test_two_prefixes_do_not_see_each_other(
        self, bytes_of: BucketBytes, other_bytes_of: BucketBytes, directory: Path
    ) -> None:
        manifest = bytes_of.store.put(directory)
        assert list(other_bytes_of.store.artifacts()) == []
        assert not other_bytes_of.store.contains(manifest.sha256)
        assert other_bytes_of.store.sweep(EVERYTHING) == 0
        assert bytes_of.store.verify(manifest.sha256) == []

    def test_more_artifacts_than_a_page_are_all_listed(self, bytes_of: BucketBytes) -> None:
        names = {sha256(str(number).encode()) for number in range(1050)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: bytes_of.write_manifest(name, b"{}"), names))
        assert set(bytes_of.store.artifacts()) == names

    def test_a_folder_is_repaired_from_a_bucket(self, bytes_of: BucketBytes, directory: Path, tmp_path: Path) -> None:
        manifest = bytes_of.store.put(directory)
        folder = LocalArtifactStore(tmp_path / "store")
        assert len(folder.repair(manifest.sha256, bytes_of.store)) == len(manifest.files) + 1
        assert folder.verify(manifest.sha256) == []


def test_the_setting_opens_the_bucket(server: S3Server, tmp_path: Path) -> None:
    settings = settings_of(server)
    store = open_artifact_store(settings)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_text("x")
    manifest = store.put(tmp_path / "a")
    assert store.url == settings.artifact_store
    assert open_artifact_store(settings).verify(manifest.sha256) == []


def test_errors_name_the_remedy_and_never_the_secret(server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_text("x")
    secret = "another-secret-that-must-never-be-printed"
    (dead_port,) = free_ports(1)
    dead = f"http://user:{secret}@127.0.0.1:{dead_port}"
    for changes, error, words in [
        ({"s3_secret_access_key": SecretStr(secret)}, ServiceUnavailable, "credentials"),
        ({"s3_access_key_id": SecretStr(secret)}, ServiceUnavailable, "credentials"),
        ({"artifact_store": "s3://no-such-bucket/x"}, NotFound, "no bucket 'no-such-bucket'"),
        ({"s3_endpoint_url": dead, "s3_secret_access_key": SecretStr(secret)}, ServiceUnavailable, "does not answer"),
    ]:
        settings = settings_of(server, **changes)
        bucket, prefix = settings.artifacts.removeprefix("s3://").split("/")
        store = S3ArtifactStore(s3_client(settings, attempts=1), bucket, prefix)
        for act in (
            lambda store=store: store.put(tmp_path / "a"),
            lambda store=store: store.manifest("0" * 64),
            lambda store=store: list(store.artifacts()),
            lambda store=store: store.sweep(),
            lambda store=store: store.delete("0" * 64),
        ):
            with pytest.raises(error, match=words) as caught:
                act()
            printed = "".join(traceback.format_exception(caught.value))
            assert secret not in printed and server.secret_access_key not in printed
