"""Numbered lists: shown a few inputs as the first items of a list, a language model writes more of their kind.

    12 examples of object counting:

    1. I have a pear and two drums. How many things do I have?
    2. …
    6.

The list ends at a bare number (Trans-LoRA, section 3.2), so that models which never learned to chat go on with it, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

END_OF_LIST = "\n\n"


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote on a list.

    Attributes:
        items: those that it finished.
        unfinished: the last one, where it was cut off; nothing where it was not.
        complete: whether the list had come to its end.
    """

    items: tuple[str, ...]
    unfinished: str = ""
    complete: bool = False


def listing(name: str, seeds: Sequence[str], wanted: int) -> str:
    """The list that announces `wanted` items more than there are seeds, up to the number of the first of them.

    Args:
        name: of the task, in words.
        seeds: inputs; of several lines, where they have some.
        wanted: how many items are asked for.
    """
    numbered = [f"{number}. {seed}" for number, seed in enumerate(seeds, start=1)]
    return "\n".join([f"{len(seeds) + wanted} examples of {name}:", "", *numbered, f"{len(seeds) + 1}."])


def parse(text: str, seeds: Sequence[str], *, ended: bool = False) -> Written:
    """The items in what a model wrote after a list.

    An item reaches to the next number of the list, at the beginning of a line, so that numbers within an item do no
    harm. A blank line ends the list, unless seeds have some themselves.

    Args:
        text: what was written, from the first item's number on.
        seeds: the list that it was shown.
        ended: whether the model ended its text, so that the last item is whole.
    """
    if not any(END_OF_LIST in seed for seed in seeds):
        text, blank_line, _ = text.lstrip().partition(END_OF_LIST)
        ended = ended or bool(blank_line)
    items, number = [], len(seeds) + 2
    while True:
        item, mark, rest = text.partition(f"\n{number}.")
        if not mark:
            break
        items.append(item)
        text, number = rest, number + 1
    last = text.strip()
    if ended:
        items.append(last)
        last = ""
    return Written(tuple(item.strip() for item in items if item.strip()), last, ended)
