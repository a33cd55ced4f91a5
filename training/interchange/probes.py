"""A few inputs on which two models are compared by what they answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import InvalidInput

Probe = dict[str, Tensor]
TEXTS = (
    "The train to Kyoto leaves at nine, and it takes two hours and a half.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Question: I have two pears, a drum and three cats. How many things do I have?\nAnswer:",
    "Am Morgen lag Schnee auf den Dächern, und niemand war auf der Straße.",
)
_LENGTH, _COUNT = 24, 4


@dataclass(frozen=True)
class Difference:
    """How far one model's logits are from another's on the probes.

    Attributes:
        largest: max |Δ logit|.
        range: max |logit| of the first model, to judge `largest` by.
        top1: share of positions at which both would choose the same class or token.
        positions: how many there were.
    """

    largest: float
    range: float
    top1: float
    positions: int


def probes(model: nn.Module, tokenizer: Any = None) -> list[Probe]:
    """Inputs that the model reads: `TEXTS` where there is a tokenizer, else random tokens or pixels, always the same.

    Raises:
        InvalidInput: a model that reads neither tokens nor pixels.
    """
    config: Any = getattr(model, "config", None)
    reads = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(0)
    if reads == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, Sequence) else (size, size)
        shape = (_COUNT, getattr(config, "num_channels", 3), height, width)
        return [{"pixel_values": torch.randn(shape, generator=generator)}]
    vocabulary = getattr(config, "vocab_size", None)
    if reads != "input_ids" or not vocabulary:
        raise InvalidInput(f"{type(model).__name__} reads neither tokens nor pixels; it cannot be probed.", "")
    if tokenizer is not None and hasattr(tokenizer, "encode"):
        rows = [torch.tensor([tokenizer.encode(text)]) for text in TEXTS]
    else:
        rows = list(torch.randint(0, vocabulary, (_COUNT, 1, _LENGTH), generator=generator))
    if getattr(config, "is_encoder_decoder", False):
        return [{"input_ids": row, "decoder_input_ids": row[:, :_LENGTH]} for row in rows]
    return [{"input_ids": row} for row in rows]


def answers(model: nn.Module, inputs: Sequence[Probe]) -> list[Tensor]:
    """The model's logits [batch, positions, classes] or [batch, classes] on each probe, in float32 on the CPU."""
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            told = []
            for probe in inputs:
                moved = {
                    name: t.to(parameter.device, parameter.dtype if t.is_floating_point() else t.dtype)
                    for name, t in probe.items()
                }
                outputs: Any = model(**moved)
                told.append((outputs.logits if hasattr(outputs, "logits") else outputs[0]).float().cpu())
            return told
    finally:
        model.train(training)


def difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> Difference:
    """How far the second answers are from the first."""
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(first, second, strict=True)]
    positions = sum(agree.numel() for agree in same)
    return Difference(
        largest=max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)),
        range=max(float(a.abs().max()) for a in first),
        top1=sum(int(agree.sum()) for agree in same) / positions,
        positions=positions,
    )
