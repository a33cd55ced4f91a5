import re

from training.tasks.catalog import get_task


def test_answers_are_where_the_walk_ends():
    items = get_task("navigate").generate("train", 400, seed=1)
    styles = set()
    for item in items:
        place, heading = 0j, 1j
        always_forward = "Always face forward." in item.prompt
        styles.add(always_forward)
        walk = item.prompt.split("? ", 1)[1].split("\n")[0]
        for sentence in walk.removeprefix("Always face forward. ").split(". "):
            sentence = sentence.rstrip(".")
            if turn := re.fullmatch(r"Turn (left|right|around)", sentence):
                assert not always_forward
                heading *= {"left": 1j, "right": -1j, "around": -1}[turn[1]]
                continue
            steps, direction = re.fullmatch(r"Take (\d+) steps?( \w+)?", sentence).groups()
            way = {None: 1, " forward": 1, " backward": -1, " left": 1j, " right": -1j}[direction]
            place += int(steps) * heading * way
        assert item.completion == ("Yes" if place == 0 else "No"), item
    assert styles == {True, False}
