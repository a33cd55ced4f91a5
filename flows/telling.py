"""What Prefect is told beside the states of a run: work does not end because a page cannot show how far it is."""

import logging
from collections.abc import Callable

import httpx
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from infra.errors import ServiceUnavailable
from infra.prefect_client import revive_prefect
from infra.settings import get_settings

logger = logging.getLogger(__name__)

_RETRIES = 1  # seconds; Prefect's own five take a minute, in which no step is trained


def tell_prefect(what: str, tell: Callable[[], object]) -> bool:
    """Call `tell`, the local server brought back first if it has died; where it cannot be told, warn.

    Args:
        what: is not shown then, e.g. "the recipe of counting".
        tell: speaks to Prefect.

    Returns:
        whether Prefect has been told.
    """
    try:
        revive_prefect(get_settings())
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: _RETRIES}):
            tell()
    except (httpx.HTTPError, ServiceUnavailable) as error:
        reason = error.what if isinstance(error, ServiceUnavailable) else str(error)
        logger.warning("Prefect does not show %s: %s", what, reason)
        return False
    return True
