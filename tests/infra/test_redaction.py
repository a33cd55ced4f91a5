import pytest

from infra.redaction import redacted_url, without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ada:hunter2@db:5432/x", "postgresql://ada:***@db:5432/x"),
        ("postgresql+psycopg://ada:p@ss/w@db/x", "postgresql+psycopg://ada:***@db/x"),  # unescaped, still nothing leaks
        (
            "postgresql:///x?host=db&password=hunter2&sslmode=require",
            "postgresql:///x?host=db&password=***&sslmode=require",
        ),
        ("https://ada:hunter2@mlflow.example/path", "https://ada:***@mlflow.example/path"),
        ("https://mlflow.example:5000/path", "https://mlflow.example:5000/path"),
        ("https://example/?access_token=abc", "https://example/?access_token=***"),
        ("sqlite:////home/ada/registry.db", "sqlite:////home/ada/registry.db"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("/a/folder", "/a/folder"),
        ("", ""),
    ],
)
def test_redacted_url_hides_the_secrets_and_nothing_else(url: str, shown: str) -> None:
    assert redacted_url(url) == shown


def test_without_secrets_removes_a_password_in_any_spelling() -> None:
    url = "postgresql://ada:hun%2Fter2@db/x?sslpassword=s3cret"
    text = f"could not connect with hun/ter2, hun%2Fter2 or s3cret to {url}"
    assert without_secrets(text, url) == (
        "could not connect with ***, *** or *** to postgresql://ada:***@db/x?sslpassword=***"
    )
