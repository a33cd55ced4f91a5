"""What a federation cannot be told."""

from typing import Any

import pytest

from infra.documents import parse
from infra.errors import InvalidInput
from training.federation.options import FederationOptions


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"clients": 0}, "clients: Input should be greater than or equal to 2"),
        ({"rounds": 0}, "rounds"),
        ({"ranks": []}, "ranks is empty"),
        ({"ranks": [4, 0]}, "ranks[1]"),
        ({"ranks": [4, 2, 1], "clients": 2}, "3 ranks are given for 2 clients"),
        ({"skew": 0.0}, "skew"),
        ({"skew": -1.0}, "skew"),
        ({"skew": float("nan")}, "skew"),
        ({"skew": float("inf")}, "skew"),
        ({"least": 3, "clients": 2}, "least is 3, but there are 2 clients"),
        ({"runner": "ray"}, "runner"),
        ({"aggregation": "sum"}, "aggregation"),
    ],
)
def test_it_is_refused(said: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInput, match="federate") as refused:
        parse(FederationOptions, said, "federate")
    assert told in refused.value.what


def test_fewer_ranks_than_clients_go_round_and_the_default_ones_need_not_all_be_used() -> None:
    assert FederationOptions(clients=5, ranks=(8, 4)).ranks == (8, 4)
    assert FederationOptions(clients=3).ranks[:3] == (64, 32, 16)
