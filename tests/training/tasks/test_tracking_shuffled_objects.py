import re

from training.tasks.catalog import get_task


def test_answers_are_what_a_replay_of_the_swaps_finds():
    items = get_task("tracking_shuffled_objects").generate("train", 300, seed=1)
    for item in items:
        start = re.search(r"At the start, (.*?)\. Then pairs", item.prompt)[1]
        holds = dict(re.findall(r"(\w+) has an? (\w+ \w+)", start))
        for one, other in re.findall(r"(\w+) and (\w+) swap", item.prompt.split("Then pairs of them swap.")[1]):
            holds[one], holds[other] = holds[other], holds[one]
        asked = re.search(r"At the end, (\w+) has the\n", item.prompt)[1]
        options = dict(re.findall(r"^(\([A-Z]\)) (.*)$", item.prompt, re.M))
        assert options[item.completion] == holds[asked], item
        assert sorted(options.values()) == sorted(holds.values())
        assert tuple(options) == item.choices
