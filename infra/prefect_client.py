"""Points Prefect, in this process and in those it starts, at the server of the settings."""

import os
import sys

from infra.environment import prefect_client_environment, prefect_home
from infra.services import LocalServices
from infra.settings import Settings


def configure_prefect(settings: Settings) -> str:
    """Choose the Prefect server, start the local one if need be, and make Prefect use it; returns its API URL.

    Best called before Prefect is imported, but works afterwards too: Prefect's settings and log levels are read anew.
    Inside a flow run, or under a test harness, Prefect already has a server, and that one stays.
    Console logs are limited to warnings (flow runs still send every log line to the server); set
    `PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL` to see more.

    Raises:
        ServiceUnavailable: the local server did not start, or the remote one does not answer.
    """
    if (given := _server_in_context()) is not None:
        return given
    api_url = LocalServices(settings).prefect_api_url()
    prefect_home(settings).mkdir(parents=True, exist_ok=True)
    os.environ.update(prefect_client_environment(settings, api_url))
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
    for name in ("PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):  # profiles of the user's own Prefect, absent in our home
        os.environ.pop(name, None)
    if settings.prefect_api_url is None:
        _bypass_proxies()
    if "prefect.context" in sys.modules:
        from prefect.context import refresh_global_settings_context
        from prefect.logging.configuration import setup_logging

        refresh_global_settings_context()
        setup_logging()
    return api_url


def revive_prefect(settings: Settings) -> None:
    """Start the local server again if it has died while this process works with it; any other one is left alone.

    Raises:
        ServiceUnavailable: it did not start.
    """
    from prefect.settings import get_current_settings

    services = LocalServices(settings)
    if settings.prefect_api_url is None and get_current_settings().api.url == services.last_prefect_api_url():
        services.prefect()


def _server_in_context() -> str | None:
    """The API URL that a flow run or a harness, which this code runs within, has set."""
    if "prefect.context" not in sys.modules:
        return None
    from prefect.context import FlowRunContext, SettingsContext, TaskRunContext
    from prefect.settings import get_current_settings

    within = SettingsContext.__var__.get(None) or FlowRunContext.get() or TaskRunContext.get()
    return get_current_settings().api.url if within is not None else None


def _bypass_proxies() -> None:
    """A proxy of the environment cannot reach this machine's 127.0.0.1."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = os.environ.get(name, "")
        if "127.0.0.1" not in hosts:
            os.environ[name] = f"{hosts},127.0.0.1".lstrip(",")
