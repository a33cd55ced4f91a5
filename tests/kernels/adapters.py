"""Pools of random adapters, and what a batch of them gives, in float64, of the very tensors that were put in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.page_pool import Lora, PagePool

DTYPES = ("float32", "bfloat16", "float16")


def lora(rank: int, n: int, m: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> Lora:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)
    return Lora(A.to(device, dtype), B.to(device, dtype), 0.25 + seed % 3)


def scattered_pool(
    n: int, m: int, width: int, ranks: Sequence[int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[PagePool, list[Lora | None]]:
    """Adapter i of rank ranks[i] in slot i (0: it leaves the module "layer" alone), its pages anywhere.

    Before an adapter there is another in its slot, so that pages are not handed out in order.
    """
    each = -(-n // width) + -(-m // width)
    pages = (sum(ranks) + max(ranks, default=0) + 3) * each + 2 * len(ranks)
    modules = {"other": (1, 1), "layer": (n, m)}
    pool = PagePool(modules, pages=pages, width=width, slots=len(ranks), dtype=dtype, device=device)
    loras: list[Lora | None] = []
    for slot, rank in enumerate(ranks):
        former = pool.add({"layer": lora(3, n, m, dtype, 100, device)})
        held = pool.allocator.allocate(1)
        pool.remove(former)
        own = {"other": lora(1, 1, 1, dtype, 0, device)} | (
            {"layer": lora(rank, n, m, dtype, slot, device)} if rank else {}
        )
        assert pool.add(own) == slot
        pool.allocator.release(held)
        loras.append(own.get("layer"))
    return pool, loras


def expected(y: Tensor, x: Tensor, adapters: Sequence[int], loras: Sequence[Lora | None]) -> Tensor:
    """y[i] + s·(x[i]·Aᵀ)·Bᵀ in float64."""
    total = y.double()
    for row, slot in enumerate(adapters):
        own = loras[slot] if slot >= 0 else None
        if own is not None:
            total[row] += own.scale * (x[row].double() @ own.A.double().T) @ own.B.double().T
    return total
