"""SpIEL: sparse fine-tuning whose index set is dropped and regrown during training (Ansell et al., arXiv 2401.16405).

    y = (W + scatter(η, δ))x + b,    η ∈ {0 … mn−1}^k distinct, δ ∈ ℝ^k float32, W ∈ ℝ^{m×n} frozen

K entries train in all, k = K·mn/Σmn of each layer; η starts at random, δ at zero. After update t, with
t mod S = γ and t < T (T updates in all, S = 20, γ = 5), the ⌊p·k⌋ entries of smallest |δ| are *dropped*, which puts W
itself back in their places, and as many are *grown* elsewhere, at δ = 0:

    p = 1 at t = γ, then p₀(1 − t/T);  or p₀(1 + cos(πt/T))/2 throughout (`schedule: cosine`);  p₀ = 0.2

`accumulated-gradient` (SpIEL-AG): the k entries of largest |G|, G = ∂L/∂W at the first backward pass of a phase of γ
updates, are the candidates. ΣG and ΣG² of the candidates are kept over the phase; those of largest |ΣG| grow. An entry
that is dropped and would be grown again stays as it is. AdamW, with an age for each entry in its bias correction; a
grown entry starts with m = Ḡ(1 − β₁^γ), v = mean(G²)(1 − β₂^γ) and age γ.
`momentum` (SpIEL-MA): SM3 keeps an accumulator for every row and column of W, ν = min(row_i, col_j) + g²,
δ ← δ − ηg/√(ν + 1e-8), row_i ← max(row_i, ν), col_j ← max(col_j, ν); the inactive entries of largest row_i·col_j grow.

Weight decay is decoupled and on δ: it pulls to the pre-trained model. The paper's searches: 3e-6 … 1e-4 with a decay of
1 … 30 for the first, 4e-4 … 2e-3 for the second.

The gradient of δ is taken without G (kernels/sparse_delta.py). Dense are only, one layer at a time, a copy of W in
forward and backward, where there are too many tokens to do without, and G in the backward pass that chooses candidates;
all that stays is O(K) (and O(m + n) for SM3). Forward and backward of a 2048 → 2048 layer on 512 tokens, K = 1 %, on
one CPU thread: bare 102 ms, this form 119 ms, with G and a gather 169 ms, the layer trained whole 150 ms.

Where the authors' code differs: its phases after the first take γ + 1 updates. It sums in the gradient's precision,
where bfloat16 stops counting at 256; here in float32. It squares and averages the gradients of micro-batches, which are
as many times too small as there are; here those of whole updates, as Adam sees them but for clipping. It lets each
process of a data-parallel training select for itself; here all follow the first.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.errors import InvalidInput
from kernels.sparse_delta import sparse_gradient, sparse_linear
from kernels.sparse_plan import planned
from training.methods.contract import AttachContext, MethodCard, MethodConfig
from training.methods.injected import InjectedAdapted, InjectedMethod, Slot, base_size
from training.methods.remembered import Remembered
from training.methods.sparse_delta import SparseDelta, check_indices, random_indices, shares
from training.methods.targets import ALL_LINEAR, EXCLUDE_HELP, TARGETS_HELP, Targets, linear_modules, select

BETAS = (0.9, 0.999)
EPSILON = 1e-8
MOST_SCORES = 2**22  # of entries that may grow, held at a time


class ScalingSftConfig(MethodConfig):
    """Hyper-parameters of SpIEL."""

    density: float = Field(0.01, gt=0, le=1, description="K as a share of all of the model's parameters.")
    entries: int | None = Field(None, ge=1, description="K itself; goes before `density`.")
    growth: Literal["accumulated-gradient", "momentum"] = Field(
        "accumulated-gradient", description="What says where to grow: gradients (AdamW), or SM3's moments (SM3)."
    )
    reselect_every: int = Field(20, ge=1, description="S, updates between reselections; more for small batches.")
    accumulate: int = Field(5, ge=1, description="γ, updates over which gradients of the candidates are summed.")
    replace: float = Field(0.2, ge=0, le=1, description="p₀, the share of entries that a reselection replaces.")
    schedule: Literal["linear", "cosine"] = Field("linear", description="How that share falls to zero over training.")
    targets: Targets = Field(ALL_LINEAR, description=TARGETS_HELP)
    exclude: tuple[str, ...] = Field((), description=EXCLUDE_HELP)

    @model_validator(mode="after")
    def _phases_end(self) -> "ScalingSftConfig":
        if self.accumulate >= self.reselect_every:
            raise ValueError(f"accumulate must be below reselect_every, {self.reselect_every}; it is {self.accumulate}")
        return self

    def share(self, step: int, total: int) -> float:
        """p after update `step` of `total`; zero where nothing is reselected."""
        if step % self.reselect_every != self.accumulate or step >= total:
            return 0.0
        if self.schedule == "cosine":
            return self.replace * (1 + math.cos(math.pi * step / total)) / 2
        return 1.0 if step == self.accumulate else self.replace * (1 - step / total)

    def gathers(self, step: int, total: int) -> bool:
        """Whether a phase of gathering gradients begins after update `step`."""
        starts = self.growth == "accumulated-gradient" and step % self.reselect_every == 0
        return starts and self.share(step + self.accumulate, total) > 0


# -- a layer -----------------------------------------------------------------------------------------------------------


class Candidates:
    """What a phase of gathering holds for one layer: η's possible successors with ΣG and ΣG², float32."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.updates = 0
        self.indices: Tensor | None = None  # [k], once the first gradient was seen
        self.current = self.total = self.squares = torch.empty(0)  # [k]: G of this update so far, ΣG, ΣG²
        self._plan = Remembered(planned)

    def __call__(self, left: Tensor, right: Tensor) -> None:
        """Take note of one backward pass, whose G is leftᵀ·right; all of it is made only where η is chosen by it."""
        if self.indices is None:
            self.indices = (left.T @ right).view(-1).abs().topk(self.count).indices
            self.current, self.total, self.squares = left.new_zeros(3, self.count, dtype=torch.float32)
        plan = self._plan.of(self.indices, (left.shape[1], right.shape[1]))
        self.current += sparse_gradient(left, right, plan)

    def end_update(self) -> None:
        """Count what the backward passes of one update came to."""
        self.updates += 1
        self.total += self.current
        self.squares += self.current.square()
        self.current.zero_()

    def state(self) -> dict[str, Any]:
        """For a checkpoint, after an update."""
        return {name: value for name, value in vars(self).items() if name not in ("current", "_plan")}

    @staticmethod
    def of_state(state: Mapping[str, Any], device: torch.device) -> "Candidates":
        """Inverse of `state`."""
        made = Candidates(state["count"])
        for name, value in state.items():
            setattr(made, name, value.to(device, copy=True) if isinstance(value, Tensor) else value)
        made.current = torch.zeros_like(made.total)
        return made


class SpielSlot(Slot):
    """η and δ of one layer.

    Args:
        delta: both.
        shape: of the weight, as the layer holds it.
        transposed: whether it holds it as [n, m].
    """

    candidates: Candidates | None = None  # while a phase runs

    def __init__(self, delta: SparseDelta, shape: tuple[int, int], transposed: bool) -> None:
        super().__init__()
        self.delta = delta
        self.shape = shape
        self.transposed = transposed

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """y."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        layer: Any = base
        plan = self.delta.plan(self.shape)
        return sparse_linear(x, self.delta.values, layer.weight, plan, layer.bias, self.transposed, self.candidates)

    def stored(self) -> dict[str, Tensor]:
        """`indices` and `values`."""
        return {"indices": self.delta.indices, "values": self.delta.values}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """In place."""
        with torch.no_grad():
            self.delta.indices.copy_(tensors["indices"])
            self.delta.values.copy_(tensors["values"])

    def update(self, weight: Tensor) -> Tensor:
        """scatter(η, δ) as [m, n]."""
        if self.transposed:
            return self.delta.dense(weight.T).T
        return self.delta.dense(weight)


# -- optimisers --------------------------------------------------------------------------------------------------------


class GrowingOptimizer(torch.optim.Optimizer, ABC):
    """An optimiser of δ that drops and grows entries of η; its state per entry goes with them.

    All that a resumed training needs beside η and δ is in its state: the entries' own, the number of updates, and what
    a running phase holds.

    Args:
        slots: of all layers.
        config: when and how much is reselected.
        total: T; None where η stays as it is.
        learning_rate: of δ.
        weight_decay: decoupled, on δ.
    """

    def __init__(
        self,
        slots: list[SpielSlot],
        config: ScalingSftConfig,
        total: int | None,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        defaults = {"lr": learning_rate, "weight_decay": weight_decay, "completed": 0}
        super().__init__([slot.delta.values for slot in slots], defaults)
        self.slots, self.config, self.total = slots, config, total
        for slot in slots:
            slot.candidates = None
        self._begin_phase()

    @abstractmethod
    def advance(self, slot: SpielSlot, gradient: Tensor, learning_rate: float) -> None:
        """One update of the slot's δ [k]."""

    @abstractmethod
    def regrow(self, slot: SpielSlot, count: int) -> None:
        """Replace at most `count` of the slot's entries."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all δ, and a reselection where its time has come."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for slot in self.slots:
            if slot.delta.values.grad is not None:
                slot.delta.values.mul_(1 - group["lr"] * group["weight_decay"])
                self.advance(slot, slot.delta.values.grad, group["lr"])
            if slot.candidates is not None:
                slot.candidates.end_update()
        group["completed"] += 1
        share = self.config.share(group["completed"], self.total) if self.total else 0.0
        if share:
            for slot in self.slots:
                self.regrow(slot, int(share * len(slot.delta.values)))
                slot.candidates = None
        self._begin_phase()
        return loss

    def _begin_phase(self) -> None:
        if self.total is None:
            return
        if self.config.gathers(self.param_groups[0]["completed"], self.total):
            for slot in self.slots:
                slot.candidates = Candidates(len(slot.delta.values))

    def state_dict(self) -> dict[str, Any]:
        """torch's, and what the running phase holds."""
        held = [slot.candidates.state() if slot.candidates else None for slot in self.slots]
        return super().state_dict() | {"candidates": held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        for slot, held in zip(self.slots, state_dict["candidates"], strict=True):
            slot.candidates = Candidates.of_state(held, slot.delta.values.device) if held else None


class AgedAdamW(GrowingOptimizer):
    """AdamW with an age for each entry; grows where the accumulated gradient is largest (SpIEL-AG)."""

    def _moments(self, values: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[values]
        if not state:
            state.update({name: torch.zeros_like(values) for name in ("age", "first", "second")})
        return state

    def advance(self, slot: SpielSlot, gradient: Tensor, learning_rate: float) -> None:
        """m, v, age, and δ ← δ − η·m̂/(√v̂ + ε)."""
        state = self._moments(slot.delta.values)
        state["age"] += 1
        state["first"].lerp_(gradient, 1 - BETAS[0])
        state["second"].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        first, second = (state[name] / _bias(beta, state["age"]) for name, beta in zip(_MOMENTS, BETAS, strict=True))
        slot.delta.values.sub_(learning_rate * first / (second.sqrt() + EPSILON))

    def regrow(self, slot: SpielSlot, count: int) -> None:
        """Drop the smallest |δ|, grow the largest |ΣG| among the candidates that do not stay active."""
        held, delta = slot.candidates, slot.delta
        if held is None or held.indices is None:  # no gradient came by: a layer that the data did not reach
            return
        candidates, total, squares = (_the_firsts(tensor) for tensor in (held.indices, held.total, held.squares))
        smallest = _smallest(delta.values, count)
        dropped = delta.indices[smallest]
        stays = torch.ones_like(delta.indices, dtype=torch.bool).index_fill(0, smallest, False)
        free = ~torch.isin(candidates, delta.indices[stays])
        chosen = free.nonzero()[:, 0][total[free].abs().argsort(descending=True, stable=True)[:count]]
        places = smallest[~torch.isin(dropped, candidates[chosen])]
        chosen = chosen[~torch.isin(candidates[chosen], dropped)]
        places = places[: len(chosen)]
        delta.indices[places] = candidates[chosen].to(delta.indices.dtype)
        delta.values[places] = 0
        state, age = self._moments(delta.values), torch.tensor(float(held.updates), device=delta.values.device)
        state["age"][places] = age
        for name, beta, sums in zip(_MOMENTS, BETAS, (total, squares), strict=True):
            state[name][places] = sums[chosen] / age * _bias(beta, age)


class SM3(GrowingOptimizer):
    """SM3; grows where the product of a row's and a column's accumulator is largest (SpIEL-MA)."""

    def _accumulators(self, slot: SpielSlot) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[slot.delta.values]
        if not state:
            rows, columns = slot.shape
            device = slot.delta.values.device
            state.update({"rows": torch.zeros(rows, device=device), "columns": torch.zeros(columns, device=device)})
        return state

    def advance(self, slot: SpielSlot, gradient: Tensor, learning_rate: float) -> None:
        """ν, δ ← δ − ηg/√(ν + ε), and the accumulators."""
        state = self._accumulators(slot)
        size = len(state["columns"])
        row, column = slot.delta.indices.long() // size, slot.delta.indices.long() % size
        bound = torch.minimum(state["rows"][row], state["columns"][column]) + gradient.square()
        slot.delta.values.sub_(learning_rate * gradient * (bound + EPSILON).rsqrt())
        state["rows"].scatter_reduce_(0, row, bound, "amax")
        state["columns"].scatter_reduce_(0, column, bound, "amax")

    def regrow(self, slot: SpielSlot, count: int) -> None:
        """Drop the smallest |δ|, grow the largest row_i·col_j among the inactive entries."""
        state, delta = self._accumulators(slot), slot.delta
        grown = best_products(state["rows"], state["columns"], delta.indices, count)
        places = _smallest(delta.values, count)[: len(grown)]
        delta.indices[places] = grown.to(delta.indices.dtype)
        delta.values[places] = 0


_MOMENTS = ("first", "second")


def _bias(beta: float, age: Tensor) -> Tensor:
    """1 − β^age."""
    return 1 - beta**age


def _smallest(values: Tensor, count: int) -> Tensor:
    """Where the `count` smallest |values| are; of equal ones the first."""
    return values.abs().argsort(stable=True)[:count]


def _the_firsts(tensor: Tensor) -> Tensor:
    """The first process's tensor, on every process: candidates are of local gradients, and η must be one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def best_products(rows: Tensor, columns: Tensor, active: Tensor, count: int) -> Tensor:
    """The flat indices of the `count` largest rows[i]·columns[j] that are not `active`, largest first.

    A band of rows at a time, so that the matrix of products is never whole.
    """
    size = len(columns)
    band = max(1, MOST_SCORES // size)
    scores, found = rows.new_empty(0), active.new_empty(0, dtype=torch.int64)
    for start in range(0, len(rows), band):
        here = torch.outer(rows[start : start + band], columns).view(-1)
        inside = active.long() - start * size
        here[inside[(inside >= 0) & (inside < len(here))]] = -1
        top = here.topk(min(count, len(here)))
        scores, found = torch.cat([scores, top.values]), torch.cat([found, top.indices + start * size])
        best = scores.argsort(descending=True, stable=True)[:count]
        scores, found = scores[best], found[best]
    return found[scores >= 0]


# -- the method --------------------------------------------------------------------------------------------------------


class ScalingSftAdapted(InjectedAdapted):
    """A SpIEL adapter; `total_steps` is T, None where it was loaded: η then stays as it is."""

    total_steps: int | None = None

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW or SM3, with growth."""
        kind = AgedAdamW if self.config.growth == "accumulated-gradient" else SM3
        return kind(list(self.slots().values()), self.config, self.total_steps, learning_rate, weight_decay)


class ScalingSft(InjectedMethod[ScalingSftConfig]):
    """SpIEL."""

    name = "scaling-sft"
    peft_type = "REGRAFT_SCALING_SFT"
    config_type = ScalingSftConfig
    adapted_type = ScalingSftAdapted
    card = MethodCard(
        title="Single weights that move to where the gradient is",
        family="selective / unstructured, dynamic mask",
        paper="Scaling Sparse Fine-Tuning to Large Language Models, arXiv 2401.16405",
        parameters="K, by default a hundredth of |θ|",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        sharding=False,  # a layer's dense gradient is read whole
    )

    def attach(self, model: nn.Module, config: ScalingSftConfig, context: AttachContext, name: str = "default") -> Any:
        """Put δ = 0 at random places of every layer.

        Raises:
            InvalidInput: the number of steps is unknown, or too small for one selection.
        """
        if context.total_steps is None:
            raise InvalidInput(
                "'scaling-sft' needs the number of training steps, which decides when it selects.",
                "Set training.steps or training.epochs.",
            )
        if context.total_steps <= config.accumulate:
            raise InvalidInput(
                f"In {context.total_steps} training steps there is no selection after step {config.accumulate}.",
                "Train longer, or lower method.accumulate.",
            )
        adapted: ScalingSftAdapted = super().attach(model, config, context, name)
        adapted.total_steps = context.total_steps
        return adapted

    def places(self, model: nn.Module, config: ScalingSftConfig) -> list[str]:
        """The selected linear layers."""
        return select(model, config.targets, config.exclude)

    def fresh(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: ScalingSftConfig, context: AttachContext
    ) -> dict[str, Slot]:
        """K indices at random, shared out by the layers' sizes."""
        del context
        sizes = [cast(Tensor, layer.weight).numel() for layer in layers.values()]
        counts = shares(self._entries(model, config, sum(sizes)), sizes)
        return {
            name: _slot(layer, SparseDelta(random_indices(size, count)))
            for (name, layer), size, count in zip(layers.items(), sizes, counts, strict=True)
        }

    def blank(self, layer: nn.Module, config: ScalingSftConfig, tensors: Mapping[str, Tensor]) -> Slot:
        """Of the stored indices."""
        del config
        check_indices(tensors["indices"], tensors["values"], cast(Tensor, layer.weight).numel())
        return _slot(layer, SparseDelta(tensors["indices"], tensors["values"]))

    def count(self, model: nn.Module, config: ScalingSftConfig) -> int:
        """K."""
        layers = linear_modules(model)
        places = self.places(model, config)
        return self._entries(model, config, sum(cast(Tensor, layers[place].weight).numel() for place in places))

    def _entries(self, model: nn.Module, config: ScalingSftConfig, available: int) -> int:
        entries = config.entries or max(1, int(config.density * base_size(model)))
        if entries > available:
            raise InvalidInput(
                f"{entries:,} entries are to train, but the adapted layers have {available:,}.",
                "Lower method.entries or method.density.",
            )
        return entries


def _slot(layer: nn.Module, delta: SparseDelta) -> SpielSlot:
    rows, columns = cast(Tensor, layer.weight).shape
    return SpielSlot(delta, (rows, columns), transposed=isinstance(layer, Conv1D))


METHOD = ScalingSft()
