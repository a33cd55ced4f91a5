"""Environment variables that keep Prefect and MLflow quiet, private, and inside Regraft's home."""

import os
from pathlib import Path

from infra.settings import Settings

NO_TELEMETRY = {"DO_NOT_TRACK": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def prefect_home(settings: Settings) -> Path:
    """Where Prefect keeps its database, its results and its memory."""
    return settings.home / "prefect"


def mlflow_artifact_root(settings: Settings) -> Path:
    """Where MLflow keeps run artifacts when it has no server that decides."""
    return settings.home / "mlflow"


def prefect_client_environment(settings: Settings, api_url: str) -> dict[str, str]:
    """What a process that talks to a Prefect server at `api_url` needs."""
    return {
        **NO_TELEMETRY,
        "PREFECT_API_URL": api_url,
        "PREFECT_HOME": str(prefect_home(settings)),
        # Never a hidden in-process server: a missing one is an error with a name.
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_CLI_PROMPT": "false",
    }


def prefect_server_environment(settings: Settings, port: int) -> dict[str, str]:
    """What the local Prefect server needs: its SQLite database and a copy of its UI lie in Prefect's home."""
    home = prefect_home(settings)
    return {
        **NO_TELEMETRY,
        "PREFECT_HOME": str(home),
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_CLI_COLORS": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),  # Prefect's default writes into site-packages
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }


def mlflow_environment(settings: Settings) -> dict[str, str]:
    """What a process that opens an MLflow store, or talks to a server, needs."""
    quiet = {
        **NO_TELEMETRY,
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_DISABLE_AGENT_HINT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    if is_remote(settings.tracking_uri):
        return quiet
    # Read by MLflow where a client opens a database itself; without it, run artifacts land in ./mlruns of whatever
    # directory the command was given in.
    return {**quiet, "_MLFLOW_SERVER_ARTIFACT_ROOT": str(mlflow_artifact_root(settings))}


def mlflow_server_environment(settings: Settings, tracking_uri: str) -> dict[str, str]:
    """What the local MLflow server needs. The store goes here, not on the command line, where all users see it."""
    return {
        **mlflow_environment(settings),
        "MLFLOW_BACKEND_STORE_URI": tracking_uri,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": str(mlflow_artifact_root(settings)),
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # would start more processes; Prefect runs our jobs
        "PYTHONWARNINGS": "ignore",
    }


def is_remote(uri: str) -> bool:
    """Whether an MLflow tracking URI names a server rather than a database or folder that is opened in-process."""
    return uri.startswith(("http://", "https://", "databricks", "uc:"))


def inherited_environment() -> dict[str, str]:
    """The environment for a local server: this process's, less what was set for other Prefect and MLflow servers."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "_MLFLOW_"))}
