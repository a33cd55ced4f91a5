import pytest
from pydantic import SecretStr

from infra.errors import InvalidInput
from infra.object_storage import parse_s3_url, s3_client
from infra.settings import Settings

KEYS = {"s3_access_key_id": SecretStr("key"), "s3_secret_access_key": SecretStr("secret")}


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/", ("bucket", "")),
        ("s3://my.bucket-1/a/b/", ("my.bucket-1", "a/b")),
    ],
)
def test_an_s3_url_is_a_bucket_and_a_prefix(url: str, parts: tuple[str, str]) -> None:
    assert parse_s3_url(url) == parts


@pytest.mark.parametrize(
    "url",
    [
        "bucket/prefix",
        "https://bucket/x",
        "s3://",
        "s3:///x",
        "s3://Bucket/x",
        "s3://b/x",
        "s3://bucket/../x",
        "s3://bucket/a//b",
    ],
)
def test_what_is_no_s3_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="not an address in S3"):
        parse_s3_url(url)


def presigned(settings: Settings) -> str:
    return s3_client(settings).generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"})


def test_a_server_of_ones_own_is_addressed_by_path() -> None:
    url = presigned(Settings(s3_endpoint_url="http://127.0.0.1:9", **KEYS))
    assert url.startswith("http://127.0.0.1:9/bucket/key?")


def test_aws_is_addressed_by_host_name_in_the_region() -> None:
    assert presigned(Settings(s3_region="eu-central-1", **KEYS)).split("?")[0].startswith("https://bucket.s3.")


def test_credentials_come_from_the_chain_when_the_settings_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-the-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "from-the-environment" in presigned(Settings(s3_endpoint_url="http://127.0.0.1:9"))


def test_half_of_the_credentials_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="half set"):
        s3_client(Settings(s3_access_key_id=SecretStr("key")))
