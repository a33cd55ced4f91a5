"""Learning what a teacher thinks of every next token, not only which it takes (Hinton et al., arXiv 1503.02531)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import InvalidInput
from kernels.cross_entropy import IGNORE
from kernels.linear_cross_entropy import SoftTargets
from training.data.batching import Padding
from training.data.encoding import Encoded
from training.objectives.causal_lm import CausalLM
from training.objectives.labelled_positions import labelled_count, labelled_loss
from training.objectives.objective import Loss
from training.options import TrainingOptions

SoftLabels = Sequence[tuple[Tensor, Tensor]]  # of each example, token ids [T, K] and their logits


@dataclass(frozen=True, slots=True)
class Softened(Encoded):
    """An example of T labelled positions, with the teacher's K most probable tokens at each.

    Args:
        tokens: [T, K], in the student's vocabulary.
        logits: [T, K], float32.
    """

    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class SoftPadding(Padding):
    """As `Padding`; of `Softened` examples, `soft_tokens` and `soft_logits` [N, K] beside, by labelled position."""

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """The batch of `examples`: all of them `Softened`, or (in validation) none."""
        batch = Padding.__call__(self, examples)
        if soft := [example for example in examples if isinstance(example, Softened)]:
            batch["soft_tokens"] = torch.cat([example.tokens for example in soft])
            batch["soft_logits"] = torch.cat([example.logits for example in soft])
        return batch


@dataclass(frozen=True, slots=True)
class Distillation:
    """L = Σₜ (1 − w)·(−log q(xₜ)) + w·τ²·KL(p_τ ‖ q_τ) over the labelled positions of a causal language model.

    p_τ and q_τ are teacher and student at temperature τ: p over its K most probable tokens alone, q over all.
    τ² keeps the gradient's size the same at every temperature.

    Args:
        temperature: τ.
        weight: w, between 0 (labels alone) and 1 (teacher alone).
    """

    temperature: float
    weight: float

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """See `Objective`; a batch without soft labels is judged on its labels alone."""
        if "soft_tokens" not in batch:
            return CausalLM()(model, batch)
        inputs: dict[str, Any] = {name: batch[name] for name in batch if name not in _JUDGED}
        inputs["use_cache"] = False
        soft = SoftTargets(batch["soft_tokens"], batch["soft_logits"], self.temperature, self.weight)
        return labelled_loss(model, inputs, batch["labels"], shift=1, soft=soft)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """See `Objective`."""
        return labelled_count(batch["labels"], shift=1)


def require_distillable(options: TrainingOptions) -> None:
    """Raise `InvalidInput` where a teacher's logits cannot be learnt with such options."""
    if options.processes > 1 or options.packing:
        raise InvalidInput(
            "A teacher's logits are learnt on one process, and not packed.",
            "Set training.processes to 1 and training.packing to false, or learn its answers: distillation.of: text.",
        )


@dataclass(frozen=True, slots=True)
class Distilled:
    """What a student learns beside its examples' completions.

    Args:
        objective: how.
        labels: the teacher's, of each example.
    """

    objective: Distillation
    labels: SoftLabels


def softened(encoded: Sequence[Encoded], labels: SoftLabels) -> list[Softened]:
    """Examples as the student reads them, with the teacher's soft labels.

    Raises:
        InvalidInput: the student's tokenizer cuts an answer into more tokens, or fewer.
    """
    made = []
    for example, (tokens, logits) in zip(encoded, labels, strict=True):
        if sum(label != IGNORE for label in example.labels) != len(tokens):
            raise InvalidInput(
                "The two base models end their answers differently, so their tokens cannot be held against each other.",
                "Learn the answers: distillation.of: text.",
            )
        made.append(Softened(example.input_ids, example.labels, tokens, logits))
    return made


_JUDGED = ("labels", "soft_tokens", "soft_logits")
