"""Examples into batches: padded, one a row, or packed, several a row and blind to each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cross_entropy import IGNORE
from training.data.encoding import Encoded

Collate = Callable[[Sequence[Encoded]], dict[str, Tensor]]

MULTIPLE = 8  # row lengths are rounded up to it: tensor cores like it, and fewer shapes occur


@dataclass(frozen=True, slots=True)
class Padding:
    """One example a row, padded on the right.

    Gives `input_ids`, `attention_mask` [B, S] and `labels` [B, T], where T = S for language models.

    Args:
        pad: the token that fills; masked out, so any will do.
    """

    pad: int

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """The batch of `examples`, in their order."""
        aligned = all(len(example.labels) == len(example.input_ids) for example in examples)
        width = _rounded(max(len(example.input_ids) for example in examples))
        labels_width = width if aligned else max(len(example.labels) for example in examples)
        return {
            "input_ids": _matrix([example.input_ids for example in examples], width, self.pad),
            "attention_mask": _matrix([(1,) * len(example.input_ids) for example in examples], width, 0),
            "labels": _matrix([example.labels for example in examples], labels_width, IGNORE),
        }


@dataclass(frozen=True, slots=True)
class Packing:
    """Several examples a row, in as few rows as fit; a batch holds the same examples as with `Padding`.

    Gives `input_ids`, `position_ids` and `labels` [R, S]. Positions restart at each example; without an attention mask,
    transformers reads the boundaries from them and keeps the examples from attending to each other. Each filler at a
    row's end is a sequence of its own, at position 0. Whether a model and its adapter honour this is checked before
    training starts (`training.packing_check`).

    Args:
        pad: the token that fills.
        row_length: the most tokens in a row; an example that is longer gets a row of its own.
    """

    pad: int
    row_length: int

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """The batch of `examples`; first fit decreasing decides the row of each."""
        rows: list[list[Encoded]] = []
        free: list[int] = []
        for example in sorted(examples, key=lambda example: -len(example.input_ids)):
            length = len(example.input_ids)
            row = next((number for number, room in enumerate(free) if length <= room), None)
            if row is None:
                rows.append([])
                free.append(max(self.row_length, length))
                row = len(rows) - 1
            rows[row].append(example)
            free[row] -= length
        width = _rounded(max(sum(len(example.input_ids) for example in row) for row in rows))
        return {
            "input_ids": _matrix([[i for example in row for i in example.input_ids] for row in rows], width, self.pad),
            "position_ids": _matrix(
                [[position for example in row for position in range(len(example.input_ids))] for row in rows], width, 0
            ),
            "labels": _matrix([[label for example in row for label in example.labels] for row in rows], width, IGNORE),
        }


def _rounded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def _matrix(rows: Sequence[Sequence[int]], width: int, fill: int) -> Tensor:
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)
