"""How a command shows that it is at work."""

import pytest

from cli import session
from flows.progress import Stage


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
