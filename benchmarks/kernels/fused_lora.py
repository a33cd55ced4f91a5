"""LoRA's linear layer, forward and backward, against peft's own layer, torch.compile and the frozen layer alone.

    python -m benchmarks.kernels.fused_lora
    python -m benchmarks.kernels.one fused_lora --sweep

peft's layer is a real `peft.tuners.lora.layer.Linear` on a frozen base, with its adapter in the base's dtype or, as
peft has it by default (autocast_adapter_dtype), in float32; ours computes on the same tensors. On a GPU all is timed
within CUDA graphs, in bfloat16, so that launching counts for nobody; --sweep times every pass alone, with other tiles
and against PyTorch's products. On the CPU the layers of a block of SmolLM2 are run in turn, on one thread, and times
are the processor's; dropout is not measured there, as drawing a mask twice takes longer than keeping it. Results are
compared first: a wrong one ends the benchmark.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.kernels.measuring import (
    Ceilings,
    event_seconds,
    gpu_peak_bytes,
    graph_seconds,
    require_equal,
)
from benchmarks.kernels.one import measure
from benchmarks.results_file import Row
from kernels import low_rank_passes as kernel
from kernels.dora import fused_dora, row_squares
from kernels.fused_lora import fused_lora
from kernels.low_rank_passes import Tile

REPEATS = 9
TOKENS = 8192
GPU_SHAPES = ((4096, 4096), (4096, 14336))  # n, m
RANKS = (16, 64)
DROPOUT = 0.05
GOAL = 1 / 1.3
# SmolLM2's layers of one block: query, key, value, output, gate, up, down.
CPU_SHAPES = {
    "SmolLM2-135M": ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)),
    "SmolLM2-360M": ((960, 960), (960, 320), (960, 320), (960, 960), (960, 2560), (960, 2560), (2560, 960)),
}
CPU_TOKENS, CPU_RANK = 512, 8

Step = Callable[[], tuple[Tensor, ...]]


class Layer:
    """One layer of peft's, its input and its output's gradient.

    Args:
        n: inputs.
        m: outputs.
        rank: r.
        tokens: T.
        dtype: of the base.
        adapter_dtype: of A and B.
        device: where.
        dropout: p.
        dora: whether the layer has a magnitude.
    """

    def __init__(
        self,
        n: int,
        m: int,
        rank: int,
        tokens: int,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        device: str,
        dropout: float = 0.0,
        dora: bool = False,
    ) -> None:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear

        torch.manual_seed(0)
        base = nn.Linear(n, m, bias=False, device=device, dtype=dtype).requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, use_dora=dora, init_lora_weights=False)
        self.layer = _made(Linear, base, config).to(device)
        for module in (self.layer.lora_A, self.layer.lora_B, self.layer.lora_magnitude_vector):
            module.to(adapter_dtype)
        self.layer.train()
        self.W = base.weight
        self.A, self.B = self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight
        self.scale = self.layer.scaling["default"]
        self.dropout = dropout
        self.magnitude = self.layer.lora_magnitude_vector["default"].weight if dora else None
        self.squares = row_squares(self.W) if dora else None
        self.x = torch.randn(tokens, n, device=device, dtype=dtype).requires_grad_()
        self.g = torch.randn(tokens, m, device=device, dtype=dtype)

    def _gradients(self, y: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        return (y.detach(), *torch.autograd.grad(y, [self.x, *factors], self.g))

    @property
    def _trained(self) -> list[Tensor]:
        return [self.A, self.B] if self.magnitude is None else [self.A, self.B, self.magnitude]

    def theirs(self) -> tuple[Tensor, ...]:
        """y and all gradients by peft."""
        return self._gradients(self.layer(self.x), *self._trained)

    def ours(self) -> tuple[Tensor, ...]:
        """The same by the kernels."""
        if self.magnitude is None:
            y = fused_lora(self.x, self.W, None, self.A, self.B, self.scale, self.dropout)
        else:
            arguments = self.magnitude, self.scale, self.squares, self.dropout
            y = fused_dora(self.x, self.W, None, self.A, self.B, *arguments)
        return self._gradients(y, *self._trained)

    def frozen(self) -> tuple[Tensor, ...]:
        """y and the gradient of x by the base layer alone."""
        return self._gradients(functional.linear(self.x, self.W))

    def compiled(self) -> Step:
        """The formula as torch.compile has it."""

        @torch.compile(dynamic=False)
        def formula(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
            return x @ W.T + scale * (x @ A.T @ B.T)

        return lambda: self._gradients(formula(self.x, self.W, self.A, self.B, self.scale), self.A, self.B)

    def require_right(self) -> None:
        """End the benchmark where ours are not peft's results; with dropout the masks differ."""
        if not self.dropout:
            for ours, theirs in zip(self.ours(), self.theirs(), strict=True):
                require_equal(ours, theirs, "LoRA's linear layer", 2**-5)


def _made(Linear: Any, base: nn.Module, config: Any) -> Any:
    """peft's layer; what its constructor takes has changed between versions."""
    try:
        return Linear(base, "default", config, r=config.r, lora_alpha=config.lora_alpha)
    except TypeError:
        return Linear(
            base,
            "default",
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_dora=config.use_dora,
            init_lora_weights=False,
        )


def on_gpu(ceilings: Ceilings, repeats: int = REPEATS) -> list[Row]:
    rows = []
    for n, m in GPU_SHAPES:
        for rank in RANKS:
            low = Layer(n, m, rank, TOKENS, torch.bfloat16, torch.bfloat16, "cuda")
            high = Layer(n, m, rank, TOKENS, torch.bfloat16, torch.float32, "cuda")
            for layer in (low, high):
                layer.require_right()
            claim = f"{TOKENS} tokens through {n}→{m} with LoRA of rank {rank}, forward and backward, bfloat16"
            seconds = graph_seconds([low.ours], repeats)
            peer = graph_seconds([low.theirs], repeats)
            rows.append(_milliseconds(claim, seconds, peer, "peft, adapter in bfloat16", GOAL))
            own, peer = graph_seconds([high.ours], repeats), graph_seconds([high.theirs], repeats)
            rows.append(
                _milliseconds(f"{claim}, adapter in float32", own, peer, "peft, adapter in float32, its default", GOAL)
            )
            peer = graph_seconds([low.frozen], repeats)
            rows.append(_milliseconds(claim, seconds, peer, "the frozen layer alone", 1.25))
            if rank == RANKS[0]:
                rows += _compiled_row(claim, low, seconds, repeats)
                rows.append(
                    Row(f"{claim}: memory", gpu_peak_bytes(low.ours) / 1e6, gpu_peak_bytes(low.theirs) / 1e6,
                        "peft, adapter in bfloat16", "MB", 0.75, "lower")
                )  # fmt: skip
            products = 4 * TOKENS * n * m  # of the two products with W; the others are none of the roofline's
            rows.append(
                Row(f"{claim}: share of the roofline", products / seconds / 1e12, ceilings.rate / 1e12,
                    "a large matrix product", "TFLOP/s", 0.75)
            )  # fmt: skip
            del low, high
    n, m = GPU_SHAPES[0]
    for what, dropout, dora in (("dropout", DROPOUT, False), ("DoRA", 0.0, True), ("DoRA and dropout", DROPOUT, True)):
        layer = Layer(n, m, RANKS[0], TOKENS, torch.bfloat16, torch.bfloat16, "cuda", dropout, dora)
        layer.require_right()
        claim = f"{TOKENS} tokens through {n}→{m} with {what}, rank {RANKS[0]}, forward and backward, bfloat16"
        own, peer = graph_seconds([layer.ours], repeats), graph_seconds([layer.theirs], repeats)
        rows.append(_milliseconds(claim, own, peer, "peft, adapter in bfloat16", GOAL))
    return [*rows, *_trained_rows(repeats)]


def _trained_rows(repeats: int) -> list[Row]:
    """Small layers as the trainer runs them, launches included: in autocast, with adapters in float32."""
    rows = []
    for model, shapes in CPU_SHAPES.items():
        layers = [Layer(n, m, CPU_RANK, CPU_TOKENS, torch.bfloat16, torch.float32, "cuda") for n, m in shapes]

        def run(*steps: Step) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                for step in steps:
                    step()

        own = event_seconds(partial(run, *(layer.ours for layer in layers)), repeats)
        peer = event_seconds(partial(run, *(layer.theirs for layer in layers)), repeats)
        claim = (
            f"{CPU_TOKENS} tokens through a block of {model} with LoRA of rank {CPU_RANK}, bfloat16 autocast, launched"
        )
        rows.append(_milliseconds(claim, own, peer, "peft, adapter in float32, its default", 1.0))
    return rows


def _milliseconds(claim: str, ours: float, peer: float, name: str, goal: float) -> Row:
    return Row(claim, 1e3 * ours, 1e3 * peer, name, "ms", goal, "lower")


def _compiled_row(claim: str, layer: Layer, seconds: float, repeats: int) -> list[Row]:
    try:
        peer = graph_seconds([layer.compiled()], repeats)
    except Exception as error:  # a peer that does not run here is no reason to measure nothing
        print(f"torch.compile is left out: {type(error).__name__}: {str(error)[:200]}")
        return []
    return [_milliseconds(claim, seconds, peer, "torch.compile", 1.0)]


def on_cpu(repeats: int = REPEATS) -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for model, shapes in CPU_SHAPES.items():
        for what, dora, goal in (("LoRA", False, 1.0), ("DoRA", True, 0.9)):
            layers = [
                Layer(n, m, CPU_RANK, CPU_TOKENS, torch.float32, torch.float32, "cpu", dora=dora) for n, m in shapes
            ]
            for layer in layers:
                layer.require_right()
            ours, theirs = processor_seconds_in_turn([[x.ours for x in layers], [x.theirs for x in layers]], repeats)
            claim = f"{CPU_TOKENS} tokens through a block of {model} with {what} of rank {CPU_RANK}, float32"
            rows.append(_milliseconds(claim, ours, theirs, "peft", goal))
    return rows


def processor_seconds_in_turn(work: Sequence[Sequence[Step]], repeats: int) -> list[float]:
    """Median processor seconds of each of several pieces of work, run one after the other again and again."""
    found: list[list[float]] = [[] for _ in work]
    for _ in range(repeats + 1):
        for steps, seconds in zip(work, found, strict=True):
            began = time.process_time()
            for step in steps:
                step()
            seconds.append(time.process_time() - began)
    return [median(seconds[1:]) for seconds in found]


# Of each pass: what its tile may be changed to, and how many times a tensor of all tokens goes through memory.
TILES: dict[str, tuple[int, tuple[dict[str, int], ...]]] = {
    "SHRINK": (1, ({}, {"columns": 256, "stages": 3}, {"columns": 64, "stages": 6}, {"stages": 3}, {"programs": 264})),
    "EXPAND": (1, ({}, {"columns": 256}, {"columns": 256, "warps": 8}, {"programs": 528}, {"programs": 2112})),
    "BOTH": (2, ({}, {"columns": 256, "warps": 8}, {"stages": 4}, {"programs": 528}, {"warps": 8})),
    "JOINT": (
        1,
        (
            {},
            {"stages": 4},
            {"columns": 128, "programs": 264},
            {"columns": 512, "stages": 2},
            {"columns": 512, "stages": 3, "warps": 8},
            {"stages": 2, "programs": 264},
        ),
    ),
}


def sweep(ceilings: Ceilings) -> None:
    """Print how long each pass takes by itself, with several tiles, beside PyTorch's products for the same."""
    for rank in RANKS:
        print(f"rank {rank}: µs, and the share of the copying bandwidth for what must be moved")
        _sweep_passes(Layer(4096, 4096, rank, TOKENS, torch.bfloat16, torch.bfloat16, "cuda"), ceilings)


def _sweep_passes(layer: Layer, ceilings: Ceilings) -> None:
    x, g, W, A, B = (tensor.detach() for tensor in (layer.x, layer.g, layer.W, layer.A, layer.B))
    h, y = x @ A.T, x @ W.T
    mask = kernel.Dropout.drawn(DROPOUT, x.device)

    def told(what: str, work: Callable[[], object], passes: int) -> None:
        try:
            seconds = graph_seconds([work], 5)
        except Exception as error:  # a tile that does not fit this GPU
            print(f"  {what}: {type(error).__name__} {str(error)[:120]}")
            return
        share = passes * x.numel() * x.element_size() / seconds / ceilings.bandwidth
        print(f"  {what}: {1e6 * seconds:.1f}, {share:.2f}", flush=True)

    told("x·Wᵀ", lambda: x @ W.T, 2)
    told("y += x·Wᵀ", lambda: y.addmm_(x, W.T), 3)
    told("∂x = g·W", lambda: g @ W, 2)
    told("∂x += g·W", lambda: y.addmm_(g, W), 3)
    told("PyTorch: h", lambda: x @ A.T, 1)
    told("PyTorch: h·Bᵀ", lambda: h @ B.T, 1)
    told("PyTorch: y += h·Bᵀ", lambda: y.addmm_(h, B.T), 2)
    told("PyTorch: k", lambda: g @ B, 1)
    told("PyTorch: ∂B", lambda: g.T @ h, 1)
    told("PyTorch: ∂A", lambda: h.T @ x, 1)
    passes: dict[str, Callable[[], object]] = {
        "SHRINK": lambda: kernel.shrink(x, A, 1.0),
        "EXPAND": lambda: kernel.expand(h, B.T, None),
        "BOTH": lambda: kernel.expand_with_gradient(h, A, x, None),
        "JOINT": lambda: kernel.shrink_with_gradient(g, B.T, h, 1.0),
    }
    for name, work in passes.items():
        chosen: Tile = getattr(kernel, name)
        moved, changes = TILES[name]
        for change in changes if len(A) <= RANKS[0] else changes[:2]:
            setattr(kernel, name, replace(chosen, **change))
            told(f"{name} {change or 'as it is'}", work, moved)
        setattr(kernel, name, chosen)
    told("k by itself", lambda: kernel.shrink(g, B.T, 1.0), 1)
    told("∂B by itself", lambda: kernel._launch_stripes(kernel.BOTH, g, B.T, h, gradient=True), 1)
    told("SHRINK with dropout", lambda: kernel.shrink(x, A, 1.0, mask), 1)
    told("BOTH with dropout", lambda: kernel.expand_with_gradient(h, A, x, mask), 2)


if __name__ == "__main__":
    measure("fused_lora")
