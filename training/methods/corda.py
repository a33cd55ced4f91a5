"""CorDA: LoRA that starts from the weight's components in the context of some data (Yang et al., arXiv 2406.05223).

    C = mean over sequences of XᵀX, X ← X/|max X|,    C̃ = C + λ·mean(diag C)·I        [n, n]
    W·C̃ = U·diag(S)·Vᵀ,    W = U·diag(S)·(Vᵀ·C̃⁻¹)                                     [m, n]
    A₀ = diag(√(S/s))·Vᵀ·C̃⁻¹,    B₀ = U·diag(√(S/s)),    of r of the components

Mode `ipm` (instruction-previewed) takes the r largest: what matters most to the calibration data trains, as PiSSA's
principal part does for W alone. `kpm` (knowledge-preserved) takes the r smallest: calibrated on what the model shall
keep (questions on world knowledge), the training moves what those hardly use. X [L, n] is one sequence's input of the
layer, its maximum the signed one; λ = 0.01 is doubled until C̃·C̃⁻¹ is within 0.05 of I.

As in peft and unlike the authors' code, the scale s = α/r divides S, the mean is over the sequences that there are, and
biases do not train. Unlike both, padding is left out of C, a maximum of (nearly) zero gives way to the largest modulus,
and W − s·B₀A₀ is not written into the base (see started_lora.py). Layers that read the same tensor share one C.
The learning rate is PiSSA's, 2e-5; rank 128 is the paper's for models of 7 B.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from infra.errors import InvalidInput
from training.methods.calibration import draw, observe, rows_of, sharing_inputs
from training.methods.contract import AttachContext, MethodCard
from training.methods.injected import matrix
from training.methods.plain_lora import Pair
from training.methods.started_lora import StartedLora, StartedLoraConfig
from training.methods.targets import shape

DAMPING = 0.01  # λ
INVERSE_ERROR = 0.05  # of C̃·C̃⁻¹ − I, Frobenius
NOTHING = 1e-8  # of the largest singular value: below it even float64 sees only rounding
PASS_BYTES = 4 << 30  # of covariances held at once; more layers take another pass over the data


class CordaConfig(StartedLoraConfig):
    """Hyper-parameters of CorDA."""

    rank: int = Field(128, ge=1, description="r, the number of components that train.")
    mode: Literal["ipm", "kpm"] = Field(
        "ipm", description="Train the components that matter most to the calibration data (ipm), or least (kpm)."
    )
    samples: int = Field(256, ge=1, description="Calibration sequences.")


class Corda(StartedLora):
    """CorDA."""

    name = "corda"
    config_type = CordaConfig
    card = MethodCard(
        title="LoRA that starts as the part of the weights that some data need most, or least",
        family="reparameterised / low rank, initialisation",
        paper="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models, arXiv 2406.05223",
        parameters="Σ r(m + n) over the adapted m × n layers",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        needs_calibration=True,
        sharding=False,
    )

    def pairs(
        self, model: nn.Module, layers: Mapping[str, nn.Module], config: Any, context: AttachContext
    ) -> dict[str, Pair]:
        """The chosen components of every layer, the square root of S on either side."""
        groups = sharing_inputs(model, layers, next(draw(context, model, self.name, samples=1)))
        pairs: dict[str, Pair] = {}
        for leaders in passes({leader: shape(layers[leader])[1] for leader in groups}):
            covariances = self._covariances(model, {name: layers[name] for name in leaders}, config, context)
            for leader in leaders:
                damped, inverse = invertible(covariances.pop(leader))
                for name in groups[leader]:
                    W = matrix(layers[name])
                    U, S, Vh = components(W @ damped, config.rank, config.mode == "ipm")
                    root = (S / config.scale).sqrt()
                    pairs[name] = (root[:, None] * (Vh @ inverse), U * root)
                    context.tell("components in context", len(pairs), len(layers))
        return pairs

    def _covariances(
        self, model: nn.Module, layers: Mapping[str, Any], config: Any, context: AttachContext
    ) -> dict[str, Tensor]:
        """C [n, n] of each of `layers`, float32, where the layer's weight is.

        Raises:
            InvalidInput: the data hold fewer tokens than a layer gets components.
        """
        sums = {
            name: torch.zeros(n, n, device=layer.weight.device)
            for name, layer in layers.items()
            for n in shape(layer)[1:]
        }
        counts, tokens = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

        def hear(name: str, x: Tensor, kept: Tensor) -> None:
            if kept.any():
                rows = x[kept].float() / largest(x, kept).repeat_interleave(kept.sum(1))[:, None]
                add_gram(sums[name], rows)  # one product for all: C is large, and each pass over it takes time
                counts[name] += int(kept.any(1).sum())
                tokens[name] += len(rows)

        done = 0
        for batch in draw(context, model, self.name, config.samples):
            observe(model, layers, batch, hear)
            done += rows_of(batch)
            context.tell("covariances of the layers' inputs", done, config.samples)
        scarcest = min(tokens, key=lambda name: tokens[name])
        if tokens[scarcest] < config.rank:  # what is left of the rank would be of directions that the data do not have
            raise InvalidInput(
                f"The calibration data hold {tokens[scarcest]} tokens for {scarcest}, fewer than rank {config.rank}.",
                "Lower method.rank, or give more data.",
            )
        return {name: mirrored(total) / max(counts[name], 1) for name, total in sums.items()}


def passes(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """The names of layers, by the width of their input, in runs whose covariances fit `PASS_BYTES`."""
    run: list[str] = []
    held = 0
    for name, n in widths.items():
        if run and held + 4 * n * n > PASS_BYTES:
            yield run
            run, held = [], 0
        run.append(name)
        held += 4 * n * n
    yield run


def components(X: Tensor, rank: int, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], S [r] descending and Vᵀ [r, n] of the r largest or smallest singular values of X [m, n].

    From the eigenvectors of the smaller of XᵀX and XXᵀ in float64, which takes half the time of a decomposition in
    float32, and is more accurate down to 1e-7 of the largest value. The other side's vectors follow from X itself, so
    that the product of the three is exact even below that; no value is below 1e-8 of the largest.
    """
    tall = len(X) >= X.shape[1]
    X64 = X.double()
    values, vectors = torch.linalg.eigh(X64.T @ X64 if tall else X64 @ X64.T)  # ascending
    floor = max(NOTHING**2 * float(values[-1]), torch.finfo(torch.float32).tiny)
    chosen = slice(len(values) - rank, None) if largest else slice(rank)
    S, vectors = values[chosen].flip(0).clamp_min(floor).sqrt(), vectors[:, chosen].flip(1)
    if tall:
        return ((X64 @ vectors) / S).float(), S.float(), vectors.T.float()
    return vectors.float(), S.float(), ((vectors.T @ X64) / S[:, None]).float()


def add_gram(total: Tensor, X: Tensor) -> None:
    """Add XᵀX of X [t, n] to `total` [n, n], all but its lower left quarter, which mirrors the upper right one."""
    half = len(total) // 2
    total[:half].addmm_(X[:, :half].T, X)
    total[half:, half:].addmm_(X[:, half:].T, X[:, half:])


def mirrored(total: Tensor) -> Tensor:
    """`total` of `add_gram`, with the quarter that lacks."""
    half = len(total) // 2
    total[half:, :half] = total[:half, half:].T
    return total


def largest(x: Tensor, kept: Tensor) -> Tensor:
    """|max X| [B] of each sequence's tokens that are kept; the largest modulus where that is no size to divide by.

    Args:
        x: [B, L, n].
        kept: [B, L] boolean.
    """
    low, high = (extreme.float() for extreme in x.aminmax(dim=-1))
    lowest, highest = low.masked_fill(~kept, torch.inf).amin(1), high.masked_fill(~kept, -torch.inf).amax(1)
    peak, modulus = highest.abs(), torch.maximum(highest, -lowest)
    return torch.where(peak > 1e-6 * modulus, peak, modulus).clamp_min(torch.finfo(torch.float32).tiny)


def invertible(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """C̃ and C̃⁻¹ [n, n] of C, finite."""
    eye = torch.eye(len(covariance), device=covariance.device)
    level = covariance.diagonal().mean()
    if level == 0:  # the layer reads nothing but zeros: no direction of it is before another
        return eye, eye
    damping = DAMPING
    while True:
        damped = covariance + damping * level * eye
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            if torch.dist(damped @ inverse, eye) < INVERSE_ERROR:
                return damped, inverse
        damping *= 2


METHOD = Corda()
