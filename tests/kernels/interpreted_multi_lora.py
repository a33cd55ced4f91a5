"""Run by test_multi_lora.py in a process of its own: prints, for each case, how far kernels and float64 are apart."""

import json
import sys

import torch

from kernels.batch_plan import FEW, MANY, SINGLE, Tiling, plan_batch, replan
from kernels.dispatch import runs_on_triton
from kernels.multi_lora import add_multi_lora
from tests.kernels.adapters import expected, scattered_pool
from tests.kernels.packed import error, inputs

TILINGS = {"single": SINGLE, "few": FEW, "many": MANY}
# Inputs, outputs, page width: rank rows of several pages, of one, of no whole page; one column; pages that only a small
# power of two divides. On a GPU each case is compiled: what shapes have nothing to do with is not tried with each.
WHOLE, SHAPES = (1056, 300, 256), ((130, 70, 64), (1, 200, 128), (96, 1, 192))
CASES = {
    f"{n}x{m} of {width}, {kind}, {dtype}": ((n, m, width), dtype, kind)
    for shape, kinds, dtypes in (
        (WHOLE, ("single", "few", "many"), ("float32", "bfloat16")),
        (SHAPES[0], ("single", "few", "many"), ("float16",)),
        (SHAPES[1], ("single", "few"), ("float16",)),
        (SHAPES[2], ("single", "many"), ("float32",)),
    )
    for n, m, width in [shape]
    for kind in kinds
    for dtype in dtypes
}
RANKS = (1, 16, 0, 33, 70)


def mixed(tiling: Tiling) -> tuple[int, ...]:
    """Groups of one row, two, and more than a tile, in any order; rows of nobody, and of one who leaves it alone."""
    return (0, 3, 1, -1, 2, 4, 1, -1, *[3] * (tiling.rows + 1), 4, *[1] * tiling.rows)


def case(shape: tuple[int, int, int], name: str, tiling: Tiling, device: str) -> dict[str, float | bool]:
    n, m, width = shape
    dtype = getattr(torch, name)
    pool, loras = scattered_pool(n, m, width, RANKS, dtype, device)
    found: dict[str, float | bool] = {"kernel": runs_on_triton(pool.storage)}
    for what, batch in (("mixed", mixed(tiling)), ("one row", (3,))):
        x, y = (inputs(len(batch), columns + 5, dtype, False, device)[:, :columns] for columns in (n, m))
        beyond = y.as_strided((len(batch), 5), y.stride(), m).clone()
        total = expected(y, x, batch, loras)
        add_multi_lora(y, x, plan_batch(pool, batch, tiling=tiling), "layer")
        found[what] = error(y, total)
        found[f"{what}: nothing beyond y is written"] = torch.equal(y.as_strided(beyond.shape, y.stride(), m), beyond)
    return found


def again(device: str) -> bool:
    """Bit for bit the same, with n divided among programs, too."""
    n, m, width = WHOLE
    pool, _ = scattered_pool(n, m, width, RANKS, torch.float32, device)
    same = []
    for tiling in TILINGS.values():
        batch = mixed(tiling)
        x = inputs(len(batch), n, torch.float32, False, device)
        results = [torch.zeros(len(batch), m, device=device) for _ in range(2)]
        for y in results:
            add_multi_lora(y, x, plan_batch(pool, batch, tiling=tiling), "layer")
        same.append(torch.equal(*results))
    return all(same)


def replanned(device: str) -> float:
    """A plan with room to spare, and the plan of another batch in its memory."""
    n, m, width = WHOLE
    pool, loras = scattered_pool(n, m, width, RANKS, torch.float32, device)
    first, second = (0, -1, 1, 0, 2), (3, 4, -1, 4, 4)
    errors = []
    for tiling in TILINGS.values():
        plan = plan_batch(pool, first, tiling=tiling, largest_rank=70)
        for batch in (first, second):
            plan = replan(plan, batch)
            x, y = (inputs(5, columns, torch.float32, False, device) for columns in (n, m))
            total = expected(y, x, batch, loras)
            add_multi_lora(y, x, plan, "layer")
            errors.append(error(y, total))
    return max(errors)


def captured(device: str) -> float:
    """A CUDA graph computes the batch that its plan's memory holds when it is replayed."""
    if device != "cuda":
        return 0.0
    n, m, width = WHOLE
    pool, loras = scattered_pool(n, m, width, RANKS, torch.float32, device)
    x, y = (inputs(5, columns, torch.float32, False, device) for columns in (n, m))
    plan = plan_batch(pool, (-1,) * 5, tiling=SINGLE, largest_rank=70)
    add_multi_lora(y, x, plan, "layer")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_multi_lora(y, x, plan, "layer")
    errors = []
    for batch in ((0, -1, 1, 0, 2), (3, 4, -1, 4, 4)):
        total = expected(y, x, batch, loras)
        plan = replan(plan, batch)
        graph.replay()
        errors.append(error(y, total))
    return max(errors)


if __name__ == "__main__":
    device = sys.argv[1]
    cases = {name: case(shape, dtype, TILINGS[kind], device) for name, (shape, dtype, kind) in CASES.items()}
    # The interpreter has but one order of programs.
    others = {"again": device == "cpu" or again(device), "replanned": replanned(device), "captured": captured(device)}
    print(json.dumps({"cases": cases, "others": others}))
