"""S²FT: whole attention heads and feed-forward channels train, the rest stays (Yang et al., arXiv 2412.06289).

    output, down:  y = Wx + Δ·x[I],         Δ ∈ ℝ^{m×k},   I the input features of the chosen heads or channels
    value, up:     y = Wx, y[I] += Δ·x,     Δ ∈ ℝ^{k×n},   I the output features of the chosen heads or channels

Heads are chosen for the attention's output and value projections, channels for the feed-forward's second and first
layer, for each of the four apart: a ratio of all the heads or channels of the model, pooled over its layers, so that
some layers get several and some none. Chosen at random by default; the paper's other choices are by the norm of the
weights, the mean size of the activations, their product, or the norm of the gradient, either end of the scale. The
ratios are those of the paper's LLaMA-2-7B runs (its LLaMA-3-8B runs train `down: 0.03` alone).

The paper permutes the model so that the chosen heads and channels lie side by side, updates W in place, and stores the
permuted model. Here the order stays and I is stored, which is the same function and the same gradient (see slices.py),
and the adapter fits the original checkpoint. Under grouped-query attention, where the paper's code fails, `output`
chooses query heads and `value` key-value heads. Layers of unlike shapes (the two stacks of an encoder-decoder, say)
have pools of their own, and no pool is left empty by a ratio above zero.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from infra.errors import CorruptArtifact, InvalidInput
from training.methods.calibration import bare_and_evaluating, gradients
from training.methods.contract import AttachContext, Batch, MethodCard, MethodConfig
from training.methods.injected import InjectedMethod, Slot, matrix
from training.methods.slices import ColumnSlot, RowSlot, stored_slot
from training.methods.sublayers import ATTENTION_OUTPUT, FEEDFORWARD_INPUT, FEEDFORWARD_OUTPUT
from training.methods.targets import linear_modules, shape

VALUES = r"(.*\.)?(v_proj|value|v_lin|(SelfAttention|EncDecAttention)\.v|attn\.c_attn)"
ROLES = {"output": ATTENTION_OUTPUT, "value": VALUES, "down": FEEDFORWARD_OUTPUT, "up": FEEDFORWARD_INPUT}

_HELP = "Part of the model's {} that train in the {}."


class S2ftConfig(MethodConfig):
    """Hyper-parameters of S²FT."""

    output: float = Field(0.052, ge=0, le=1, description=_HELP.format("heads", "attention's output projections"))
    down: float = Field(0.02, ge=0, le=1, description=_HELP.format("channels", "feed-forward's second layers"))
    value: float = Field(0.0, ge=0, le=1, description=_HELP.format("key-value heads", "value projections"))
    up: float = Field(
        0.0, ge=0, le=1, description=_HELP.format("channels", "feed-forward's first layers (not the gate)")
    )
    selection: Literal["random", "weight", "activation", "weight-activation", "gradient"] = Field(
        "random", description="What heads and channels are chosen by; the last three run the model on calibration data."
    )
    choose: Literal["smallest", "largest"] = Field(
        "smallest", description="Which end of the scale is chosen where `selection` is not random."
    )
    calibration_batches: int = Field(8, ge=1, description="Batches of data that such a selection looks at.")

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if not (self.output or self.down or self.value or self.up):
            raise ValueError("output, down, value and up are all 0, so nothing would train: raise one of them")
        return self


@dataclass(frozen=True, slots=True)
class Structure:
    """The heads or channels of one layer.

    Args:
        place: name of the layer.
        role: "output", "down" (their columns), "value" or "up" (their rows).
        units: how many heads or channels there are.
        size: features of each: of a head, or 1.
        first: the feature at which they start.
        width: length of a column or row.
    """

    place: str
    role: str
    units: int
    size: int
    first: int
    width: int

    @property
    def of_columns(self) -> bool:
        """Whether columns of the weight are meant, not rows."""
        return self.role in ("output", "down")

    def features(self, units: Tensor) -> Tensor:
        """The features of `units` [u]: [u·size], ascending where the units are."""
        return (self.first + units[:, None] * self.size + torch.arange(self.size)).flatten()


class S2ft(InjectedMethod[S2ftConfig]):
    """S²FT."""

    name = "s2ft"
    peft_type = "REGRAFT_S2FT"
    config_type = S2ftConfig
    card = MethodCard(
        title="A few whole attention heads and feed-forward channels",
        family="selective / structured",
        paper="S²FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity, arXiv 2412.06289",
        parameters="(heads_o·d + heads_v·d)·d_head + (channels_down + channels_up)·d, of those chosen",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        needs_calibration="optional",
        sharding=False,  # the backward pass reads whole weights
    )

    def places(self, model: nn.Module, config: S2ftConfig) -> list[str]:
        """The layers whose heads or channels can be chosen."""
        found = {structure.place for pool in pools(model, config) for structure in pool}
        return [name for name in linear_modules(model) if name in found]

    def fresh(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: S2ftConfig, context: AttachContext
    ) -> dict[str, Slot]:
        """Slots where something was chosen."""
        if config.selection == "random":
            chosen = self._choose(model, config, lambda structure: torch.rand(structure.units))
        else:
            told = {"method": self.name, "layers": list(layers), **config.model_dump(mode="json")}
            chosen = context.start(told, lambda: self._by_score(model, layers, config, context))
        of_columns = {s.place: s.of_columns for pool in pools(model, config) for s in pool}
        slots: dict[str, Slot] = {}
        for place, indices in chosen.items():
            m, n = shape(layers[place])
            slots[place] = ColumnSlot(indices, m) if of_columns[place] else RowSlot(indices, n)
        return slots

    def _choose(self, model: nn.Module, config: S2ftConfig, score: Callable[[Structure], Tensor]) -> dict[str, Tensor]:
        """The features of the lowest scores of each pool, by layer."""
        chosen: dict[str, Tensor] = {}
        for pool in pools(model, config):
            scores = torch.stack([score(structure) for structure in pool])  # [layers, units]
            lowest = scores.flatten().argsort(stable=True)[: quota(pool, config)]
            mask = torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill(0, lowest, True).view(scores.shape)
            for structure, picked in zip(pool, mask, strict=True):
                if picked.any():
                    chosen[structure.place] = structure.features(picked.nonzero().flatten())
        return chosen

    def _by_score(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: S2ftConfig, context: AttachContext
    ) -> dict[str, Tensor]:
        structures = [structure for pool in pools(model, config) for structure in pool]
        weights = {s.place: _norms(s, matrix(layers[s.place])).cpu() for s in structures}
        if config.selection == "weight":
            scores = weights
        elif config.selection == "gradient":
            chosen = {structure.place: layers[structure.place] for structure in structures}
            means = gradients(model, chosen, _batches(model, config, context), lambda rows: None)
            scores = {s.place: _norms(s, means[s.place]) for s in structures}
        else:
            scores = _activations(model, layers, structures, config, context)
            if config.selection == "weight-activation":
                scores = {place: size * weights[place] for place, size in scores.items()}
        sign = 1 if config.choose == "smallest" else -1
        return self._choose(model, config, lambda structure: sign * scores[structure.place])

    def blank(self, layer: nn.Module, config: S2ftConfig, tensors: Mapping[str, Tensor]) -> Slot:
        """As stored."""
        return stored_slot(layer, tensors)

    def expected_places(self, model: nn.Module, config: S2ftConfig, slots: Mapping[str, Slot]) -> list[str]:
        """Any of the places, as long as as much as the options say is chosen in all.

        Raises:
            CorruptArtifact: more or less is.
        """
        found = sum(p.numel() for slot in slots.values() for p in slot.parameters())
        if found != (expected := self.count(model, config)):
            raise CorruptArtifact(
                f"The tensors do not fit {type(model).__name__}: {found:,} trained weights, {expected:,} expected.",
                "Was it trained on this base?",
            )
        return [place for place in self.places(model, config) if place in slots]

    def count(self, model: nn.Module, config: S2ftConfig) -> int:
        """Chosen heads times their size, and chosen channels, each times the length of a column or row."""
        return sum(quota(pool, config) * pool[0].size * pool[0].width for pool in pools(model, config))


def pools(model: nn.Module, config: S2ftConfig) -> list[list[Structure]]:
    """The structures among which is chosen: of one role and shape, over all layers.

    Raises:
        InvalidInput: the model has no layer of a role that is asked for, or its heads cannot be told.
    """
    layers = linear_modules(model)
    found: dict[tuple[Any, ...], list[Structure]] = {}
    for role, pattern in ROLES.items():
        if not getattr(config, role):
            continue
        names = [name for name in layers if re.fullmatch(pattern, name)]
        if not names:
            last = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise InvalidInput(
                f"s2ft does not know the '{role}' layers of {type(model).__name__}, whose linear modules are {last}.",
                f"Set method.{role}: 0, or use paca, which needs to know no layer's part.",
            )
        for name in names:
            structure = _structure(model, name, layers[name], role)
            key = (role, structure.units, structure.size, structure.width)
            found.setdefault(key, []).append(structure)
    return list(found.values())


def quota(pool: list[Structure], config: S2ftConfig) -> int:
    """How many heads or channels of a pool are chosen: ⌊ratio · all⌋, at least one."""
    total = len(pool) * pool[0].units
    return max(1, int(getattr(config, pool[0].role) * total + 1e-9))  # 0.29 · 100 is 28.999… in floating point


def _structure(model: nn.Module, name: str, layer: nn.Module, role: str) -> Structure:
    m, n = shape(layer)
    if role in ("down", "up"):
        return Structure(name, role, n if role == "down" else m, 1, 0, m if role == "down" else n)
    features, first, size = (n if role == "output" else m), 0, _head_size(model)
    if name.endswith("attn.c_attn"):  # queries, keys and values in one; of equal size in GPT-2 alone
        features, first, size = n, 2 * n, size if m == 3 * n else 0
    if not size or features % size:
        raise InvalidInput(
            f"s2ft cannot tell the heads of {name}: {features} features, heads of {size or 'unknown size'}.",
            f"Set method.{role}: 0, or use paca, which needs to know no layer's part.",
        )
    return Structure(name, role, features // size, size, first, m if role == "output" else n)


def _head_size(model: nn.Module) -> int:
    """d_head by the model's configuration; 0 where it does not say."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return 0
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    told = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return int(told or (width // heads if heads and width else 0))


# -- scores of heads and channels --------------------------------------------------------------------------------------


def _norms(structure: Structure, weight: Tensor) -> Tensor:
    """‖W at each unit's columns or rows‖: [units]."""
    across = weight.float().square().sum(dim=0 if structure.of_columns else 1)
    return _by_unit(structure, across).sum(dim=1).sqrt()


def _by_unit(structure: Structure, features: Tensor) -> Tensor:
    """[features] → [units, size]."""
    return features[structure.first : structure.first + structure.units * structure.size].view(structure.units, -1)


def _activations(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    structures: list[Structure],
    config: S2ftConfig,
    context: AttachContext,
) -> dict[str, Tensor]:
    """Mean absolute activation of each unit, over the positions that the attention mask keeps."""
    sums = {s.place: torch.zeros(s.first + s.units * s.size, dtype=torch.float64) for s in structures}
    batch: Batch = {}

    def listen(structure: Structure) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            seen = arguments[0] if structure.of_columns else output
            mask = None if _of_decoder(model, structure.place) else batch.get("attention_mask")
            if mask is not None and seen.shape[:-1] == mask.shape:
                seen = seen[mask.bool()]
            sums[structure.place] += seen.detach().abs().flatten(0, -2).mean(dim=0, dtype=torch.float64).cpu()

        return layers[structure.place].register_forward_hook(hook)

    handles = [listen(structure) for structure in structures]
    try:
        with bare_and_evaluating(model), torch.no_grad():
            for batch in _batches(model, config, context):
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {s.place: _by_unit(s, sums[s.place]).mean(dim=1) for s in structures}


def _of_decoder(model: nn.Module, place: str) -> bool:
    """Whether a layer reads the second sequence of an encoder-decoder, which the attention mask does not tell of."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and "decoder" in place.split(".")


def _batches(model: nn.Module, config: S2ftConfig, context: AttachContext) -> Iterator[Batch]:
    drawn, device = 0, next(model.parameters()).device
    batches = context.calibration() if context.calibration else ()
    for drawn, batch in enumerate(islice(batches, config.calibration_batches), start=1):
        yield {name: tensor.to(device) for name, tensor in batch.items()}
        context.tell("heads and channels", drawn, config.calibration_batches)
    if not drawn:
        raise InvalidInput(
            f"s2ft needs calibration data for selection: {config.selection}.",
            "Set method.selection: random or weight, which need none.",
        )


METHOD = S2ft()
