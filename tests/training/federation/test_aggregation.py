"""Stacking clients' LoRAs is exact whatever their ranks; averaging factors is not."""

import peft
import pytest
import torch

from tests.tiny_models import tiny_llama
from training.federation.aggregation import added, aggregated
from training.merging.adapter import Adapter

PLACE, M, N = "base_model.model.x", 12, 10


def client(rank: int, seed: int, alpha: int | None = None) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{PLACE}.lora_A.weight": torch.randn(rank, N, generator=generator),
        f"{PLACE}.lora_B.weight": torch.randn(M, rank, generator=generator),
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha or 2 * rank, "target_modules": ["x"]}
    return Adapter(f"client {seed}", config, tensors)


def update(adapter: Adapter) -> torch.Tensor:
    A, B = (adapter.tensors[f"{PLACE}.lora_{side}.weight"].double() for side in "AB")
    return adapter.config["lora_alpha"] / adapter.config["r"] * B @ A


CLIENTS = [client(rank, seed) for seed, rank in enumerate((6, 4, 2, 1))]
SHARES = (0.4, 0.3, 0.2, 0.1)


def test_the_stack_is_the_mean_of_the_updates() -> None:
    made = aggregated(CLIENTS, SHARES, "stack")
    meant = sum(p * update(each) for p, each in zip(SHARES, CLIENTS, strict=True))
    assert (update(made) - meant).abs().max() < 1e-6
    assert made.config["r"] == 13 and made.deviation.overall == 0
    again = aggregated(CLIENTS[::-1], SHARES[::-1], "stack")
    assert (update(again) - meant).abs().max() < 1e-6, "in whatever order"


def test_averaging_factors_is_far_from_it_and_says_how_far() -> None:
    made = aggregated(CLIENTS, SHARES, "average")
    meant = sum(p * update(each) for p, each in zip(SHARES, CLIENTS, strict=True))
    A = sum(p * torch.nn.functional.pad(2 * c.tensors[f"{PLACE}.lora_A.weight"].double(), (0, 0, 0, 6 - c.config["r"]))
            for p, c in zip(SHARES, CLIENTS, strict=True))  # fmt: skip
    B = sum(p * torch.nn.functional.pad(c.tensors[f"{PLACE}.lora_B.weight"].double(), (0, 6 - c.config["r"]))
            for p, c in zip(SHARES, CLIENTS, strict=True))  # fmt: skip
    torch.testing.assert_close(update(made), B @ A, atol=1e-5, rtol=1e-5)
    error = (update(made) - meant).norm() / meant.norm()
    assert error > 0.1 and made.deviation.overall == pytest.approx(float(error), rel=1e-4)


def test_one_client_is_itself() -> None:
    for how in ("stack", "average"):
        assert (update(aggregated(CLIENTS[:1], (1.0,), how)) - update(CLIENTS[0])).abs().max() < 1e-5


def test_rounds_add_up_and_can_be_cut() -> None:
    whole = added(CLIENTS[0], CLIENTS[1])
    assert (update(whole) - update(CLIENTS[0]) - update(CLIENTS[1])).abs().max() < 1e-5
    assert added(None, CLIENTS[1]) is CLIENTS[1]
    cut = added(CLIENTS[0], CLIENTS[1], rank=3)
    U, S, Vh = torch.linalg.svd(update(whole))
    torch.testing.assert_close(update(cut), U[:, :3] * S[:3] @ Vh[:3], atol=1e-4, rtol=1e-4)


def test_it_is_pefts_cat_where_the_scales_are_equal() -> None:
    model = tiny_llama()
    stock = None
    for seed, (name, rank) in enumerate({"first": 4, "second": 2}.items()):
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj"], init_lora_weights=False)
        torch.manual_seed(seed)
        if stock is None:
            stock = peft.get_peft_model(model, config, adapter_name=name)
        else:
            stock.add_adapter(name, config)
    assert stock is not None
    stock.add_weighted_adapter(["first", "second"], [0.7, 0.3], "both", combination_type="cat")
    clients = [
        Adapter(name, stock.peft_config[name].to_dict(), peft.get_peft_model_state_dict(stock, adapter_name=name))
        for name in ("first", "second")
    ]
    made = aggregated(clients, (0.7, 0.3), "stack")
    for place, module in stock.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            A, B = (made.tensors[f"base_model.model.{place}.lora_{side}.weight"] for side in "AB")
            torch.testing.assert_close(B @ A, module.get_delta_weight("both"), atol=1e-5, rtol=1e-5)
