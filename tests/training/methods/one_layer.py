"""A model of one linear layer with a squared loss, for planted signals, and what fits it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.methods.contract import Adapted


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None


class OneLayer(nn.Module):
    """y = Wx + b of `layer`; the loss is the mean square from the labels."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        with torch.no_grad():
            self.layer.weight.copy_(weight)
            if bias is not None:
                self.layer.bias.copy_(bias)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        y = self.layer(x)
        return Output(y, None if labels is None else functional.mse_loss(y, labels))


def fitted(adapted: Adapted, x: Tensor, labels: Tensor, steps: int = 20) -> float:
    """The loss after L-BFGS on what trains."""
    optimiser = torch.optim.LBFGS(adapted.trainable().values(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = adapted.model(x, labels).loss
        loss.backward()
        return loss

    for _ in range(steps):
        optimiser.step(closure)
    return float(adapted.model(x, labels).loss)
