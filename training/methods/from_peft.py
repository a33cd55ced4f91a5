"""Methods that peft implements on plain linear layers, each a row of what the paper calls its parts.

W ∈ ℝ^{m×n} is a layer's frozen weight, h = (W + ΔW)x or h = WRx with R orthogonal. What a row says: peft's type, our
options and peft's names for them, the parameters of one m × n layer, and where peft cannot go. Every default is the
paper's, but for the places: most papers adapt the query and value projections, here it is every linear layer.

    vera        ΔW = diag(b)·B·diag(d)·A      A, B random, frozen, one pair for all layers (cut to size); b, d train
    loha        ΔW = (α/r)(B₁A₁) ⊙ (B₂A₂)     rank up to r²
    lokr        ΔW = (α/r)·C ⊗ D              C [a, c], a and c near the square roots (or `factor`); D low-rank
    oft         R = diag(R₁, …), R_i = (I + Q_i)(I − Q_i)⁻¹, Q_i skew; peft sums a few terms of the inverse's series
    boft        h = diag(s)·W·R₁⋯R_f x        each factor as oft's between two butterfly permutations
    fourierft   ΔW = α·Re(IDFT₂(F))           F [m, n] sparse: n coefficients at seeded places, Gaussian at the start
    waveft      ΔW = α·IDWT₂(F)               the same in a wavelet basis, zero at the start
    hra         R = Π(I − 2uᵢuᵢᵀ)             r Householder reflections that start as equal pairs
    miss        ΔW = E repeated along n       E [m, r]: the input is summed in groups, one row of Eᵀ each
    randlora    ΔW = (α/r)·Σⱼ Bⱼ·Λⱼ·A·Γⱼ      Bⱼ, A random and frozen as vera's; j up to full rank
    vb-lora     ΔW = BA, built of sub-vectors  each a softmax mixture of the top k of one bank for all layers
    c3a         ΔW = blocks that are circulant one vector of b numbers for each b × b block
    road        pairs of outputs are rotated by θ and stretched by α
    hira        ΔW = W ⊙ BA
    delora      ΔW = (λ‖W‖/r)·B·Ξ·A           Ξ normalises: the boundary λ bounds how far the weight goes
    gralora     k × k blocks, each with a LoRA of rank r/k
    shira       ΔW sparse: r(m + n) entries at seeded places

vera's frozen pair is stored, as peft does, though a seed makes it, since generators may differ between versions;
randlora's is as large as the largest layer, and is made anew. Not here, of what peft has: what learns routers over a
library of adapters (Poly, X-LoRA), tokens or caches (trainable tokens, Cartridge), or the base itself (OSF).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.boft.layer import get_fbd_cuda
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field, field_validator
from torch import nn
from transformers.pytorch_utils import Conv1D

from infra.errors import InvalidInput
from training.methods.contract import AttachContext, MethodCard, MethodConfig
from training.methods.peft_method import PeftAdapted, PeftMethod
from training.methods.targets import (
    ALL_LINEAR,
    EXCLUDE_HELP,
    TARGETS_HELP,
    Targets,
    linear_modules,
    select,
    select_with_room,
    shape,
    shortest,
)

Size = Callable[[Any, int, int], int]  # (options, m, n) → number of parameters
Refusal = Callable[[Any, int, int], str | None]  # (options, m, n) → why such a layer cannot be adapted

LINEAR = ("llama", "gemma3_text", "bert", "t5", "vit")  # where every layer is an `nn.Linear`
LINEAR_AND_CONV1D = ("llama", "gpt2", "gemma3_text", "bert", "t5", "vit")
SEED_HELP = "Of the frozen random part; adapters on one model must agree on it."
PLACES_HELP = "Seed of the places that train."


class LinearConfig(MethodConfig):
    """What all of these methods ask for."""

    targets: Targets = Field(ALL_LINEAR, description=TARGETS_HELP)
    exclude: tuple[str, ...] = Field((), description=EXCLUDE_HELP)


class FromPeft(PeftMethod[Any]):
    """One of peft's methods for linear layers.

    Args:
        name: in the catalogue.
        kind: peft's name of the type.
        config_type: our options.
        card: what the catalogue says.
        names: our option → the argument of peft's configuration.
        size: parameters at one layer.
        once: parameters that all layers share.
        refusal: why a layer cannot be adapted.
        fixed: arguments of peft's configuration that are no options.
        agree: arguments in which the adapters on one model must agree, since peft keeps one tensor for them.
        conv1d: whether peft adapts `Conv1D` (GPT-2's), too.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        config_type: type[LinearConfig],
        card: MethodCard,
        *,
        names: Mapping[str, str],
        size: Size,
        once: Callable[[Any], int] = lambda config: 0,
        refusal: Refusal = lambda config, m, n: None,
        fixed: Mapping[str, Any] | None = None,
        agree: tuple[str, ...] = (),
        conv1d: bool = False,
    ) -> None:
        self.name, self.peft_type, self.config_type, self.card = name, kind, config_type, card
        self.names, self.size, self.once, self.refusal = names, size, once, refusal
        self.fixed, self.agree, self.conv1d = fixed or {}, agree, conv1d

    def peft_config(self, model: nn.Module, config: Any) -> PeftConfig:
        """peft's configuration on exactly the selected layers.

        Raises:
            InvalidInput: one of them is of a kind or shape that the method does not adapt, or all are below the rank.
        """
        layers = linear_modules(model)
        names = select(model, config.targets, config.exclude)
        for name in names:
            wrong_kind = isinstance(layers[name], Conv1D) and not self.conv1d
            reason = "it is a Conv1D" if wrong_kind else self.refusal(config, *shape(layers[name]))
            if reason:
                raise InvalidInput(
                    f"{self.name} cannot adapt {name} of {type(model).__name__}: {reason}.",
                    "Try: lora" if wrong_kind else "Change that option, or leave the layer out: method.exclude.",
                )
        if hasattr(config, "rank"):
            select_with_room(model, config.targets, config.exclude, config.rank)
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.peft_type)]
        arguments = {theirs: getattr(config, ours) for ours, theirs in self.names.items()} | dict(self.fixed)
        if "fan_in_fan_out" in kind.__dataclass_fields__:
            arguments["fan_in_fan_out"] = all(isinstance(layers[name], Conv1D) for name in names)
        return kind(target_modules=shortest(model, names), **arguments)

    def attach(self, model: nn.Module, config: Any, context: AttachContext, name: str = "default") -> PeftAdapted:
        """As every method of peft; what peft itself refuses is told as invalid input."""
        try:
            return super().attach(model, config, context, name)
        except (ValueError, TypeError) as error:
            raise InvalidInput(
                f"peft cannot put {self.name} on {type(model).__name__}: {error}", "Try another method, or targets."
            ) from error

    def is_active(self, adapted: PeftAdapted) -> bool:
        """peft's layers of this type are there and hold the adapter."""
        layers = [module for module in adapted.model.modules() if isinstance(module, BaseTunerLayer)]
        held = [part for layer in layers for part in layer.adapter_layer_names if adapted.name in getattr(layer, part)]
        return bool(held) and adapted.peft_config.peft_type == self.peft_type

    def count(self, model: nn.Module, config: Any) -> int:
        """`once`, and `size` of every layer."""
        layers = linear_modules(model)
        chosen = select(model, config.targets, config.exclude)
        return self.once(config) + sum(self.size(config, *shape(layers[name])) for name in chosen)

    def _put(self, model: nn.Module, peft_config: PeftConfig, name: str) -> PeftAdapted:
        for other in model.peft_config.values() if isinstance(model, PeftModel) else ():
            for key in self.agree if other.peft_type == peft_config.peft_type else ():
                here, there = getattr(peft_config, key), getattr(other, key)
                if here != there:
                    raise InvalidInput(
                        f"{self.name} adapters on one model share their frozen part: {key} is {there}, not {here}.",
                        f"Give this one the same {key}, or load the base anew.",
                    )
        return super()._put(model, peft_config, name)


# -- frozen random projections -----------------------------------------------------------------------------------------


class VeraConfig(LinearConfig):
    """Hyper-parameters of VeRA."""

    rank: int = Field(256, ge=1, description="r, the inner dimension of the frozen BA.")
    d_initial: float = Field(0.1, description="Start of the vector d.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an input of A in training.")
    projection_seed: int = Field(0, ge=0, description=SEED_HELP)


VERA = FromPeft(
    "vera",
    "VERA",
    VeraConfig,
    MethodCard(
        title="Two vectors a layer around one frozen random projection",
        family="reparameterised / low rank, shared",
        paper="VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454",
        parameters="Σ m + r over the adapted m × n layers",
        backbones=LINEAR_AND_CONV1D,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={
        "rank": "r",
        "d_initial": "d_initial",
        "dropout": "vera_dropout",
        "projection_seed": "projection_prng_key",
    },
    size=lambda config, m, n: m + config.rank,
    agree=("r", "projection_prng_key", "save_projection"),
    conv1d=True,
)


class RandLoraConfig(LinearConfig):
    """Hyper-parameters of RandLoRA."""

    rank: int = Field(32, ge=1, description="r of each random basis; fewer parameters where it is larger.")
    alpha: int = Field(640, ge=1, description="α of the scale α/r; the paper's is 20 times the rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an input in training.")
    projection_seed: int = Field(0, ge=0, description=SEED_HELP)


RANDLORA = FromPeft(
    "randlora",
    "RANDLORA",
    RandLoraConfig,
    MethodCard(
        title="Full-rank sums of frozen random bases with trained diagonals",
        family="reparameterised / random bases",
        paper="RandLoRA: Full-rank parameter-efficient fine-tuning of large models, arXiv 2502.00987",
        parameters="Σ k(r + min(m, n)), k = ⌈min(m, n)/r⌉, over the adapted m × n layers",
        backbones=LINEAR_AND_CONV1D,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={
        "rank": "r",
        "alpha": "randlora_alpha",
        "dropout": "randlora_dropout",
        "projection_seed": "projection_prng_key",
    },
    fixed={"save_projection": False},
    size=lambda config, m, n: math.ceil(min(m, n) / config.rank) * (config.rank + min(m, n)),
    agree=("r", "projection_prng_key", "save_projection", "sparse", "very_sparse"),
    conv1d=True,
)


# -- products other than BA --------------------------------------------------------------------------------------------


class LohaConfig(LinearConfig):
    """Hyper-parameters of LoHa."""

    rank: int = Field(8, ge=1, description="r of each of the two products.")
    alpha: int = Field(8, ge=1, description="α of the scale α/r.")
    rank_dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an output's update in training.")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping a layer's update in training.")


LOHA = FromPeft(
    "loha",
    "LOHA",
    LohaConfig,
    MethodCard(
        title="The Hadamard product of two low-rank matrices",
        family="reparameterised / Hadamard product",
        paper="FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning, arXiv 2108.06098",
        parameters="Σ 2r(m + n) over the adapted m × n layers",
        backbones=LINEAR,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={"rank": "r", "alpha": "alpha", "rank_dropout": "rank_dropout", "module_dropout": "module_dropout"},
    size=lambda config, m, n: 2 * config.rank * (m + n),
)


class LokrConfig(LohaConfig):
    """Hyper-parameters of LoKr."""

    rank: int = Field(8, ge=1, description="r of the second factor, where it is large enough to be split.")
    factor: int = Field(-1, ge=-1, description="Rows and columns of the first factor; -1: near the square root.")
    decompose_both: bool = Field(False, description="Split the first factor, too, where it is large enough.")

    @field_validator("factor")
    @classmethod
    def _divides(cls, factor: int) -> int:
        if factor == 0:
            raise ValueError("no matrix has 0 rows; -1 takes a factor near the square root")
        return factor


def split(size: int, factor: int) -> tuple[int, int]:
    """(a, b), a·b = size: a the factor itself if it divides, else the largest divisor up to it and to √size."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    first = max((d for d in range(1, most + 1) if size % d == 0), default=1)
    return first, size // first


def _kronecker(config: LokrConfig, m: int, n: int) -> int:
    (a, b), (c, d) = split(m, config.factor), split(n, config.factor)
    first = config.rank * (a + c) if config.decompose_both and config.rank < max(a, c) / 2 else a * c
    return first + (config.rank * (b + d) if config.rank < max(b, d) / 2 else b * d)


LOKR = FromPeft(
    "lokr",
    "LOKR",
    LokrConfig,
    MethodCard(
        title="A Kronecker product, its second factor of low rank",
        family="reparameterised / Kronecker product",
        paper="Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, arXiv 2309.14859",
        parameters="Σ ac + min(bd, r(b + d)), m = ab, n = cd, over the adapted m × n layers",
        backbones=LINEAR,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={
        "rank": "r",
        "alpha": "alpha",
        "rank_dropout": "rank_dropout",
        "module_dropout": "module_dropout",
        "factor": "decompose_factor",
        "decompose_both": "decompose_both",
    },
    size=_kronecker,
)


class HiraConfig(LinearConfig):
    """Hyper-parameters of HiRA."""

    rank: int = Field(32, ge=1, description="r, the inner dimension of BA.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an input in training.")


HIRA = FromPeft(
    "hira",
    "HIRA",
    HiraConfig,
    MethodCard(
        title="The weight itself times a low-rank matrix, entry by entry",
        family="reparameterised / Hadamard product",
        paper="HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, ICLR 2025",
        parameters="Σ r(m + n) over the adapted m × n layers",
        backbones=LINEAR_AND_CONV1D,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={"rank": "r", "dropout": "hira_dropout"},
    size=lambda config, m, n: config.rank * (m + n),
    conv1d=True,
)


class DeloraConfig(LinearConfig):
    """Hyper-parameters of DeLoRA."""

    rank: int = Field(8, ge=1, description="r, the inner dimension of BΞA.")
    boundary: float = Field(15.0, gt=0, description="Start of λ, which bounds the update's Frobenius norm.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an input in training.")


DELORA = FromPeft(
    "delora",
    "DELORA",
    DeloraConfig,
    MethodCard(
        title="LoRA whose strength is trained apart from its direction, and bounded",
        family="reparameterised / low rank, normalised",
        paper="Decoupling Angles and Strength in Low-rank Adaptation, arXiv 2503.18225",
        parameters="Σ r(m + n) + 1 over the adapted m × n layers",
        backbones=LINEAR,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={"rank": "r", "boundary": "delora_lambda", "dropout": "module_dropout"},
    size=lambda config, m, n: config.rank * (m + n) + 1,
)


class GraloraConfig(LinearConfig):
    """Hyper-parameters of GraLoRA."""

    rank: int = Field(32, ge=1, description="r: every block has a LoRA of rank r/k.")
    blocks: int = Field(2, ge=1, description="k: the weight is cut into k × k blocks.")
    alpha: int = Field(64, ge=1, description="α of the scale α/r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an input in training.")


def _blocks_fit(config: GraloraConfig, m: int, n: int) -> str | None:
    if config.rank % config.blocks:
        return f"rank {config.rank} is no multiple of blocks {config.blocks}"
    return _divides("blocks", config.blocks, m, n)


def _divides(option: str, number: int, *sizes: int) -> str | None:
    wrong = [size for size in sizes if size % number]
    return f"{option} {number} does not divide its size {wrong[0]}" if wrong else None


GRALORA = FromPeft(
    "gralora",
    "GRALORA",
    GraloraConfig,
    MethodCard(
        title="A LoRA for every block of the weight",
        family="reparameterised / low rank, blockwise",
        paper="GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, arXiv 2505.20355",
        parameters="Σ r(m + n) over the adapted m × n layers",
        backbones=LINEAR_AND_CONV1D,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={"rank": "r", "blocks": "gralora_k", "alpha": "alpha", "dropout": "gralora_dropout"},
    size=lambda config, m, n: config.rank * (m + n),
    refusal=_blocks_fit,
    conv1d=True,
)


class MissConfig(LinearConfig):
    """Hyper-parameters of MiSS."""

    rank: int = Field(64, ge=1, description="r: the inputs are summed in r groups.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an input in training.")


MISS = FromPeft(
    "miss",
    "MISS",
    MissConfig,
    MethodCard(
        title="One matrix, repeated along the inputs",
        family="reparameterised / shared shards",
        paper="MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure, arXiv 2409.15371",
        parameters="Σ rm over the adapted m × n layers",
        backbones=LINEAR,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={"rank": "r", "dropout": "miss_dropout"},
    size=lambda config, m, n: config.rank * m,
    refusal=lambda config, m, n: f"rank {config.rank} is above its {n} inputs" if config.rank > n else None,
)


class C3aConfig(LinearConfig):
    """Hyper-parameters of C³A."""

    block_size: int = Field(256, ge=1, description="b: must divide inputs and outputs of every layer.")


C3A = FromPeft(
    "c3a",
    "C3A",
    C3aConfig,
    MethodCard(
        title="Circular convolutions, block by block",
        family="reparameterised / circulant",
        paper="Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv 2407.19342",
        parameters="Σ mn/b over the adapted m × n layers",
        backbones=LINEAR,
        modality=("language", "vision"),
        identity_at_init=False,
        sharding=False,
    ),
    names={"block_size": "block_size"},
    size=lambda config, m, n: m * n // config.block_size,
    refusal=lambda config, m, n: _divides("block_size", config.block_size, m, n),
)


class VbLoraConfig(LinearConfig):
    """Hyper-parameters of VB-LoRA."""

    rank: int = Field(4, ge=1, description="r, the inner dimension of BA.")
    vectors: int = Field(256, ge=1, description="h, the number of vectors in the bank.")
    vector_length: int = Field(256, ge=1, description="b, their length: must divide every layer's inputs and outputs.")
    bank_bound: float = Field(0.02, gt=0, description="The bank starts uniform on ±this.")
    top_k: int = Field(2, ge=1, description="k, how many vectors of the bank a sub-vector mixes.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an input of A in training.")


VB_LORA = FromPeft(
    "vb-lora",
    "VBLORA",
    VbLoraConfig,
    MethodCard(
        title="LoRA whose factors are mixed from one small bank of vectors",
        family="reparameterised / low rank, shared",
        paper="VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, arXiv 2405.15179",
        parameters="hb + Σ hr(m + n)/b over the adapted m × n layers",
        backbones=LINEAR_AND_CONV1D,
        modality=("language", "vision"),
        identity_at_init=False,
        sharding=False,
    ),
    names={
        "rank": "r",
        "vectors": "num_vectors",
        "vector_length": "vector_length",
        "top_k": "topk",
        "bank_bound": "init_vector_bank_bound",
        "dropout": "vblora_dropout",
    },
    size=lambda config, m, n: config.vectors * config.rank * (m + n) // config.vector_length,
    once=lambda config: config.vectors * config.vector_length,
    refusal=lambda config, m, n: (
        _divides("vector_length", config.vector_length, m, n)
        or (f"top_k {config.top_k} is above vectors {config.vectors}" if config.top_k > config.vectors else None)
    ),
    conv1d=True,
)


# -- few coefficients --------------------------------------------------------------------------------------------------


class FourierConfig(LinearConfig):
    """Hyper-parameters of FourierFT."""

    frequencies: int = Field(1000, ge=1, description="n, the number of trained coefficients a layer.")
    scaling: float = Field(150.0, gt=0, description="α, the scale of the update.")
    places_seed: int = Field(777, ge=0, description=PLACES_HELP)


class WaveConfig(FourierConfig):
    """Hyper-parameters of WaveFT."""

    frequencies: int = Field(2592, ge=1, description="n, the number of trained coefficients a layer.")
    scaling: float = Field(25.0, gt=0, description="α, the scale of the update.")


def _sparse_enough(config: Any, m: int, n: int) -> str | None:
    too_many = config.frequencies > m * n
    return f"it has only {m * n} entries, and frequencies is {config.frequencies}" if too_many else None


FOURIERFT = FromPeft(
    "fourierft",
    "FOURIERFT",
    FourierConfig,
    MethodCard(
        title="A few Fourier coefficients of the update",
        family="reparameterised / sparse spectrum",
        paper="Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv 2405.03003",
        parameters="n for every adapted layer",
        backbones=LINEAR_AND_CONV1D,
        modality=("language", "vision"),
        identity_at_init=False,
        sharding=False,
    ),
    names={"frequencies": "n_frequency", "scaling": "scaling", "places_seed": "random_loc_seed"},
    size=lambda config, m, n: config.frequencies,
    refusal=_sparse_enough,
    conv1d=True,
)

WAVEFT = FromPeft(
    "waveft",
    "WAVEFT",
    WaveConfig,
    MethodCard(
        title="A few wavelet coefficients of the update",
        family="reparameterised / sparse spectrum",
        paper="Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, arXiv 2505.12532",
        parameters="n for every adapted layer",
        backbones=LINEAR_AND_CONV1D,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={"frequencies": "n_frequency", "scaling": "scaling", "places_seed": "random_loc_seed"},
    size=lambda config, m, n: config.frequencies,
    refusal=_sparse_enough,
    conv1d=True,
)


class ShiraConfig(LinearConfig):
    """Hyper-parameters of SHiRA."""

    rank: int = Field(32, ge=1, description="r: as many entries train as in a LoRA of this rank.")
    places_seed: int = Field(0, ge=0, description=PLACES_HELP)


SHIRA = FromPeft(
    "shira",
    "SHIRA",
    ShiraConfig,
    MethodCard(
        title="A few of the weight's own entries, of high rank",
        family="selective / sparse",
        paper="Sparse High Rank Adapters, arXiv 2406.13175",
        parameters="Σ r(m + n) over the adapted m × n layers",
        backbones=LINEAR,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={"rank": "r", "places_seed": "random_seed"},
    size=lambda config, m, n: config.rank * (m + n),
    refusal=lambda config, m, n: (
        f"it has {m * n} entries, fewer than r(m + n) = {config.rank * (m + n)}"
        if config.rank * (m + n) > m * n
        else None
    ),
)


# -- rotations ---------------------------------------------------------------------------------------------------------


class OftConfig(LinearConfig):
    """Hyper-parameters of OFT."""

    block_size: int = Field(32, ge=2, description="b, the size of each rotation: must divide every layer's inputs.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of leaving a block unrotated in training.")
    block_share: bool = Field(False, description="One rotation for all blocks of a layer.")
    neumann: bool = Field(True, description="Sum terms of a series instead of solving: faster, orthogonal nearly only.")
    neumann_terms: int = Field(5, ge=2, description="How many.")


OFT = FromPeft(
    "oft",
    "OFT",
    OftConfig,
    MethodCard(
        title="Rotations of a layer's inputs, block by block",
        family="reparameterised / orthogonal",
        paper="Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280",
        parameters="Σ n(b − 1)/2 over the adapted m × n layers",
        backbones=LINEAR,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={
        "block_size": "oft_block_size",
        "dropout": "module_dropout",
        "block_share": "block_share",
        "neumann": "use_cayley_neumann",
        "neumann_terms": "num_cayley_neumann_terms",
    },
    fixed={"r": 0},
    size=lambda config, m, n: (
        (1 if config.block_share else n // config.block_size) * config.block_size * (config.block_size - 1) // 2
    ),
    refusal=lambda config, m, n: _divides("block_size", config.block_size, n),
)


class BoftConfig(LinearConfig):
    """Hyper-parameters of BOFT."""

    block_size: int = Field(4, ge=2, description="b, the size of each rotation: must divide every layer's inputs.")
    factors: int = Field(
        1, ge=1, description="f, the number of butterfly factors; more than one need peft's CUDA code."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of leaving a block unrotated in training.")


def _butterfly_fits(config: BoftConfig, m: int, n: int) -> str | None:
    if config.factors > 1 and not (torch.cuda.is_available() and get_fbd_cuda()):
        return "factors above 1 need peft's CUDA extension, without which it would take 1 in silence"
    return _divides("block_size · 2^(factors − 1) =", config.block_size * 2 ** (config.factors - 1), n)


BOFT = FromPeft(
    "boft",
    "BOFT",
    BoftConfig,
    MethodCard(
        title="Rotations in butterfly factors, and a scale for every output",
        family="reparameterised / orthogonal",
        paper="Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243",
        parameters="Σ fnb + m over the adapted m × n layers",
        backbones=LINEAR,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={"block_size": "boft_block_size", "factors": "boft_n_butterfly_factor", "dropout": "boft_dropout"},
    size=lambda config, m, n: config.factors * n * config.block_size + m,
    refusal=_butterfly_fits,
    agree=("boft_block_size", "boft_n_butterfly_factor"),  # one permutation a layer
)


class HraConfig(LinearConfig):
    """Hyper-parameters of HRA."""

    rank: int = Field(8, ge=2, multiple_of=2, description="r, the number of reflections: even, so that pairs cancel.")
    orthogonal: bool = Field(False, description="Orthogonalise the reflections' vectors (Gram-Schmidt).")


HRA = FromPeft(
    "hra",
    "HRA",
    HraConfig,
    MethodCard(
        title="A chain of reflections of a layer's inputs",
        family="reparameterised / orthogonal",
        paper="Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection, "
        "arXiv 2405.17484",
        parameters="Σ rn over the adapted m × n layers",
        backbones=LINEAR,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={"rank": "r", "orthogonal": "apply_GS"},
    size=lambda config, m, n: config.rank * n,
)


class RoadConfig(LinearConfig):
    """Hyper-parameters of RoAd."""

    variant: Literal["road_1", "road_2", "road_4"] = Field(
        "road_1", description="How many angles and scales each pair of outputs has: one, two or four of each."
    )
    group_size: int = Field(64, ge=2, multiple_of=2, description="Outputs i and i + half a group make a pair.")


ROAD = FromPeft(
    "road",
    "ROAD",
    RoadConfig,
    MethodCard(
        title="Pairs of outputs rotated and stretched",
        family="reparameterised / rotation",
        paper="3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability, "
        "arXiv 2409.00119",
        parameters="Σ m (road_1), 2m (road_2) or 4m (road_4) over the adapted m × n layers",
        backbones=LINEAR,
        modality=("language", "vision"),
        sharding=False,
    ),
    names={"variant": "variant", "group_size": "group_size"},
    size=lambda config, m, n: m * int(config.variant[-1]),
    refusal=lambda config, m, n: _divides("group_size", config.group_size, m),
)
