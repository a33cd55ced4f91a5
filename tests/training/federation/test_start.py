"""A common start: the same A for all clients, as far as each one's rank goes."""

import math

import torch

from training.federation.start import CommonStart

PLACE, M, N = "base_model.model.x", 12, 10


def fresh(rank: int) -> dict[str, torch.Tensor]:
    return {f"{PLACE}.lora_A.weight": torch.randn(rank, N), f"{PLACE}.lora_B.weight": torch.zeros(M, rank)}


def test_a_lower_rank_begins_with_the_first_rows_of_a_higher_one() -> None:
    start = CommonStart(7, 6)
    high, low = (start(fresh(rank))[f"{PLACE}.lora_A.weight"] for rank in (6, 2))
    assert torch.equal(high[:2], low) and high.abs().max() <= 1 / math.sqrt(N)
    assert not torch.equal(high, CommonStart(8, 6)(fresh(6))[f"{PLACE}.lora_A.weight"])
    assert not start(fresh(2))[f"{PLACE}.lora_B.weight"].any()
    other = {name.replace(".x.", ".y."): tensor for name, tensor in fresh(6).items()}
    assert not torch.equal(high, start(other)["base_model.model.y.lora_A.weight"]), "each layer has a draw of its own"


def test_rows_that_are_the_same_average_to_what_they_are() -> None:
    """Of clients that differ in B alone, the mean of the factors is the exact mean."""
    from training.federation.aggregation import aggregated
    from training.merging.adapter import Adapter

    clients = []
    for seed in (0, 1):
        tensors = CommonStart(7, 4)(fresh(4))
        tensors[f"{PLACE}.lora_B.weight"] = torch.randn(M, 4, generator=torch.Generator().manual_seed(seed))
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["x"]}
        clients.append(Adapter(f"client {seed}", config, tensors))
    assert aggregated(clients, (0.6, 0.4), "average").deviation.overall < 1e-6
