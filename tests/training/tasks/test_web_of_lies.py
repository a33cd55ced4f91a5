import re
from itertools import product

from training.tasks.catalog import get_task


def test_answers_are_the_only_consistent_assignment():
    items = get_task("web_of_lies").generate("train", 300, seed=1)
    for item in items:
        *statements, question = re.split(r"(?<=[.?]) ", item.prompt)
        asked = re.fullmatch(r"Does (\w+) tell the truth\?", question)[1]
        first, *claims = statements
        known = re.fullmatch(r"(\w+) (tells the truth|lies)\.", first)
        said = [re.fullmatch(r"(\w+) says (\w+) (tells the truth|lies)\.", claim).groups() for claim in claims]
        people = [known[1], *(speaker for speaker, _, _ in said)]
        possible = set()
        for values in product((True, False), repeat=len(people)):
            honest = dict(zip(people, values, strict=True))
            if honest[known[1]] != (known[2] != "lies"):
                continue
            if all(honest[speaker] == (honest[subject] == (claim != "lies")) for speaker, subject, claim in said):
                possible.add(honest[asked])
        assert possible == {item.completion == "Yes"}, item
