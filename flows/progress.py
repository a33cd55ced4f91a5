"""Where a flow is: told to whoever listens in this process (a terminal's bar) and to Prefect (a progress artifact)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext

from flows.telling import tell_prefect

_SECONDS_BETWEEN_UPDATES = 3.0  # each is a request to the server
_SECONDS_AFTER_A_FAILURE = 60.0

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
    """Within it, every stage of every flow called in this process reports to `listener`, and to who listened before."""
    before = _listener.get()

    def both(progress: Progress) -> None:
        listener(progress)
        if before:
            before(progress)

    token = _listener.set(both)
    try:
        yield
    finally:
        _listener.reset(token)


class Stage:
    """One stage of a flow run. Call it with what is done so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._artifact: UUID | None = None
        self._next_update = 0.0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report `done` of `total`; Prefect hears of it every few seconds, the listener each time."""
        if listener := _listener.get():
            listener(Progress(self.name, done, total, note))
        if FlowRunContext.get() is None:
            return
        now = time.monotonic()
        if now > self._next_update or done >= total:
            told = tell_prefect(f"how far '{self.name}' is", lambda: self._update(100.0 * done / max(1, total)))
            self._next_update = now + (_SECONDS_BETWEEN_UPDATES if told else _SECONDS_AFTER_A_FAILURE)

    def _update(self, percent: float) -> None:
        if self._artifact is None:
            created = create_progress_artifact(percent, description=self.name)
            assert isinstance(created, UUID)
            self._artifact = created
        else:
            update_progress_artifact(self._artifact, percent)
