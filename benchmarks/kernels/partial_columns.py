"""Products with a few columns of a weight, and their gradient, against the dense gradient and against copies.

On the CPU in turn with what it is compared with: seconds of the processor on one thread, and of the clock on two, which
only mean something on an idle machine. On a GPU in bfloat16, in CUDA graphs. Results are compared first: a wrong one
ends the benchmark.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.measuring import (
    CPU_CLOCKS,
    Ceilings,
    graph_seconds,
    interleaved_seconds,
    require_equal,
)
from benchmarks.kernels.one import measure
from benchmarks.results_file import Row
from kernels.partial_columns import Columns, add_from_columns, add_to_columns, column_gradient, gradient_of_picked

REPEATS = 9
CPU_SHAPE, CPU_TOKENS = (2048, 2048), 512
GPU_SHAPES = {"attention": (4096, 4096), "MLP": (14336, 4096)}
GPU_TOKENS = 8192
GPU_COLUMNS = (41, 128)  # 1 % of 4096; a head


def problem(
    shape: tuple[int, int], k: int, tokens: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Columns]:
    """g, x, B [m, k] in float32, and I."""
    m, n = shape
    generator = torch.Generator(device).manual_seed(0)
    chosen = torch.randperm(n, generator=generator, device=device)[:k].sort().values
    g, x = (torch.randn(tokens, size, generator=generator, device=device).to(dtype) for size in shape)
    return g, x, torch.randn(m, k, generator=generator, device=device) / k**0.5, Columns(chosen, n)


def on_cpu() -> list[Row]:
    m, n = CPU_SHAPE
    g, x, _, columns = problem(CPU_SHAPE, n // 100, CPU_TOKENS, torch.float32, "cpu")
    gradients: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: column_gradient(g, x, columns),
        "the dense gradient and a gather": lambda: (g.T @ x)[:, columns.indices],
    }
    require_equal(gradients["ours"](), gradients["the dense gradient and a gather"](), "gradient", 1e-5)
    rows = []
    for threads, clock, unit in CPU_CLOCKS:
        torch.set_num_threads(threads)
        seconds = interleaved_seconds(gradients, REPEATS)
        ours, peer = (1e3 * seconds[each][clock] for each in gradients)
        claim = f"gradient of 1 % of the columns of {m}×{n}, {CPU_TOKENS} tokens"
        rows.append(Row(claim, ours, peer, "the dense gradient and a gather", unit, 1 / 15, "lower"))
    return rows


def on_gpu(ceilings: Ceilings) -> list[Row]:
    rows = []
    for name, shape in GPU_SHAPES.items():
        for k in GPU_COLUMNS:
            rows += _rows(f"{k} columns of {shape[0]}×{shape[1]} ({name})", shape, k, ceilings)
    return rows


def _rows(name: str, shape: tuple[int, int], k: int, ceilings: Ceilings) -> list[Row]:
    m = shape[0]
    g, x, B, columns = problem(shape, k, GPU_TOKENS, torch.bfloat16, "cuda")
    chosen, rounded = columns.indices, B.bfloat16()
    y, into = torch.randn_like(g), torch.randn_like(x)

    def picked_product() -> Tensor:
        return (x.index_select(1, chosen).T @ g).T

    def dense_gradient() -> Tensor:
        return (g.T @ x)[:, chosen]

    require_equal(column_gradient(g, x, columns), dense_gradient(), f"gradient of {name}")
    picked = add_from_columns(torch.zeros_like(y), x, B, columns)
    require_equal(gradient_of_picked(g, picked, k), dense_gradient(), f"gradient of picked, {name}")
    expected = y.double() + x.double()[:, chosen] @ rounded.double().T
    found = y.clone()
    add_from_columns(found, x, B, columns)
    require_equal(found, expected, f"from {name}")
    expected = into.double().index_add(1, chosen, g.double() @ rounded.double())
    found = into.clone()
    add_to_columns(found, g, B.T, columns)
    require_equal(found, expected, f"to {name}")
    del expected, found

    rows, size = [], x.element_size()
    tall = GPU_TOKENS * m * size
    compact = x.index_select(1, chosen)

    def copied_from() -> None:
        y.addmm_(x.index_select(1, chosen), B.bfloat16().T)

    def copied_to() -> None:
        into.index_add_(1, chosen, g @ B.bfloat16())

    gathered = GPU_TOKENS * k * 32  # a sector for each number of the chosen columns
    pairs: tuple[tuple[str, Callable[[], object], Callable[[], object], str, float, float], ...] = (
        ("gradient", lambda: column_gradient(g, x, columns), dense_gradient, "dense, gathered", 0.25, tall + gathered),
        ("gradient", lambda: column_gradient(g, x, columns), picked_product, "a copy, cuBLAS", 1.0, tall + gathered),
        (
            "gradient of a copy",
            lambda: gradient_of_picked(g, picked, k),
            lambda: (compact.T @ g).T,
            "cuBLAS",
            1.0,
            tall,
        ),
        ("forward, from", lambda: add_from_columns(y, x, B, columns), copied_from, "cuBLAS", 1.0, 2 * tall + gathered),
        (
            "backward, to",
            lambda: add_to_columns(into, g, B.T, columns),
            copied_to,
            "cuBLAS, index_add",
            1.0,
            tall + 2 * gathered,
        ),
    )
    for what, ours, theirs, peer, goal, moved in pairs:
        seconds = graph_seconds([ours], REPEATS)
        rows.append(
            Row(f"{what}, {name}", 1e6 * seconds, 1e6 * graph_seconds([theirs], REPEATS), peer, "µs", goal, "lower")
        )
        if peer != "dense, gathered":
            claim = f"{what}, {name}: bytes that must be moved"
            rows.append(Row(claim, moved / seconds / 1e9, ceilings.bandwidth / 1e9, "copying", "GB/s", 0.6))
    return rows


if __name__ == "__main__":
    measure("partial_columns")
