import pytest
from pydantic import ValidationError

from training.evaluation.suite import Suite


@pytest.mark.parametrize(
    ("suite", "title"),
    [
        (Suite(task="object_counting"), "object_counting/test"),
        (Suite(task="object_counting", shots=3), "object_counting/test-3shot"),
        (Suite(split="validation"), "letters/validation"),
        (Suite(name="smoke", task="navigate", shots=2), "smoke"),
    ],
)
def test_a_suite_says_what_it_is(suite: Suite, title: str) -> None:
    assert suite.title("letters") == title


@pytest.mark.parametrize(
    "wrong", [{"sample": 3}, {"samples": 0}, {"shots": -1}, {"split": "train"}, {"metric": "accuracy"}]
)
def test_a_suite_refuses_what_it_does_not_know(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Suite.model_validate(wrong)
