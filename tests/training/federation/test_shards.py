"""Clients' shards: every example once, unlike where that is asked for, the same for the same seed."""

from collections import Counter

import pytest

from training.data.example import Example
from training.federation.shards import shards

FEW = [Example(f"question {n}", str(n % 4)) for n in range(400)]
MANY = [Example("x" * (n % 97), f"answer {n}") for n in range(300)]


@pytest.mark.parametrize("examples", [FEW, MANY])
@pytest.mark.parametrize(("clients", "skew"), [(2, 0.5), (10, 0.1), (10, 100.0), (40, 0.05)])
def test_every_example_is_somebodys_and_nobody_has_none(examples: list[Example], clients: int, skew: float) -> None:
    found = shards(examples, clients, skew, 0)
    assert len(found) == clients and all(found)
    assert Counter(example for shard in found for example in shard) == Counter(examples)
    assert found == shards(examples, clients, skew, 0) != shards(examples, clients, skew, 1)


def test_a_small_concentration_makes_clients_unlike() -> None:
    def with_one_client(skew: float) -> float:
        """The share of examples whose answer's chief owner has them."""
        found = [Counter(example.completion for example in shard) for shard in shards(FEW, 4, skew, 3)]
        return sum(max(shard[answer] for shard in found) for answer in "0123") / len(FEW)

    assert with_one_client(0.05) > 0.7 > 0.35 > with_one_client(1000.0)
