"""The artifact store in an S3 bucket, through boto3.

Wants a server that is strongly consistent and honours conditional writes (`If-None-Match`, `If-Match`), as AWS S3 and
SeaweedFS do.
"""

import io
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from boto3.s3.transfer import TransferConfig
from botocore.client import BaseClient
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

from infra.errors import Conflict, NotFound, ServiceUnavailable
from registry.artifacts import is_sha256, require_sha256
from registry.content_store import ContentAddressedStore
from registry.durable_files import CHUNK_BYTES

PART_BYTES = 8 << 20
MOST_PARTS = 10_000  # S3's own limit
KEYS_PER_DELETION = 1000  # S3's own limit
LEASE = timedelta(minutes=5)
_ABSENT = {"NoSuchKey", "404", "NotFound"}
_LOST_RACE = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403"}


class S3ArtifactStore(ContentAddressedStore):
    """Objects `PREFIX/blobs/aa/SHA256` and `PREFIX/manifests/SHA256.json`, and `PREFIX/lock` while it is held.

    Args:
        client: a boto3 S3 client.
        bucket: a bucket that exists.
        prefix: path within it, without slashes at its ends; empty for the bucket's root.

    Raises:
        ServiceUnavailable: the server does not answer or refuses the credentials, in any method.
        NotFound: there is no such bucket, in any method.
    """

    def __init__(self, client: BaseClient, bucket: str, prefix: str = "") -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    @property
    def url(self) -> str:
        """`s3://BUCKET/PREFIX`."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def artifacts(self) -> Iterator[str]:
        """The addresses of all artifacts."""
        for entry in self._list("manifests/"):
            name = entry["Key"].rsplit("/", 1)[-1].removesuffix(".json")
            if is_sha256(name):
                yield name

    def read_blob(self, sha256: str) -> Iterator[bytes]:
        """Stream a blob, unchecked; `NotFound` at the first chunk when it is not there."""
        with self._explained():
            try:
                body = self._client.get_object(Bucket=self._bucket, Key=self._blob(sha256))["Body"]
            except ClientError as error:
                if _code(error) in _ABSENT:
                    raise NotFound(f"Blob {sha256[:12]}… is not in {self.url}.") from None
                raise
            with body:
                yield from body.iter_chunks(CHUNK_BYTES)

    def _blob(self, sha256: str) -> str:
        return f"{self._prefix}blobs/{require_sha256(sha256)[:2]}/{sha256}"

    def _manifest_key(self, sha256: str) -> str:
        return f"{self._prefix}manifests/{require_sha256(sha256)}.json"

    def _blob_size(self, sha256: str) -> int | None:
        with self._explained():
            try:
                return int(self._client.head_object(Bucket=self._bucket, Key=self._blob(sha256))["ContentLength"])
            except ClientError as error:
                if _code(error) in _ABSENT:
                    return None
                raise

    def _write_blob(self, sha256: str, size: int, chunks: Iterable[bytes]) -> None:
        part = max(PART_BYTES, -(-size // MOST_PARTS))
        config = TransferConfig(multipart_threshold=part, multipart_chunksize=part, max_concurrency=4)
        with self._explained(), io.BufferedReader(_ChunkReader(chunks), CHUNK_BYTES) as stream:
            self._client.upload_fileobj(
                stream, self._bucket, self._blob(sha256), {"ContentType": "application/octet-stream"}, Config=config
            )

    def _read_manifest(self, sha256: str) -> bytes | None:
        with self._explained():
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._manifest_key(sha256))
                with answer["Body"] as body:
                    return bytes(body.read())
            except ClientError as error:
                if _code(error) in _ABSENT:
                    return None
                raise

    def _write_manifest(self, sha256: str, content: bytes) -> None:
        item = {"Key": self._manifest_key(sha256), "Body": content, "ContentType": "application/json"}
        if self._put_if(IfNoneMatch="*", **item) is None and self._read_manifest(sha256) != content:
            # Only one content belongs to this name; what stands there is corrupt.
            with self._explained():
                self._client.put_object(Bucket=self._bucket, **item)

    def _remove_manifest(self, sha256: str) -> None:
        with self._explained():
            self._client.delete_object(Bucket=self._bucket, Key=self._manifest_key(sha256))

    def _remove_blobs(self, sha256s: list[str]) -> None:
        for start in range(0, len(sha256s), KEYS_PER_DELETION):
            keys = [{"Key": self._blob(sha256)} for sha256 in sha256s[start : start + KEYS_PER_DELETION]]
            with self._explained():
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": keys, "Quiet": True})
            if errors := answer.get("Errors"):
                raise ServiceUnavailable(
                    f"{len(errors)} blobs could not be deleted from {self.url}: {errors[0]['Code']}."
                )

    def _blobs_older_than(self, age: timedelta) -> Iterator[str]:
        oldest_kept = self._server_time() - age
        for entry in self._list("blobs/"):
            name = entry["Key"].rsplit("/", 1)[-1]
            if is_sha256(name) and entry["LastModified"] <= oldest_kept:
                yield name

    def _sweep_unfinished(self, older_than: timedelta) -> int:
        oldest_kept = self._server_time() - older_than
        removed = 0
        with self._explained():
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=f"{self._prefix}blobs/"
            )
            for upload in [upload for page in pages for upload in page.get("Uploads", [])]:
                if upload["Initiated"] <= oldest_kept:
                    self._client.abort_multipart_upload(
                        Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                    removed += 1
        return removed

    @contextmanager
    def _lock(self) -> Iterator[Callable[[], None]]:
        """A lease: an object that only one can create. It runs out after `LEASE`, so a crash blocks nobody for long.

        Ages are differences of the server's own times; no clock of this machine is compared with another's.
        """
        etag, since = self._acquire(f"{self._prefix}lock")

        def still_held() -> None:
            if time.monotonic() - since > LEASE.total_seconds() / 2:  # half, for requests that are slow to arrive
                raise Conflict(
                    f"The lock of {self.url} was held for too long and may be lost.", "Run the command again."
                )

        try:
            yield still_held
        finally:
            with suppress(ClientError, BotoCoreError):  # it runs out by itself
                self._client.delete_object(Bucket=self._bucket, Key=f"{self._prefix}lock", IfMatch=etag)

    def _acquire(self, key: str) -> tuple[str, float]:
        """Create the lock, or take over one that has run out; returns its ETag and the time of asking."""
        token = uuid.uuid4().hex
        claim = {"Key": key, "Metadata": {"holder": token}, "Body": token.encode()}
        deadline = time.monotonic() + 2 * LEASE.total_seconds()
        pause = 0.05
        while True:
            since = time.monotonic()
            if etag := self._put_if(IfNoneMatch="*", **claim):
                return etag, since
            with self._explained():
                try:
                    holder = self._client.head_object(Bucket=self._bucket, Key=key)
                except ClientError as error:
                    if _code(error) in _ABSENT:
                        continue
                    raise
            if holder["Metadata"].get("holder") == token:  # the put had succeeded, but its answer was lost
                return str(holder["ETag"]), since
            since = time.monotonic()
            if _date(holder) - holder["LastModified"] > LEASE and (
                etag := self._put_if(IfMatch=holder["ETag"], **claim)
            ):
                return etag, since
            if time.monotonic() > deadline:
                raise Conflict(f"Others keep the lock of {self.url} held.", "Try again later.")
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _put_if(self, **request: Any) -> str | None:
        """A conditional put; the ETag, or None when the condition does not hold (any more)."""
        with self._explained():
            try:
                return str(self._client.put_object(Bucket=self._bucket, **request)["ETag"])
            except ClientError as error:
                if _code(error) in _LOST_RACE | _ABSENT:
                    return None
                raise

    def _server_time(self) -> datetime:
        with self._explained():
            return _date(self._client.head_bucket(Bucket=self._bucket))

    def _list(self, kind: str) -> Iterator[dict[str, Any]]:
        with self._explained():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + kind
            )
            for page in pages:
                yield from page.get("Contents", [])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn boto's errors into the project's; the originals, which may quote URLs and keys, are dropped."""
        try:
            yield
        except ClientError as error:
            code = _code(error)
            if code == "NoSuchBucket" or code in _ABSENT:  # where an object may be absent, that was dealt with
                raise NotFound(
                    f"There is no bucket '{self._bucket}'.", "Create it, or mend REGRAFT_ARTIFACT_STORE."
                ) from None
            if code in _REFUSED:
                raise ServiceUnavailable(
                    f"The S3 server refuses the credentials for {self.url} ({code}).",
                    "Check REGRAFT_S3_ACCESS_KEY_ID and REGRAFT_S3_SECRET_ACCESS_KEY, and what they may do.",
                ) from None
            raise ServiceUnavailable(f"The S3 server cannot serve {self.url} ({code}).", "Try again later.") from None
        except (BotoCoreError, HTTPClientError) as error:
            raise ServiceUnavailable(
                f"The S3 server of {self.url} does not answer ({type(error).__name__}).",
                "Check REGRAFT_S3_ENDPOINT_URL and that the server runs: regraft doctor",
            ) from None


class _ChunkReader(io.RawIOBase):
    """A readable stream over chunks of bytes; what their iterator raises comes out of `readinto`."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill what can be filled from the current chunk; 0 at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _date(answer: dict[str, Any]) -> datetime:
    """The server's time when it answered."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
