"""Columns or rows of a weight that train: what S²FT and PaCA put on a linear layer W [m, n] at chosen indices I.

    columns:  y = Wx + s·Δ·x[I],            Δ ∈ ℝ^{m×k},    ∂L/∂Δ = s·gᵀx[I],    ∂L/∂x = gW + s·(gΔ) added at I
    rows:     y = Wx, y[I] += s·Δ·x,        Δ ∈ ℝ^{k×n},    ∂L/∂Δ = s·g[I]ᵀx,    ∂L/∂x = gW + s·g[I]Δ

This is W with s·Δ added to its columns (rows) I, without writing to W, which other adapters share. The derivatives are
written out, so that of the input of a layer only x[I] is kept for the backward pass, and that what Δ adds to y and to
∂L/∂x goes into the dense products' own memory: autograd would allocate a zero-filled ∂L/∂x for it and add the two. The
products with few of the features are those of kernels/partial_columns.py.

A second form was measured: a copy of W with s·Δ in it, made anew whenever Δ has changed. Forward and backward of a
576 → 1536 layer on 320 tokens, k = 16, on one CPU thread: bare 7.8 ms, copy 8.5 ms (9.3 ms with the renewal, which
every optimiser step asks for), this form 8.9 ms, this form left to autograd 10.0 ms, a LoRA of as many parameters
11.1 ms. The copy wins only where updates accumulate over several batches, and doubles the memory of the weights. The
gradient of Δ alone takes a thirtieth of the time of a gradient of W (2048 × 2048, 1 % of the columns, 512 tokens).
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from infra.errors import CorruptArtifact
from kernels.partial_columns import Columns, add_from_columns, add_to_columns, gradient_of_picked
from training.methods.injected import Slot
from training.methods.remembered import Remembered
from training.methods.targets import shape


class SliceSlot(Slot):
    """Δ and I of one layer. Δ is float32 and starts at zero; the products are taken in the dtype of the base's output.

    Args:
        indices: I, int64 [k], ascending.
        scale: s.
    """

    indices: Tensor

    def __init__(self, indices: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.scale = scale
        self.columns = Remembered(Columns)  # I, checked

    @abstractmethod
    def low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A [k, n] and B [m, k], float32, with BA the change of W [m, n]."""

    def update(self, weight: Tensor) -> Tensor:
        """s·Δ at I, zero elsewhere."""
        A, B = self.low_rank(weight)
        return B @ A


class ColumnSlot(SliceSlot):
    """Columns of W [m, n], which meet the input features I."""

    def __init__(self, indices: Tensor, m: int, scale: float = 1.0) -> None:
        super().__init__(indices, scale)
        self.delta = nn.Parameter(torch.zeros(m, len(indices)))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """y."""
        columns = self.columns.of(self.indices, x.shape[-1])
        output: Tensor = _Columns.apply(x, self.delta, columns, base, self.scale)  # type: ignore[no-untyped-call]
        return output

    def low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A picks x[I], B = s·Δ."""
        return _one_hot(self.indices, weight.shape[1]), self.scale * self.delta.detach().float()


class RowSlot(SliceSlot):
    """Rows of W [m, n], which make the output features I."""

    def __init__(self, indices: Tensor, n: int, scale: float = 1.0) -> None:
        super().__init__(indices, scale)
        self.delta_rows = nn.Parameter(torch.zeros(len(indices), n))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """y."""
        columns = self.columns.of(self.indices, shape(base)[0])
        output: Tensor = _Rows.apply(x, self.delta_rows, columns, base, self.scale)  # type: ignore[no-untyped-call]
        return output

    def low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A = s·Δ, B puts it at I."""
        return self.scale * self.delta_rows.detach().float(), _one_hot(self.indices, weight.shape[0]).T


def stored_slot(layer: nn.Module, tensors: Mapping[str, Tensor], scale: float = 1.0) -> SliceSlot:
    """A slot of the shapes that the stored `indices` and `delta` [m, k], or `delta_rows` [k, n], of one layer have.

    Raises:
        CorruptArtifact: they do not fit the layer.
    """
    m, n = shape(layer)
    of_rows = "delta_rows" in tensors
    indices, size = tensors["indices"], m if of_rows else n
    ascending = indices.ndim == 1 and indices.dtype == torch.int64 and bool((indices.diff() > 0).all())
    if not ascending or not len(indices) or indices[0] < 0 or indices[-1] >= size:
        raise CorruptArtifact(f"indices are not ascending whole numbers below {size}")
    slot: SliceSlot = RowSlot(indices.clone(), n, scale) if of_rows else ColumnSlot(indices.clone(), m, scale)
    return slot


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, columns: Columns, base: Any, scale: float) -> Tensor:
        output: Tensor = base(x)
        flat = _flat(output)
        picked = add_from_columns(flat, _flat(x), delta.detach(), columns, scale)  # a copy: it does not keep x alive
        ctx.save_for_backward(picked, delta, _weight(base))
        ctx.columns, ctx.scale, ctx.input = columns, scale, (x.shape, x.dtype)
        return flat.view(output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        picked, delta, weight = ctx.saved_tensors
        g, for_x, for_delta = _flat(g), None, None
        if ctx.needs_input_grad[0]:
            for_x = g @ weight.to(g.dtype)
            add_to_columns(for_x, g, delta.T, ctx.columns, ctx.scale)
            for_x = for_x.view(ctx.input[0]).to(ctx.input[1])
        if ctx.needs_input_grad[1]:
            for_delta = _scaled(gradient_of_picked(g, picked, delta.shape[1]), ctx.scale).to(delta.dtype)
        return for_x, for_delta, None, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, columns: Columns, base: Any, scale: float) -> Tensor:
        output: Tensor = base(x)
        flat = _flat(output)
        add_to_columns(flat, _flat(x), delta.detach(), columns, scale)
        ctx.save_for_backward(x, delta, _weight(base))
        ctx.columns, ctx.scale = columns, scale
        return flat.view(output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, delta, weight = ctx.saved_tensors
        g, for_x, for_delta = _flat(g), None, None
        if ctx.needs_input_grad[0]:
            for_x = g @ weight.to(g.dtype)
            picked = add_from_columns(for_x, g, delta.T, ctx.columns, ctx.scale)
            for_x = for_x.view(x.shape).to(x.dtype)
        else:
            picked = g.index_select(1, ctx.columns.indices)
        if ctx.needs_input_grad[1]:
            of_rows = gradient_of_picked(_flat(x).to(g.dtype), picked, len(delta)).T
            for_delta = _scaled(of_rows, ctx.scale).to(delta.dtype)
        return for_x, for_delta, None, None, None


def _weight(layer: Any) -> Tensor:
    """W [m, n] as the layer holds it, in its own dtype and memory."""
    weight: Tensor = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def _one_hot(indices: Tensor, size: int) -> Tensor:
    return nn.functional.one_hot(indices, size).float()
