import re
from itertools import permutations

from training.tasks.catalog import get_task

BEFORE = ("is to the left of", "finished ahead of", "is newer than", "cost less than")
AFTER = ("is to the right of", "finished behind", "is older than", "cost more than")
COUNTED = {"second": 1, "third": 2}


def test_answers_hold_in_the_only_order_that_the_clues_allow():
    items = get_task("logical_deduction").generate("train", 300, seed=1)
    sizes = set()
    for item in items:
        text, options = item.prompt.split("\nOptions:\n")
        opening, *clues = re.split(r"(?<=\.) ", text)
        things = [thing.lower() for thing in re.split(r", | and ", opening.rstrip(".").split(": ")[1])]
        sizes.add(len(things))
        orders = [order for order in permutations(things) if all(_holds(clue, order) for clue in clues)]
        assert len(orders) == 1, item
        labelled = dict(re.findall(r"^(\([A-Z]\)) (.*)$", options, re.M))
        true = [letter for letter, statement in labelled.items() if _holds(statement, orders[0])]
        assert true == [item.completion], item
        statement = labelled[item.completion]
        assert statement not in clues, "the answer is given away"
    assert sizes == {3, 4, 5}


def _holds(statement: str, order: tuple[str, ...]) -> bool:
    statement = statement.rstrip(".").lower()
    for phrase in (*BEFORE, *AFTER):
        if phrase in statement:
            one, other = (order.index(thing.strip()) for thing in statement.split(phrase))
            return one < other if phrase in BEFORE else one > other
    subject = next(thing for thing in order if re.match(rf"{thing} (is|are|finished)\b", statement))
    place = re.sub(r"^(is|are|finished) (the )?", "", statement.removeprefix(subject).strip())
    last = len(order) - 1
    if place in ("leftmost", "first", "newest", "cheapest"):
        return order.index(subject) == 0
    if place in ("rightmost", "last", "oldest", "most expensive"):
        return order.index(subject) == last
    if place in ("second from the right", "second-to-last", "second-oldest", "second-most expensive"):
        return order.index(subject) == last - 1
    ordinal = re.fullmatch(r"(second|third)(?: from the left|-newest|-cheapest)?", place)[1]
    return order.index(subject) == COUNTED[ordinal]
