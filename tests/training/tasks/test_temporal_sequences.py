import re

from training.tasks.catalog import get_task


def test_answers_are_the_only_time_not_accounted_for():
    items = get_task("temporal_sequences").generate("train", 300, seed=1)
    for item in items:
        woke = _hour(re.search(r"woke up at (\w+)\.", item.prompt)[1])
        closed = _hour(re.search(r"was closed after (\w+)\.", item.prompt)[1])
        free = set(range(woke, closed))
        for start, end in re.findall(r" saw .* from (\w+) to (\w+)\.", item.prompt):
            busy = set(range(_hour(start), _hour(end)))
            assert busy <= free, "sightings overlap or leave the day"
            free -= busy
        options = dict(re.findall(r"^(\([A-Z]\)) (.*)$", item.prompt, re.M))
        possible = [
            letter
            for letter, span in options.items()
            if set(range(*(_hour(end) for end in span.split(" to ")))) <= free
        ]
        assert possible == [item.completion], item
        start, end = (_hour(end) for end in options[item.completion].split(" to "))
        assert free == set(range(start, end)), item
        assert len(set(options.values())) == 4


def _hour(clock: str) -> int:
    number, half = int(clock[:-2]), clock[-2:]
    return number % 12 + (12 if half == "pm" else 0)
