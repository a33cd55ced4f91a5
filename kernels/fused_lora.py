"""A linear layer with a low-rank update, forward and backward.

For x ∈ ℝ^{T×n}, a frozen W ∈ ℝ^{m×n} with bias b, trained A ∈ ℝ^{r×n} and B ∈ ℝ^{m×r}, a scale s and dropout's mask
D ∈ {0, 1}^{T×n}, which keeps with probability q,

    y = b + x·Wᵀ + h·Bᵀ              h = (s/q)·(D∘x)·Aᵀ          (Hu et al., arXiv 2106.09685)
    ∂x = g·W + D∘(k·A)               k = (s/q)·g·B
    ∂A = kᵀ·(D∘x)     ∂B = gᵀ·h

for the gradient g of y. The products with W take nearly all the arithmetic, everything else nearly only memory: so what
counts beside them is how often a tensor of T rows goes through memory. Here x is read twice and g once (twice at ranks
beyond 32), and y and ∂x are written once before the product with W is added to them (cuBLAS's β = 1, where reading
hides behind multiplying):

    forward    x → h; h → y = b + h·Bᵀ; y += x·Wᵀ          backward   g, h → k, ∂B; x, k → ∂x = D∘(k·A), ∂A; ∂x += g·W

Only x and h [T, r] are kept for the backward pass. D is drawn anew from its seed (Philox, Salmon et al., SC 2011: seven
rounds, 16 bits an element), so p is rounded to a multiple of 2⁻¹⁶. A and B are rounded to the dtype of x, as
torch.autocast rounds them; sums are float32, and are added in an order of their own: results are reproducible.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels.dispatch import runs_on_triton
from kernels.low_rank_passes import Dropout, expand, expand_with_gradient, shrink, shrink_with_gradient

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # others are computed by PyTorch alone
# Of the kernels, by bytes of a number: beyond, products are large enough for PyTorch's, or too large to be shared.
LARGEST_RANKS = {2: 256, 4: 64}


class _OnTriton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
    ) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        low_A, low_B = (factor.to(x.dtype).contiguous() for factor in (A, B))
        ctx.dropout = Dropout.drawn(p, x.device)
        ctx.scale = scale / ctx.dropout.share_kept if ctx.dropout else scale
        ctx.dtypes = A.dtype, B.dtype
        h = shrink(x, low_A, ctx.scale, ctx.dropout)
        y = expand(h, low_B.T, bias)
        ctx.save_for_backward(x, W, low_A, low_B, h)
        return y.addmm_(x, W.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        to_x, _, _, to_A, to_B, _, _ = ctx.needs_input_grad
        g = upstream[0] if upstream[0].stride(1) == 1 else upstream[0].contiguous()
        k, of_B = shrink_with_gradient(g, B.T, h, ctx.scale, wanted=to_B)
        of_x, of_A = expand_with_gradient(k, A, x, ctx.dropout, wanted=(to_x, to_A))
        if of_x is not None:
            of_x.addmm_(g, W)
        return (
            of_x,
            None,
            None,
            None if of_A is None else of_A.to(ctx.dtypes[0]),
            None if of_B is None else of_B.T.to(ctx.dtypes[1]),
            None,
            None,
        )


class _InPytorch(torch.autograd.Function):
    """The same equations as products that are added where their sum goes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
    ) -> Tensor:
        low_A, low_B = A.to(x.dtype), B.to(x.dtype)
        ctx.scale, ctx.p, ctx.dtypes = scale, p, (A.dtype, B.dtype)
        ctx.random = _generator(x.device).get_state() if p else None
        dropped = x * _noise(x, p, _generator(x.device)) if p else x
        h = (dropped @ low_A.T).mul_(scale)
        y = functional.linear(x, W, bias).addmm_(h, low_B.T)
        ctx.save_for_backward(x, W, low_A, low_B, h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        to_x, _, _, to_A, to_B, _, _ = ctx.needs_input_grad
        (g,) = upstream
        k = (g @ B).mul_(ctx.scale)
        noise = None
        if ctx.p:
            generator = torch.Generator(x.device)
            generator.set_state(ctx.random)
            noise = _noise(x, ctx.p, generator)
        of_x = None
        if to_x:
            of_x = g @ W
            if noise is None:
                of_x.addmm_(k, A)
            else:
                of_x.addcmul_(k @ A, noise)
        of_A = (k.T @ (x if noise is None else x * noise)).to(ctx.dtypes[0]) if to_A else None
        of_B = (g.T @ h).to(ctx.dtypes[1]) if to_B else None
        return of_x, None, None, of_A, of_B, None, None


def fused_lora_reference(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """`fused_lora`, term by term."""
    update = functional.dropout(x, dropout) @ A.to(x.dtype).T @ B.to(x.dtype).T
    return functional.linear(x, W, bias) + scale * update


def fused_lora(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """y = b + x·Wᵀ + s·dropout(x)·Aᵀ·Bᵀ, with gradients for x, A and B; W and b are frozen.

    Computed in the dtype of x, whatever torch.autocast says.

    Args:
        x: [..., n], of any strides.
        W: [m, n], of x's dtype and any strides: a transposed one is as fast.
        bias: [m] of x's dtype, or None.
        A: [r, n], of any floating dtype, as is B.
        B: [m, r].
        scale: s.
        dropout: p, the probability with which each element of x is dropped on its way to A; whether a model is in
            training is the caller's to know. The mask is drawn from the generator of x's device.

    Returns:
        [..., m], contiguous, of x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, W or b wants a gradient, or dropout is not in [0, 1).
    """
    check_lora(x, W, bias, A, B, dropout)
    function = _OnTriton if _fits_kernels(x, A, B) else _InPytorch
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = function.apply(  # type: ignore[no-untyped-call]
            x.reshape(prod(x.shape[:-1]), x.shape[-1]), W, bias, A, B, scale, dropout
        )
    return y.view(*x.shape[:-1], len(W))


def _fits_kernels(x: Tensor, A: Tensor, B: Tensor) -> bool:
    return (
        runs_on_triton(x)
        and x.dtype in KERNEL_DTYPES
        and 1 <= len(A) <= LARGEST_RANKS[x.dtype.itemsize]
        and x.numel() > 0
        and len(B) > 0
        and max(x.numel() // x.shape[-1], A.numel(), B.numel()) < 2**31  # places that are counted in 32 bits
    )


def check_lora(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, dropout: float) -> None:
    """Refuse what is no LoRA of a linear layer for x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, W or b wants a gradient, or dropout is not in [0, 1).
    """
    if x.ndim == 0 or W.ndim != 2 or x.shape[-1] != W.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}, which no W of shape {tuple(W.shape)} can be applied to.")
    m, n = W.shape
    if A.ndim != 2 or A.shape[1] != n or B.shape != (m, len(A)):
        raise ValueError(
            f"W {m} × {n} needs A of shape (r, {n}) and B of shape ({m}, r), not {tuple(A.shape)} and {tuple(B.shape)}."
        )
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"The bias of {m} outputs is not of shape {tuple(bias.shape)}.")
    if not {x.dtype, A.dtype, B.dtype} <= {*KERNEL_DTYPES, torch.float64}:
        raise ValueError(f"x, A and B cannot be {x.dtype}, {A.dtype} and {B.dtype}: only floats of 16 to 64 bits.")
    if any(tensor.dtype != x.dtype for tensor in (W, bias) if tensor is not None):
        raise ValueError(f"W and its bias must be of x's dtype, {x.dtype}; W is {W.dtype}.")
    if any(tensor.device != x.device for tensor in (W, bias, A, B) if tensor is not None):
        raise ValueError(f"x is on {x.device}, but not all of W, its bias, A and B.")
    if W.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("W and its bias are frozen here: they get no gradient.")
    if not 0 <= dropout < 1:
        raise ValueError(f"Dropout is a probability below 1, not {dropout}.")


def _generator(device: torch.device) -> torch.Generator:
    """The one that PyTorch's own dropout draws from."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def _noise(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """D/q, drawn as `functional.dropout` draws it on the CPU."""
    noise = torch.empty_like(x, memory_format=torch.contiguous_format)
    return noise.bernoulli_(1 - p, generator=generator).div_(1 - p)
