import pytest
from pydantic import ValidationError

from infra.documents import parse
from infra.errors import InvalidInput
from training.evaluation.suite import Sampling, Suite


@pytest.mark.parametrize(
    ("suite", "title"),
    [
        (Suite(task="object_counting"), "object_counting/test"),
        (Suite(task="object_counting", shots=3), "object_counting/test-3shot"),
        (Suite(split="validation"), "letters/validation"),
        (Suite(name="smoke", task="navigate", shots=2), "smoke"),
        (Suite(task="python_functions", metric="pass@1"), "python_functions/test"),
        (Suite(task="python_functions", metric="pass@1", also=("pass@5",)), "python_functions/test-5programs"),
        (Suite(task="python_functions", shots=2, programs=9), "python_functions/test-2shot-9programs"),
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


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"metric": "pass@0"}, "'pass@K' with a number K"),
        ({"metric": "pass@k"}, "'pass@K' with a number K"),
        ({"metric": "pass@10", "programs": 5}, "pass@10 cannot be told from 5 programs an item; give at least 10"),
        ({"also": ["pass@3"], "programs": 2}, "pass@3 cannot be told from 2 programs"),
        ({"metric": "rougeL", "programs": 5}, "programs and temperature go with pass@K, not with rougeL"),
        ({"metric": "pass@1", "temperature": 0.2}, "one program an item is written greedily"),
        ({"metric": "pass@1", "also": ["bleu"]}, "also: bleu goes with metrics of the same answers, not with pass@1"),
        ({"metric": "bleu", "also": ["pass@1"]}, "also: pass@1 goes with metrics of the same answers, not with bleu"),
        ({"metric": "pass@1", "also": ["pass@1"]}, "named twice"),
    ],
)
def test_a_suite_says_what_is_wrong_with_its_programs(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        parse(Suite, wrong, "suite")


def test_one_program_is_greedy_and_several_are_sampled_as_hot_as_k_wants() -> None:
    assert Sampling().of([1]) == (1, 0.0)
    assert Sampling().of([1, 10]) == (10, 0.8)
    assert Sampling(programs=20).of([1]) == (20, 0.2)
    assert Sampling(programs=20, temperature=0.5).of([5]) == (20, 0.5)
