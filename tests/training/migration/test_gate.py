"""A migrated adapter is held against the better of the old one and the bare target."""

import pytest

from training.migration.gate import Standing


@pytest.mark.parametrize(
    ("teacher", "bare", "student", "passes"),
    [
        (0.80, 0.10, 0.78, True),
        (0.80, 0.10, 0.775, False),
        (0.80, 0.90, 0.85, False),
        (0.80, 0.90, 0.88, True),
        (0.80, 0.10, 0.95, True),
    ],
)
def test_accuracy_may_fall_short_by_what_is_allowed(teacher: float, bare: float, student: float, passes: bool) -> None:
    assert Standing("s", "exact_match", teacher, bare, student).passes(0.02) is passes


def test_of_perplexity_less_is_better() -> None:
    assert Standing("s", "perplexity", 4.0, 9.0, 4.08).passes(0.02)
    assert not Standing("s", "perplexity", 4.0, 9.0, 4.1).passes(0.02)
    assert not Standing("s", "perplexity", 9.0, 4.0, 4.1).passes(0.02)
