"""Seeds that stand for all examples; candidates drawn as the real inputs are distributed."""

import random
from collections import Counter
from math import log

import pytest
import torch

from training.data.example import Example
from training.migration.choosing import as_long, by_likeness, choose, deciles, spread
from training.migration.discriminator import calibrated


def test_seeds_are_short_and_long_and_have_different_answers() -> None:
    examples = [Example("x" * length, str(length // 30)) for length in range(1, 101)]
    random.Random(0).shuffle(examples)
    chosen = spread(examples, 5)
    assert [(len(example.prompt) - 1) // 20 for example in chosen] == [0, 1, 2, 3, 4]
    assert len({example.completion for example in chosen}) == 4, "as many as there are"
    assert spread(examples[:3], 5) == sorted(examples[:3], key=lambda example: len(example.prompt))
    assert spread([Example("a", "1")] * 4, 2) == [Example("a", "1")] * 2


def test_deciles_part_lengths_into_equal_shares() -> None:
    assert deciles(range(101)) == (10, 20, 30, 40, 50, 60, 70, 80, 90)
    assert deciles([7]) == (7,) * 9


def test_candidates_are_drawn_by_the_odds_of_the_discriminator() -> None:
    """Of three kinds written 6:3:1 and real 1:3:6, the right odds bring back the real shares."""
    written, real = {"a": 6000, "b": 3000, "c": 1000}, {"a": 0.1, "b": 0.3, "c": 0.6}
    kinds = [kind for kind, number in written.items() for _ in range(number)]
    margins = [3 * log(real[kind] / (written[kind] / 10_000)) for kind in kinds]  # overconfident threefold
    order = by_likeness(margins, temperature=3.0, seed=0)
    assert sorted(order) == list(range(10_000))
    first = Counter(kinds[place] for place in order[:600])
    for kind, share in real.items():
        assert first[kind] / 600 == pytest.approx(share, abs=0.07)
    assert order == by_likeness(margins, 3.0, seed=0) != by_likeness(margins, 3.0, seed=1)


def test_each_share_of_lengths_is_filled_and_what_lacks_comes_in_order() -> None:
    bounds = deciles(range(101))
    lengths = [length for length in (5, 15, 25, 35, 45, 55, 65, 75, 85) for _ in range(4)]  # nothing above 90
    order = list(range(len(lengths)))[::-1]
    taken = as_long(lengths, order, bounds, 20)
    counts = Counter(lengths[place] for place in taken)
    assert sum(counts.values()) == len(set(taken)) == 20
    assert min(counts.values()) == 2
    assert counts[85] == 4, "the missing two are the next ones in order"
    assert sorted(as_long(lengths, order, bounds, 100)) == sorted(order), "all there are"


def test_a_length_that_many_real_inputs_have_fills_all_their_shares() -> None:
    bounds = deciles([9] * 60 + [11] * 60)
    lengths = [3, 5, 7, 9, 11] * 60
    counts = Counter(lengths[place] for place in as_long(lengths, range(300), bounds, 100))
    assert counts[11] == 50 and counts[9] >= 40


def test_what_is_chosen_has_the_real_lengths_and_the_real_look() -> None:
    rng = random.Random(0)
    inputs = [rng.choice("ab") + f"{number:0{2 * rng.randint(3, 30)}d}" for number in range(3000)]  # odd lengths
    margins = [4.0 if text[0] == "a" else -4.0 for text in inputs]
    bounds = deciles(range(20, 41))  # even ones: no input lies on a bound
    both = choose(inputs, margins, 100, temperature=1.0, bounds=bounds, seed=0)
    assert len(set(both)) == 100
    shares = Counter(sum(len(text) > bound for bound in bounds) for text in both)
    assert shares == dict.fromkeys(range(10), 10)
    assert sum(text[0] == "a" for text in both) > 90
    looks = choose(inputs, margins, 100, temperature=1.0, bounds=(), seed=0)
    assert sum(text[0] == "a" for text in looks) > 90
    assert sum(text[0] == "a" for text in choose(inputs, margins, 100, temperature=100, bounds=(), seed=0)) < 75
    assert choose(inputs, (), 100, temperature=1.0, bounds=(), seed=0) == inputs[:100], "nothing to choose by"


def test_calibration_finds_by_how_much_margins_are_overconfident() -> None:
    generator = torch.Generator().manual_seed(0)
    odds = torch.randn(20_000, generator=generator) * 2
    real = torch.rand(20_000, generator=generator) < odds.sigmoid()
    assert calibrated(4 * odds[real], 4 * odds[~real]) == pytest.approx(4, rel=0.1)
    assert calibrated(torch.ones(3), -torch.ones(3)) == pytest.approx(0.1), "all right: as sure as may be"
    assert calibrated(-torch.ones(3), torch.ones(3)) == pytest.approx(100), "all wrong: as unsure"
