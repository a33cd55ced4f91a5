"""Lists of inputs: what a model is shown, and what is read of what it writes."""

import pytest

from training.migration.listing import listing, parse
from training.migration.screening import Screen

SEEDS = ["I have a pear. How many things do I have?", "I have a cat and a drum. How many animals do I have?"]


def test_a_list_ends_where_its_next_item_begins() -> None:
    assert listing("object counting", SEEDS, 3) == (
        "5 examples of object counting:\n\n"
        "1. I have a pear. How many things do I have?\n"
        "2. I have a cat and a drum. How many animals do I have?\n"
        "3."
    )


@pytest.mark.parametrize(
    ("text", "ended", "items", "unfinished"),
    [
        (" one\n4. two\n5. thr", False, ("one", "two"), "thr"),
        (" one\n4. two\n5. three", True, ("one", "two", "three"), ""),
        (" one\n4. two\n\nThese were examples", False, ("one", "two"), ""),
        (" a list:\n1. x\n2. y\n4. two\n5. t", False, ("a list:\n1. x\n2. y", "two"), "t"),
        (" one\n5. skipped", False, (), "one\n5. skipped"),
        (" one\n4.\n5. three\n6. f", False, ("one", "three"), "f"),
        (" it costs 4. 50\n4. two\n5.", False, ("it costs 4. 50", "two"), ""),
        ("", False, (), ""),
        ("", True, (), ""),
    ],
)
def test_items_reach_to_the_next_number_of_the_list(
    text: str, ended: bool, items: tuple[str, ...], unfinished: str
) -> None:
    written = parse(text, SEEDS, ended=ended)
    assert (written.items, written.unfinished) == (items, unfinished)


def test_a_blank_line_is_part_of_an_item_where_seeds_have_some() -> None:
    written = parse(" a\n\nb\n3. c", ["x\n\ny"], ended=True)
    assert written.items == ("a\n\nb", "c")


def test_what_was_written_can_be_listed_and_read_again() -> None:
    items = ["Sort: b a", "Options:\n(A) x\n(B) y", "1. is a number"]
    text = listing("any", [*SEEDS, *items], 1).partition("\n3.")[2]
    assert parse(text, SEEDS).items == tuple(items)


def test_the_screen_keeps_each_input_once_and_says_why_it_drops_one() -> None:
    screen = Screen(SEEDS, longest=90)
    asked = "I have a bear, {}, a chisel, an axe and a donkey. How many animals do I have?"
    offered = {
        asked.format("two owls"): True,
        asked.format("two owls").upper(): False,  # the same, but for letter case
        asked.format("six owls"): False,  # near
        asked.format("a spanner"): True,
        SEEDS[0].replace(" a ", "  a "): False,
        asked.format("a spanner, a table and then a bench"): False,  # too long
        " ": False,
    }
    assert {item: screen.passes(item) for item in offered} == offered
    assert screen.dropped == {"duplicate": 1, "near duplicate": 1, "seed": 1, "over-long": 1, "empty": 1}


def test_what_was_dropped_does_not_keep_others_out() -> None:
    screen = Screen([], longest=10)
    assert not screen.passes("much too long an input")
    assert screen.passes("much too")


def test_short_inputs_with_another_word_are_different() -> None:
    screen = Screen([], None)
    expressions = ["not ( True ) and False is", "not ( True ) or False is", "not ( False ) and True is", "True is"]
    assert all(screen.passes(expression) for expression in expressions)
