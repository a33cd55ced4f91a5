"""The output head applied only where there is a label.

A model's vocabulary head is often its largest matrix (Gemma 3 270M: 262,144 × 640), and completion-only data label few
positions. A hook in front of the head hands it the labelled rows of the hidden states alone, so everything the
architecture does around its head (scaling, soft-capping) stays as it is, and loss and gradient are what they were.

Where the head is an ordinary linear layer, its loss is computed without ever having all logits
(`training.objectives.fused_head`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from infra.errors import InvalidInput
from kernels.cross_entropy import IGNORE, cross_entropy
from kernels.linear_cross_entropy import SoftTargets, divergence
from training.objectives.fused_head import fused_losses, output_head
from training.objectives.objective import Loss


def bare(model: nn.Module) -> nn.Module:
    """`model` without its data-parallel wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def head_sees_only(model: nn.Module, rows: Tensor, columns: Tensor, length: int) -> Iterator[None]:
    """Within it, the output head computes logits [1, N, V] for the hidden states at (rows, columns) alone.

    Args:
        model: has `get_output_embeddings()`; where that gives None, nothing is changed.
        rows: [N], indices into the batch.
        columns: [N], positions in the sequence as the caller sees it.
        length: L, of that sequence; a method that puts virtual positions in front makes it longer inside.
    """

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        hidden, *others = arguments  # [B, ≥L, H]
        return (hidden[rows, columns + (hidden.shape[1] - length)].unsqueeze(0), *others)  # [1, N, H]

    head = output_head(model)
    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


class Labelled(NamedTuple):
    """What a model makes of the labelled positions of a batch.

    Args:
        logits: [N, V].
        rows: [N], where in the batch.
        columns: [N], where among the labels.
        outputs: what the model returned.
    """

    logits: Tensor
    rows: Tensor
    columns: Tensor
    outputs: Any


class Judged(NamedTuple):
    """What a batch's labels cost.

    Args:
        losses: [N], float32, of each labelled position.
        rows: [N], where in the batch.
        outputs: what the model returned; perhaps with logits [1, 0, V], as none were made.
    """

    losses: Tensor
    rows: Tensor
    outputs: Any


def labelled_logits(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, shift: int) -> Labelled:
    """The logits from which labels are predicted.

    Args:
        model: called with `inputs`; its output has `.logits`.
        inputs: everything the model reads, without labels.
        labels: [B, L]; −100 where there is no label.
        shift: a label is predicted from the position `shift` before it: 1 for causal models, 0 for others.

    Raises:
        InvalidInput: no position of the batch has a label.
    """
    rows, columns = _labelled(labels, shift)
    length = labels.shape[1]
    with head_sees_only(bare(model), rows, columns, length):
        outputs = model(**inputs)
    logits = outputs.logits
    if tuple(logits.shape[:2]) != (1, len(rows)):  # the architecture has no separate head: select from all logits
        logits = logits[rows, columns + (logits.shape[1] - length)]
    return Labelled(logits.reshape(len(rows), -1), rows, columns + shift, outputs)


def _labelled(labels: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the positions that labels are predicted from."""
    rows, columns = (labels[:, shift:] != IGNORE).nonzero(as_tuple=True)  # [N] each
    if not len(rows):
        raise InvalidInput(
            f"None of the {labels.numel()} positions of a batch has a label, so it has no loss.",
            "Give every example a completion, or train on everything: training.loss_on: everything.",
        )
    return rows, columns


def labelled_losses(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, shift: int, soft: SoftTargets | None = None
) -> Judged:
    """The loss at each labelled position of a batch, without logits in memory where the head allows it.

    Args:
        model: as of `labelled_logits`, as are the next three, and the error.
        inputs: see there.
        labels: see there.
        shift: see there.
        soft: what a teacher says of the N labelled positions, in the order of the batch's rows.
    """
    rows, columns = _labelled(labels, shift)
    targets = labels[rows, columns + shift]
    with head_sees_only(bare(model), rows, columns, labels.shape[1]):
        fused = fused_losses(model, bare(model), inputs, targets, soft)
    if fused is not None:
        return Judged(fused.losses, rows, fused.outputs)
    found = labelled_logits(model, inputs, labels, shift)
    losses = cross_entropy(found.logits, targets)
    if soft is not None:
        losses = (1 - soft.weight) * losses + soft.weight * divergence(found.logits.float(), soft)
    return Judged(losses, rows, found.outputs)


def labelled_loss(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, shift: int, soft: SoftTargets | None = None
) -> Loss:
    """`labelled_losses`, summed."""
    found = labelled_losses(model, inputs, labels, shift, soft)
    return Loss(found.losses.sum(), len(found.rows), found.outputs)


def labelled_count(labels: Tensor, shift: int) -> Tensor:
    """How many positions `labelled_loss` judges, an integer scalar."""
    return (labels[:, shift:] != IGNORE).sum()
