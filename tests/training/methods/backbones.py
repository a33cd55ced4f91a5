"""One tiny model of each architecture, and a batch that it reads, on `TEST_DEVICE`. A new backbone is one line here."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny_models
from training.methods.contract import Adapted

ROWS, LENGTH = 2, 7
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))  # cuda: the whole matrix on a GPU


@dataclass(frozen=True)
class Backbone:
    """How to make a model, always with the same weights, and what to feed it."""

    make: Callable[[], nn.Module]
    feed: Callable[[], dict[str, Tensor]]
    labels: Callable[[dict[str, Tensor]], Tensor]

    def build(self) -> nn.Module:
        return copy.deepcopy(_prototype(self.make)).to(DEVICE)

    def batch(self) -> dict[str, Tensor]:
        return {name: tensor.to(DEVICE) for name, tensor in self.feed().items()}

    def calibration(self) -> list[dict[str, Tensor]]:
        """Batches with labels, such that the model computes its own loss."""
        batch = self.batch()
        labels = self.labels(batch).to(DEVICE)
        batch.pop("decoder_input_ids", None)  # made of the labels
        return [batch | {"labels": labels}, {name: t.flip(0) for name, t in (batch | {"labels": labels}).items()}]


def _tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, tiny_models.VOCABULARY, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # one row is padded on the left
    return {"input_ids": ids, "attention_mask": mask}


def _two_sequences() -> dict[str, Tensor]:
    return _tokens() | {"decoder_input_ids": _tokens()["input_ids"][:, :5]}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(ROWS, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def _next_tokens(batch: dict[str, Tensor]) -> Tensor:
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def _classes(batch: dict[str, Tensor]) -> Tensor:
    del batch
    return torch.arange(ROWS) % 3


def _targets(batch: dict[str, Tensor]) -> Tensor:
    return batch["decoder_input_ids"].contiguous()  # T5 views it


@cache
def _prototype(make: Callable[[], nn.Module]) -> nn.Module:
    """Made once, for copies, which take a fraction of the time."""
    return make()


BACKBONES = {
    "llama": Backbone(tiny_models.tiny_llama, _tokens, _next_tokens),
    "gpt2": Backbone(tiny_models.tiny_gpt2, _tokens, _next_tokens),
    "gemma3_text": Backbone(tiny_models.tiny_gemma3, _tokens, _next_tokens),
    "bert": Backbone(tiny_models.tiny_bert, _tokens, _classes),
    "t5": Backbone(tiny_models.tiny_t5, _two_sequences, _targets),
    "vit": Backbone(tiny_models.tiny_vit, _image, _classes),
}


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's logits, without gradient: a frozen base takes another numerical path when it builds a graph."""
    with torch.no_grad():
        return model(**batch).logits


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Some loss in which every logit counts."""
    values = model(**batch).logits.float()
    return (
        values * torch.linspace(-1, 1, values.numel(), device=values.device).view(values.shape)
    ).sum() / values.shape[-1]


def train(adapted: Adapted, batch: dict[str, Any], steps: int = 2, rate: float = 0.02) -> None:
    """A few steps of Adam, large enough to see."""
    optimiser = torch.optim.Adam(adapted.trainable().values(), lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(adapted.model, batch).backward()
        optimiser.step()
    optimiser.zero_grad()
