"""Where a flow is: told to whoever listens in this process (a terminal's bar) and to Prefect (a progress artifact)."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_UPDATES = 3.0  # each is a request to the server

Listener = Callable[["Progress"], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` units of a stage."""

    stage: str
    done: int
    total: int
    note: str = ""


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within it, every stage of every flow called in this process reports to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Stage:
    """One stage of a flow run. Call it with what is done so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._artifact: UUID | None = None
        self._updated = 0.0
        self._warned = False

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report `done` of `total`; Prefect hears of it every few seconds, the listener each time."""
        if listener := _listener.get():
            listener(Progress(self.name, done, total, note))
        if FlowRunContext.get() is None:
            return
        now = time.monotonic()
        if self._artifact is None or done >= total or now - self._updated > _SECONDS_BETWEEN_UPDATES:
            self._updated = now
            try:
                self._tell_prefect(100.0 * done / max(1, total))
            except httpx.HTTPError as error:  # hours of work do not end because a page cannot show how far they are
                if not self._warned:
                    logger.warning("Prefect is not told how far '%s' is: %s", self.name, error)
                self._warned = True

    def _tell_prefect(self, percent: float) -> None:
        if self._artifact is None:
            created = create_progress_artifact(percent, description=self.name)
            assert isinstance(created, UUID)
            self._artifact = created
        else:
            update_progress_artifact(self._artifact, percent)
