"""The one `Settings`: where Regraft keeps things and which servers it talks to.

Order of precedence: arguments, `REGRAFT_*` environment variables, `regraft.toml` (the file named by `REGRAFT_CONFIG`,
else the nearest one from the working directory upwards, else `$REGRAFT_HOME/regraft.toml`), embedded defaults.
"""

import getpass
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from infra.documents import did_you_mean
from infra.errors import InvalidInput

# Set by Regraft itself, for its own processes.
_PREFIX = "REGRAFT_"
_OTHER_VARIABLES = ["CONFIG", "DEBUG", "SERVER"]


def default_home() -> Path:
    """`$XDG_DATA_HOME/regraft`, or `~/.local/share/regraft`."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "regraft"


def _logged_in_as() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user id has no name
        return f"uid {os.getuid()}"


def configuration_file() -> Path | None:
    """The `regraft.toml` in force, or None."""
    if named := os.environ.get("REGRAFT_CONFIG"):
        return Path(named)
    here = Path.cwd()
    home = Path(os.environ.get("REGRAFT_HOME") or default_home())
    candidates = [directory / "regraft.toml" for directory in (here, *here.parents, home)]
    return next((path for path in candidates if path.is_file()), None)


class Settings(BaseSettings):
    """Where things are kept and which servers are used. Every field has an embedded default."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="forbid", frozen=True)

    home: Path = Field(default_factory=default_home, description="Root of everything that is kept locally.")
    database_url: SecretStr | None = Field(None, description="SQLAlchemy URL of the registry. Default: SQLite in home.")
    mlflow_tracking_uri: SecretStr | None = Field(None, description="MLflow store or server. Default: SQLite in home.")
    artifact_store: str | None = Field(None, description="Folder or s3://BUCKET/PREFIX. Default: folder in home.")
    s3_endpoint_url: str | None = Field(None, description="For S3 servers other than AWS.")
    s3_region: str = "us-east-1"
    s3_access_key_id: SecretStr | None = None
    s3_secret_access_key: SecretStr | None = None
    prefect_api_url: str | None = Field(None, description="A Prefect server. Default: one local server, on demand.")
    ray: str | None = Field(
        None,
        description="A Ray cluster that a fleet's migrations and Flower's clients are spread over: local:2 (so many "
        "worker processes here), auto, or ray://HOST:10001. Default: migrations one after the other, in one process.",
    )
    gpu_slots: Annotated[int, Field(ge=1)] = 1
    protected_aliases: Annotated[tuple[str, ...], NoDecode] = Field(
        ("production",), description="Aliases that move only through a passing gate."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads for training. Default: torch's choice.")
    actor: str = Field(default_factory=lambda: _logged_in_as(), description="Named in audit logs.")

    @field_validator("ray")
    @classmethod
    def _is_a_cluster(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"local:[1-9]\d*|auto|ray://.+", value):
            raise ValueError("give local:N, auto or ray://HOST:PORT")
        return value

    @field_validator("protected_aliases", mode="before")
    @classmethod
    def _comma_separated(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then environment, then `regraft.toml`."""
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, configuration_file())

    @property
    def registry_url(self) -> str:
        """SQLAlchemy URL of the registry's tables, password included: never log it."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.home / 'registry.db'}"

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking and registry URI, password included: never log it."""
        if self.mlflow_tracking_uri is not None:
            return self.mlflow_tracking_uri.get_secret_value()
        return f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def artifacts(self) -> str:
        """Root of the content-addressed store: a folder or an s3:// URL."""
        return self.artifact_store or str(self.home / "artifacts")

    @property
    def base_models(self) -> Path:
        """Cache of converted base-model weights."""
        return self.home / "base_models"

    @property
    def runs(self) -> Path:
        """Working directories of trainings: checkpoints, logs."""
        return self.home / "runs"

    @property
    def starts(self) -> Path:
        """Initialisations of adapters that took long to compute."""
        return self.home / "starts"

    @property
    def services(self) -> Path:
        """Process and port files, logs and data of the local servers."""
        return self.home / "services"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings in force, read once a process.

    Raises:
        InvalidInput: a variable or a key of `regraft.toml` that is unknown or malformed.
    """
    source = configuration_file()
    if source is not None and not source.is_file():
        raise InvalidInput(f"REGRAFT_CONFIG names {source}, which is not there.", "Create it or unset the variable.")
    known = [name.upper() for name in Settings.model_fields] + _OTHER_VARIABLES
    for name in os.environ:
        if name.startswith(_PREFIX) and (suffix := name.removeprefix(_PREFIX).upper()) not in known:
            raise InvalidInput(
                f"{name} is not a setting. {did_you_mean(suffix, known, _PREFIX)}", "Correct or unset the variable."
            )
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(map(_told, error.errors(include_input=False)))
        origin = f"environment (REGRAFT_*) or {source}" if source else "environment (REGRAFT_*)"
        raise InvalidInput(f"Settings are not usable: {problems}", f"Look at the {origin}.") from None
    except ValueError as error:  # malformed TOML
        raise InvalidInput(f"{source} is not valid TOML: {error}", "Mend the file, or move it away.") from None


def _told(problem: ErrorDetails) -> str:
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"{name} is not a setting. {did_you_mean(name, list(Settings.model_fields))}"
    return f"{name}: {problem['msg']}."
