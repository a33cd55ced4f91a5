"""Ctrl-C and SIGTERM as a wish to stop at the next safe point; a second one stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether a stop was asked for."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def awaited_interruption() -> Iterator[Interruption]:
    """Within it, the first SIGINT or SIGTERM only sets `requested`; the second acts as it did before.

    Outside the main thread, where Python allows no signal handlers, nothing is changed and nothing is ever requested.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def request(number: int, frame: FrameType | None) -> None:
        del number, frame
        interruption.requested = True
        restore()

    for number in previous:
        signal.signal(number, request)
    try:
        yield interruption
    finally:
        restore()
