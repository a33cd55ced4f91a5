"""Linear regression as a model: one layer, a loss of its own, gradients and covariances that can be written down."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Regression(nn.Module):
    """y = Wx for x [B, L, n]; the loss is half the squared error, averaged over the B × L rows."""

    def __init__(self, outputs: int, inputs: int, seed: int = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        outputs = self.layer(inputs)
        loss = None if labels is None else (outputs - labels).square().sum(-1).mean() / 2
        return SimpleNamespace(logits=outputs, loss=loss)
