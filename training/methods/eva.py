"""EVA: LoRA whose A spans what varies most in the layer's inputs (Paischer et al., arXiv 2410.07170).

    X − mean X = U·diag(S)·Vᵀ over the calibration tokens,    A_l = V_lᵀ[:r_l],    B_l = 0
    r_l = how many of the Σ r largest ratios S²_lj / Σ_i S²_li over all layers are layer l's,    0 ≤ r_l ≤ ρr

With B at zero, its gradient is s·(∂L/∂y)ᵀXAᵀ, whose expected size these directions maximise. The singular vectors come
from incremental PCA, batch by batch, until the r_l that a layer is given have settled: |cos| ≥ τ between two batches.
A layer that is given no rank has no adapter. Every layer keeps the scale s = α/r (peft's `adjust_scaling_factors`).

As in peft and the authors' code, the data are centred, though the paper speaks of an SVD of activations, and layers
that read the same tensor share one PCA. Unlike them: r_l is at most min(m, n); tokens of small batches are collected
until there are enough for a step, instead of skipped; directions in which nothing varies count as settled; ties between
layers go to the earlier one; and the calibration ends after a number of batches.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from math import sqrt
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from infra.errors import InvalidInput
from training.methods.calibration import draw, observe, sharing_inputs
from training.methods.contract import AttachContext, MethodCard
from training.methods.plain_lora import Pair
from training.methods.singular import leading
from training.methods.started_lora import StartedLora, StartedLoraConfig
from training.methods.targets import linear_modules, select, shape

ITERATIONS = 4  # of the randomised SVD of large batches
NOTHING = 1e-5  # of the largest singular value: below it there is only rounding


class EvaConfig(StartedLoraConfig):
    """Hyper-parameters of EVA."""

    rank: int = Field(16, ge=1, description="r, the mean rank; Σ r over the layers is redistributed among them.")
    alpha: float | None = Field(1, gt=0, description="α of the scale α/r, which every layer keeps; null: the rank.")
    rho: float = Field(2.0, ge=1, description="ρ: no layer gets a rank above ρr; 1 leaves r everywhere.")
    tau: float = Field(0.99, gt=0, le=1, description="τ, the cosine from which a direction counts as settled.")
    use_label_mask: bool = Field(True, description="Leave tokens without a label out of the PCA.")
    whiten: bool = Field(False, description="Divide A's rows by the roots of their singular values (vision).")
    batches: int = Field(32, ge=1, description="Calibration batches after which the PCA ends, settled or not.")

    def most(self, layer: nn.Module) -> int:
        """The highest rank that `layer` may get."""
        return min(round(self.rho * self.rank), *shape(layer))


class Eva(StartedLora):
    """EVA."""

    name = "eva"
    config_type = EvaConfig
    offset = False
    card = MethodCard(
        title="LoRA that starts in the directions of most variance, with ranks to match",
        family="reparameterised / low rank, initialisation",
        paper="Parameter Efficient Fine-tuning via Explained Variance Adaptation, arXiv 2410.07170",
        parameters="Σ r_l(m + n) over the adapted m × n layers, Σ r_l = Σ r",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        needs_calibration=True,
        count_is_bound=True,
        sharding=False,
    )

    def pairs(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: Any, context: AttachContext
    ) -> dict[str, Pair]:
        """A of every layer that is given a rank, and zeros."""
        groups = sharing_inputs(model, layers, next(draw(context, model, self.name)))
        most = {name: config.most(layer) for name, layer in layers.items()}
        found = {
            leader: Components(max(most[name] for name in members), config.tau) for leader, members in groups.items()
        }
        ranks = most
        unsettled = list(groups)

        def hear(name: str, x: Tensor, kept: Tensor) -> None:
            found[name].add(x[kept].float())

        for batch in islice(self._without_end(model, context), config.batches):
            observe(model, {name: layers[name] for name in unsettled}, batch, hear, config.use_label_mask)
            if all(components.known for components in found.values()):
                ratios = {name: found[leader].ratios()[: most[name]] for leader in groups for name in groups[leader]}
                ranks = shares({name: ratios[name] for name in layers}, config.rank * len(layers))
            unsettled = [
                leader
                for leader, members in groups.items()
                if not found[leader].settled(max(ranks[name] for name in members))
            ]
            context.tell("directions of the layers' inputs", len(groups) - len(unsettled), len(groups))
            if not unsettled:
                break
        if missing := [leader for leader, components in found.items() if not components.known]:
            raise InvalidInput(
                f"The calibration data hold fewer than {found[missing[0]].count} tokens for {missing[0]}.",
                "Lower method.rank or method.rho, or give more data; use_label_mask: false counts all tokens.",
            )
        pairs = {}
        for leader, members in groups.items():
            V, S = found[leader].V, found[leader].S
            rows = V / S.clamp_min(NOTHING * float(S[0])).sqrt()[:, None] if config.whiten else V
            for name in members:
                if ranks[name]:
                    B = torch.zeros(shape(layers[name])[0], ranks[name], device=V.device)
                    pairs[name] = (rows[: ranks[name]].clone(), B)
        return pairs

    def _without_end(self, model: nn.Module, context: AttachContext) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from draw(context, model, self.name)

    def count(self, model: nn.Module, config: Any) -> int:
        """max Σ r_l(m + n): as if the largest layers got as much as they may, and what is left went to the next."""
        layers = linear_modules(model)
        names = select(model, config.targets, config.exclude)
        left, total = config.rank * len(names), 0
        for layer in sorted((layers[name] for name in names), key=lambda layer: -sum(shape(layer))):
            given = min(left, config.most(layer))
            left, total = left - given, total + given * sum(shape(layer))
        return total


class Components:
    """The leading principal components of rows that come batch by batch: incremental PCA (Ross et al. 2008).

    Attributes:
        count: k, how many.
        V: [k, n], orthonormal rows.
        S: [k] descending, singular values of all rows so far, centred.
    """

    V: Tensor
    S: Tensor

    def __init__(self, count: int, tau: float) -> None:
        self.count, self.tau = count, tau
        self.rows = 0
        self._waiting: list[Tensor] = []
        self._mean = self._energy = torch.zeros(())  # [n] and scalar, float64: mean, and Σ of squared distances from it
        self._still: Tensor | None = None  # [k] whether the last step left a direction where it was

    @property
    def known(self) -> bool:
        """Whether there have been enough rows for a first step."""
        return self.rows > 0

    def add(self, X: Tensor) -> None:
        """Take in the rows X [t, n], float32; fewer than k wait for more."""
        self._waiting.append(X)
        if sum(map(len, self._waiting)) < self.count:
            return
        X = torch.cat(self._waiting)
        self._waiting.clear()
        mean = X.mean(0, dtype=torch.float64)
        parts = [X - mean.float()]
        if self.known:  # what was there, the new rows, and how far the mean moves
            shift = (self._mean - mean) * sqrt(self.rows * len(X) / (self.rows + len(X)))
            parts = [self.S[:, None] * self.V, *parts, shift.float()[None]]
        gained = torch.cat(parts[1:] if self.known else parts).double().square().sum()
        V, S, _ = leading(torch.cat(parts).T, self.count, ITERATIONS)  # LAPACK is slower on what is wide
        V = V.T.contiguous()
        if self.known:
            alike, floor = (V * self.V).sum(1).abs() >= self.tau, NOTHING * S[0]
            self._still = alike | (floor >= S)
            self._mean = self._mean + (mean - self._mean) * (len(X) / (self.rows + len(X)))
            self._energy = self._energy + gained
        else:
            self._mean, self._energy = mean, gained
        self.rows += len(X)
        self.S, self.V = S, V

    def ratios(self) -> Tensor:
        """[k] the share of all variance that each direction explains."""
        return (self.S.double().square() / self._energy).nan_to_num(0.0)

    def settled(self, rank: int) -> bool:
        """Whether the first `rank` directions stayed where they were in the last step."""
        return not rank or (self._still is not None and bool(self._still[:rank].all()))


def shares(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of the `budget` largest ratios belong to each name; each name's are descending."""
    flat = [(ratio, name) for name, of in ratios.items() for ratio in of.tolist()]
    ranks = dict.fromkeys(ratios, 0)
    for _, name in sorted(flat, key=lambda entry: -entry[0])[:budget]:
        ranks[name] += 1
    return ranks


METHOD = Eva()
