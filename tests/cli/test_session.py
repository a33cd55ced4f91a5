"""How a command shows that it is at work."""

import os
import signal
import time

import pytest

from cli import session
from flows.progress import Stage
from infra.errors import Interrupted, InvalidInput


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows its only element."""
    now = [100.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_is_written_now_and_then(capsys, seconds: list[float]) -> None:
    with session.live_progress():
        stage = Stage("train [counting]")
        for step in range(1, 121):
            seconds[0] += 1.0
            stage(step, 120, f"loss {1 / step:.3f}")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "· 0:10  train [counting]  10/120  loss 0.100",
        "· 0:40  train [counting]  40/120  loss 0.025",
        "· 1:10  train [counting]  70/120  loss 0.014",
        "· 1:40  train [counting]  100/120  loss 0.010",
    ]


def test_what_takes_a_moment_is_not_mentioned(capsys, seconds: list[float]) -> None:
    with session.live_progress():
        Stage("select")(3, 3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_says_what_is_left(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM)
    told = r"^The import was stopped; nothing was registered\.\nRun the same command again\."
    with pytest.raises(Interrupted, match=told), session.whole("The import", "nothing was registered"):
        os.kill(os.getpid(), number)
    told = r"^The kit was stopped; what is done is kept\.\nThe same command goes on from there\."
    with pytest.raises(Interrupted, match=told), session.resumable("The kit"):
        os.kill(os.getpid(), number)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_fails_because_of_a_stop_is_told_as_the_stop(number: signal.Signals) -> None:
    def cut_off() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            raise RuntimeError("this connection is in the middle of a commit")

    with pytest.raises(Interrupted, match="The study was stopped"), session.resumable("The study"):
        cut_off()


def test_what_fails_by_itself_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="disk"), session.resumable("The study"):
        raise RuntimeError("disk")
    with pytest.raises(InvalidInput, match="budget"), session.resumable("The study"):
        raise InvalidInput("That is no budget.", "Give a number.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_comes_where_nothing_can_be_raised_is_not_lost(number: signal.Signals) -> None:
    class Leaving:
        def __del__(self) -> None:
            signal.raise_signal(number)

    with pytest.raises(Interrupted, match="The study was stopped"), session.resumable("The study"):
        Leaving()
        time.sleep(30)
