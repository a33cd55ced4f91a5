"""Settings: which source wins, and how a mistake is told."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.errors import InvalidInput
from infra.settings import Settings, get_settings


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory and home without any regraft.toml; the settings are read anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("REGRAFT_CONFIG", raising=False)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def test_everything_is_embedded_by_default(tmp_path: Path) -> None:
    settings = get_settings()
    assert settings.registry_url == f"sqlite:///{tmp_path}/home/registry.db"
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/home/mlflow.db"
    assert settings.artifacts == f"{tmp_path}/home/artifacts"
    assert settings.prefect_api_url is None


def test_the_nearest_file_upwards_is_read_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "regraft.toml").write_text('gpu_slots = 4\nartifact_store = "s3://bucket/regraft"\n')
    inner = tmp_path / "project" / "deep"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert (get_settings().gpu_slots, get_settings().artifacts) == (4, "s3://bucket/regraft")
    get_settings.cache_clear()
    monkeypatch.setenv("REGRAFT_GPU_SLOTS", "2")
    assert get_settings().gpu_slots == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gpu_slot = 4\n", "gpu_slot is not a setting. Did you mean 'gpu_slots'?"),
        ("gpu_slots = 0\n", "gpu_slots"),
        ("gpu_slots = \n", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_names_key_and_file(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "regraft.toml").write_text(text)
    with pytest.raises(InvalidInput) as refused:
        get_settings()
    assert told in str(refused.value)
    assert "regraft.toml" in str(refused.value)


def test_a_variable_that_is_no_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_GPU_SLOT", "2")
    with pytest.raises(InvalidInput, match="Did you mean 'REGRAFT_GPU_SLOTS'"):
        get_settings()


def test_the_common_prefix_makes_no_word_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_FOO", "2")
    with pytest.raises(InvalidInput, match="Known: REGRAFT_ACTOR, "):
        get_settings()


def test_aliases_in_the_environment_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_PROTECTED_ALIASES", "production, canary")
    assert get_settings().protected_aliases == ("production", "canary")


def test_a_configuration_that_is_named_but_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_CONFIG", "/nowhere/regraft.toml")
    with pytest.raises(InvalidInput, match=r"/nowhere/regraft\.toml"):
        get_settings()


def test_no_password_is_shown_by_repr_or_in_an_error(tmp_path: Path) -> None:
    settings = Settings(database_url="postgresql://ada:sesame@db/regraft", s3_secret_access_key="sesame")
    assert "sesame" not in repr(settings)
    (tmp_path / "regraft.toml").write_text('database_url = "postgresql://ada:sesame@db/regraft"\ngpu_slots = 0\n')
    with pytest.raises(InvalidInput) as refused:
        get_settings()
    assert "sesame" not in str(refused.value)
