"""AdamW whose moments live in a low-rank subspace of the gradient (GaLore, arXiv 2403.03507, algorithm 2)."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.methods.singular import leading

Projection = Literal["std", "reverse_std", "left", "right", "full"]


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW in which the gradient G [m, n] of some matrices is projected; the others' is taken as it is.

    The moments of a projected matrix have the shape of R, which is one of

        R = PᵀG    [r, n]    "left":  P = U_r [m, r]
        R = GQᵀ    [m, r]    "right": Q = V_rᵀ [r, n]
        R = PᵀGQᵀ  [r, r]    "full"

    where U_r·diag(S_r)·V_rᵀ is the best approximation of rank r of G at the last update that was a multiple of T;
    "std" is "right" where m ≥ n, else "left", so that the small side is the projector's; "reverse_std" the other way.

    All of the state is in `state_dict`: per parameter `step`, `exp_avg`, `exp_avg_sq`, and `left` = P, `right` = Q.
    Moments and projectors are float32, whatever the parameters are.

    Args:
        projected: matrices to train in a subspace.
        others: parameters to train as they are.
        lr: η.
        weight_decay: decoupled, of the whole weights.
        rank: r; a smaller matrix keeps all of its directions.
        interval: T.
        scale: α, of the projected updates.
        projection: which sides.
        betas: β₁, β₂.
        eps: beside √V, as in the released code; `torch.optim.AdamW` adds it after the bias correction.
    """

    def __init__(
        self,
        projected: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        *,
        rank: int,
        interval: int,
        scale: float,
        projection: Projection,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(projected), "rank": rank, "interval": interval, "scale": scale, "projection": projection},
            {"params": list(others)},
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "rank": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad.float()  # type: ignore[union-attr]
        step = state.get("step", 0)
        if group["rank"] is not None:
            if step % group["interval"] == 0:
                state |= projectors(gradient, group["rank"], group["projection"])
            gradient = self.low_rank_gradient(down(gradient, state), state, step)
        if step == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] = step = step + 1
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        direction = mean / square.sqrt().add_(group["eps"])
        if group["rank"] is not None:
            direction = up(direction, state).mul_(group["scale"])
        rate = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        parameter.add_(direction.to(parameter.dtype), alpha=-rate)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def low_rank_gradient(self, gradient: Tensor, state: dict[str, Any], step: int) -> Tensor:
        """What the moments are made of, for R; `step` counts from 0. Here R itself."""
        del state, step
        return gradient

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would round the state to the parameters' precision."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.to(parameter.device, copy=True)


def projectors(gradient: Tensor, rank: int, projection: Projection) -> dict[str, Tensor]:
    """P [m, r] as "left" and Q [r, n] as "right", those of them that `projection` asks for, of G [m, n].

    Data-parallel processes, whose gradients agree, take the first one's: a singular vector's sign is free.
    """
    m, n = gradient.shape
    small, large = ("right", "left") if m >= n else ("left", "right")
    sides = {"std": (small,), "reverse_std": (large,), "full": ("left", "right")}.get(projection, (projection,))
    # A gradient that is no number is told by whoever runs the training; here it must not end the decomposition.
    U, _, Vh = leading(gradient.nan_to_num(0, 0, 0), rank, None)
    found = {}
    for side in sides:
        # Copied: a slice would hold on to all vectors, and in an order which a stored one would not have.
        found[side] = (U if side == "left" else Vh).clone(memory_format=torch.contiguous_format)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(found[side], src=0)
    return found


def down(gradient: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """R = PᵀGQᵀ for G [m, n], with whichever of P and Q there is."""
    if "left" in state:
        gradient = state["left"].T @ gradient
    return gradient @ state["right"].T if "right" in state else gradient


def up(direction: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """P·R·Q [m, n], with whichever of P and Q there is."""
    if "left" in state:
        direction = state["left"] @ direction
    return direction @ state["right"] if "right" in state else direction
