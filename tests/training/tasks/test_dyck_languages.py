from itertools import pairwise

from training.tasks.catalog import get_task

PAIRS = {")": "(", "]": "[", "}": "{", ">": "<"}


def test_answers_close_exactly_what_is_open():
    items = get_task("dyck_languages").generate("train", 400, seed=1)
    for item in items:
        given = item.prompt.split("Input: ")[1].split(" ")
        answer = item.completion.split(" ")
        assert answer and set(answer) <= set(PAIRS), item
        assert _reduced(given + answer) == [], item
        # Every closing bracket of the answer is needed: nothing shorter leaves no bracket open.
        assert len(_reduced(given)) == len(answer), item


def _reduced(sequence: list[str]) -> list[str]:
    """Cancels matching neighbours until none are left."""
    for position, (one, other) in enumerate(pairwise(sequence)):
        if PAIRS.get(other) == one:
            return _reduced(sequence[:position] + sequence[position + 2 :])
    return sequence
