"""IST: of a LoRA on every layer, each step trains the part in a few layers (Yao et al., arXiv 2410.11772).

    each step:   N_u layers are drawn by σ(I_l), without replacement; the others' adapters stand still in it
    every T_i:   N_c sets S_k of N_v layers are drawn by σ(−I_l); with the adapters of S_k scaled by β, the model has
                 the loss ℓ_k on one training batch;  r_k = exp(−ℓ_k), r̄ their mean, p_l = σ(−I_l)
                 I_l ← I_l − μ Σ_k 1[l ∈ S_k] (r_k − r̄) p_l (1 − p_l)

A layer whose suppression costs little loses importance I, trains less and is tried more often. Forward passes use all
adapters; what trains, is stored and is merged is the host's, a plain LoRA. Frozen adapters ask for no gradient, keep no
inputs for one, and keep their optimiser's moments. Defaults are the paper's: N_u = ⌊L/4⌋, N_v = ⌊L/2⌋, rank 32, α = 2r,
dropout 0.05; its targets are q, k, v, up and down.

Where the code differs from the paper's: N_u and N_v are at least one, and N_c at most the number of different sets, or
models of three layers would fail; only the adapters' own scale is touched, each kept apart; every draw follows from
(seed, step), and the scores lie in the optimiser's state, so that a resumed training goes on as it would have; several
processes draw alike and judge by their mean loss. Adapters outside the layers (a classifier's) train in every step.
A stored adapter that is loaded again trains on as its host does, in all layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from math import comb, exp
from typing import Any, Literal

import torch
import torch.distributed as dist
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import nn
from transformers import TrainerCallback

from infra.errors import InvalidInput
from training.methods.contract import AttachContext, Batch
from training.methods.lora import METHOD as LORA
from training.methods.lora import Lora, LoraConfig
from training.methods.peft_method import PeftAdapted, bare
from training.methods.stacks import blocks

IMPORTANCE = "importance"  # of the optimiser's parameter group that holds the scores
NO_DATA = "Set method.probe_every: null to draw all layers alike."
_REDRAWS = 100  # until the sets that are drawn differ


class IstConfig(LoraConfig):
    """Hyper-parameters of IST and of the LoRA that it trains."""

    host: Literal["lora"] = Field("lora", description="The method whose layers are trained in turn.")
    rank: int = Field(32, ge=1, description="r, the inner dimension of BA.")
    alpha: int | None = Field(None, ge=1, description="α of the scale α/r; none given: twice the rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Probability of dropping an input of A in training.")
    active: float = Field(0.25, gt=0, le=1, description="N_u, the part of the layers that train in a step.")
    probe_every: int | None = Field(
        10, ge=1, description="T_i, steps between probes; null: none, all layers are drawn alike (the paper's RST)."
    )
    suppressed: float = Field(0.5, gt=0, le=1, description="N_v, the part of the layers that a probe suppresses.")
    subsets: int = Field(3, ge=2, description="N_c, sets of layers that a probe compares.")
    suppression: float = Field(0.25, ge=0, le=1, description="β, what the suppressed adapters' scale is multiplied by.")
    score_rate: float = Field(10.0, gt=0, description="μ, how far a probe moves the scores.")


@dataclass(frozen=True)
class Layer:
    """The adapters in one layer of the model: peft's modules and what trains in them."""

    modules: tuple[Any, ...]
    parameters: tuple[nn.Parameter, ...]


class IstAdapted(PeftAdapted):
    """A LoRA; one that was attached, not loaded, knows its schedule."""

    config: IstConfig | None = None
    context: AttachContext | None = None

    def layers(self) -> list[Layer]:
        """Those of the model's layers that have adapters, in order."""
        found = []
        for block in blocks(bare(self.model)).values():
            modules = [m for m in block.modules() if isinstance(m, BaseTunerLayer) and self.name in m.scaling]
            parts = [getattr(m, kind) for m in modules for kind in m.adapter_layer_names if kind.startswith("lora_")]
            own = [part[self.name] for part in parts if self.name in part]
            parameters = [p for part in own for p in (part.parameters() if isinstance(part, nn.Module) else [part])]
            if modules:
                found.append(Layer(tuple(modules), tuple(parameters)))
        return found

    def callbacks(self) -> list[TrainerCallback]:
        """The schedule of layers."""
        if self.config is None or self.context is None:
            return []
        return [Schedule(self, self.config, self.context)]

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer | None:
        """AdamW over the adapters of all layers, awake or not, with the scores in its state."""
        if self.config is None:
            return None
        self.activate()
        chosen = torch.optim.AdamW(
            list(self.trainable().values()), lr=learning_rate, weight_decay=weight_decay, fused=True
        )
        chosen.param_groups[0][IMPORTANCE] = [0.0] * len(self.layers())
        return chosen


class Ist(Lora):
    """IST."""

    name = "ist"
    config_type = IstConfig
    adapted_type = IstAdapted
    card = replace(
        LORA.card,
        title="A LoRA of which each step trains the layers that matter most",
        family="selective / layers, training schedule",
        paper="Layer-wise Importance Matters: Less Memory for Better Performance in PEFT of LLMs, arXiv 2410.11772",
        needs_calibration=True,
        sharding=False,  # not tried
    )

    def peft_config(self, model: nn.Module, config: LoraConfig) -> PeftConfig:
        """`peft.LoraConfig` with α = 2r where none is given."""
        return super().peft_config(model, config.model_copy(update={"alpha": config.alpha or 2 * config.rank}))

    def initialise(self, adapted: PeftAdapted, config: LoraConfig, context: AttachContext) -> None:
        """Let the adapter know its schedule.

        Raises:
            InvalidInput: no adapter lies in a stack of layers, or there are no data for the probes.
        """
        assert isinstance(adapted, IstAdapted) and isinstance(config, IstConfig)
        if not adapted.layers():
            raise InvalidInput(
                "ist trains layers in turn, but none of its adapters lies in a stack of like layers.",
                "Choose other targets, or the method lora.",
            )
        if config.probe_every and context.calibration is None:
            raise InvalidInput(
                "ist needs calibration data for its probes, and none are at hand.",
                NO_DATA,
            )
        adapted.config, adapted.context = config, context


class Schedule(TrainerCallback):
    """Wakes and puts to sleep; probes.

    Args:
        adapted: whose layers they are.
        config: the hyper-parameters.
        context: seed and batches.
    """

    def __init__(self, adapted: IstAdapted, config: IstConfig, context: AttachContext) -> None:
        self.adapted, self.config, self.context = adapted, config, context
        self.layers = adapted.layers()
        self._batches = self._endless()
        self._drawn = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Probe, if it is time to, and draw the layers of this step."""
        del args, control
        step: int = state.global_step
        group = others["optimizer"].param_groups[0]
        generator = torch.Generator().manual_seed((self.context.seed * 2**32 + step) % 2**64)
        every = self.config.probe_every
        if every and step and step % every == 0:
            group[IMPORTANCE] = self.probe(group[IMPORTANCE], self._batch(step // every), generator)
        awake = self._drawn_layers(group[IMPORTANCE], self.config.active, generator)
        for number, layer in enumerate(self.layers):
            for parameter in layer.parameters:
                parameter.requires_grad_(number in awake)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """All layers are awake again."""
        del args, state, control, others
        self.adapted.activate()

    def probe(self, scores: Sequence[float], batch: Batch, generator: torch.Generator) -> list[float]:
        """The scores after one probe on `batch`; the model is left as it was."""
        less_important = [-score for score in scores]
        sets: list[frozenset[int]] = []
        part = self.config.suppressed
        wanted = min(self.config.subsets, comb(len(self.layers), _part(part, len(self.layers))))
        for _ in range(_REDRAWS):
            drawn = self._drawn_layers(less_important, part, generator)
            if drawn not in sets:
                sets.append(drawn)
            if len(sets) == wanted:
                break
        losses = torch.tensor([self._loss(suppressed, batch) for suppressed in sets], dtype=torch.float64)
        if dist.is_available() and dist.is_initialized():  # whatever rounds differently, the processes must agree
            losses = losses.to(next(self.adapted.model.parameters()).device)
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        return updated(scores, sets, losses.tolist(), self.config.score_rate)

    def _loss(self, suppressed: frozenset[int], batch: Batch) -> float:
        model = self.adapted.model
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval()
            with self._scaled(suppressed), torch.no_grad():
                loss: float = model(**batch).loss.item()
        finally:
            for module, mode in modes.items():
                module.training = mode
        return loss

    @contextmanager
    def _scaled(self, suppressed: Iterable[int]) -> Iterator[None]:
        name = self.adapted.name
        held = [(module, module.scaling[name]) for number in suppressed for module in self.layers[number].modules]
        try:
            for module, scale in held:
                module.scaling[name] = scale * self.config.suppression
            yield
        finally:
            for module, scale in held:
                module.scaling[name] = scale

    def _drawn_layers(self, scores: Sequence[float], part: float, generator: torch.Generator) -> frozenset[int]:
        weights = torch.sigmoid(torch.tensor(scores, dtype=torch.float64))
        drawn = torch.multinomial(weights, _part(part, len(self.layers)), generator=generator)
        return frozenset(drawn.tolist())

    def _batch(self, number: int) -> Batch:
        """The batch of the probe `number`, counted from 1, on the model's device."""
        skipped, self._drawn = number - self._drawn - 1, number  # after a resumption, those of the probes before
        batch = next(islice(self._batches, skipped, None))
        device = next(self.adapted.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def _endless(self) -> Iterator[Batch]:
        while self.context.calibration is not None:
            batch: Batch | None = None
            for batch in self.context.calibration():
                yield batch
            if batch is None:
                raise InvalidInput("ist needs calibration data for its probes, and there are none.", NO_DATA)


def updated(
    scores: Sequence[float], sets: Sequence[frozenset[int]], losses: Sequence[float], rate: float
) -> list[float]:
    """I after a probe: I_l − μ Σ_k 1[l ∈ S_k] (r_k − r̄) p_l (1 − p_l).

    Args:
        scores: I, one a layer.
        sets: S_k, numbers of layers.
        losses: ℓ_k.
        rate: μ.
    """
    rewards = [exp(-loss) for loss in losses]
    mean = sum(rewards) / len(rewards)
    changed = []
    for layer, score in enumerate(scores):
        p = torch.sigmoid(torch.tensor(-score, dtype=torch.float64)).item()
        gained = sum(reward - mean for reward, chosen in zip(rewards, sets, strict=True) if layer in chosen)
        changed.append(score - rate * gained * p * (1 - p))
    return changed


def _part(part: float, layers: int) -> int:
    return max(1, int(part * layers + 1e-9))  # 0.29 · 100 is 28.999… in floating point


METHOD = Ist()
