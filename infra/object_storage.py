"""S3 clients: AWS, or any server that speaks its protocol."""

import re
from typing import Any

from infra.errors import InvalidInput
from infra.settings import Settings

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def parse_s3_url(url: str) -> tuple[str, str]:
    """`s3://BUCKET/PREFIX` → `(BUCKET, PREFIX)`; the prefix carries no slash at either end and may be empty.

    Raises:
        InvalidInput: another scheme, a bucket name that S3 does not allow, or a prefix with empty, `.` or `..` parts.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.rstrip("/")
    unsafe = prefix and any(part in {"", ".", ".."} for part in prefix.split("/"))
    if scheme != "s3" or not _BUCKET.fullmatch(bucket) or ".." in bucket or unsafe or "?" in prefix or "#" in prefix:
        raise InvalidInput(f"{url!r} is not an address in S3.", "Write s3://BUCKET or s3://BUCKET/PREFIX.")
    return bucket, prefix


def s3_client(settings: Settings, *, attempts: int = 6) -> Any:
    """A boto3 S3 client; safe to share between threads. Nothing is connected yet.

    Credentials come from the settings, else from boto3's own chain (environment, profile, instance role).

    Args:
        settings: names the endpoint, region and credentials.
        attempts: tries of each request before it fails, backing off between them and slowing down when throttled.

    Raises:
        InvalidInput: only one half of the credentials is set.
    """
    if (settings.s3_access_key_id is None) != (settings.s3_secret_access_key is None):
        raise InvalidInput(
            "S3 credentials are half set.",
            "Set both s3_access_key_id and s3_secret_access_key, or neither to use the AWS credential chain.",
        )
    import boto3
    from botocore.config import Config

    own_server: dict[str, Any] = {}
    if settings.s3_endpoint_url is not None:
        # Servers other than AWS rarely resolve BUCKET.HOST, and many refuse the newer trailing checksums.
        own_server = {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    config = Config(
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "adaptive", "total_max_attempts": attempts},
        max_pool_connections=16,
        **own_server,
    )
    key, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    return boto3.session.Session().client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=key.get_secret_value() if key else None,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        config=config,
    )
