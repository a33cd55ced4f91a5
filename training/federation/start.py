"""What clients begin a round with, where the server is to average their factors."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CommonStart:
    """One A for all clients of a round, of which a client of rank r takes the first r rows; B is zero.

    FedAvg's clients begin with what the server sends them. With an A of each client's own, factors have nothing in
    common to be averaged over, and the mean says nothing about FedAvg.

    Args:
        seed: of the round.
        rank: the highest of all clients'.
    """

    seed: int
    rank: int

    def __call__(self, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a fresh LoRA with this A [r, n] in each layer: uniform within ±1/√n, as peft draws it."""
        return {name: self._rows(name, like) if ".lora_A." in name else like for name, like in fresh.items()}

    def _rows(self, name: str, like: Tensor) -> Tensor:
        rank, width = like.shape
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        A = (2 * torch.rand(max(self.rank, rank), width, generator=generator) - 1) / math.sqrt(width)
        return A[:rank].to(like)
