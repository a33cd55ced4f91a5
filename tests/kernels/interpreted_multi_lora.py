"""Run by test_multi_lora.py in a process of its own: prints, for each case, how far kernels and float64 are apart."""

import json
import sys

import torch

from kernels.batch_plan import FEW, MANY, Tiling, plan_batch, replan
from kernels.dispatch import runs_on_triton
from kernels.multi_lora import add_multi_lora
from kernels.page_pool import PagePool
from tests.kernels.adapters import expected, lora, scattered_pool
from tests.kernels.packed import error, inputs

TILINGS = {"few": FEW, "many": MANY}
# Inputs, outputs, page width: rank rows of several pages, of one, of no whole page; one column; pages that only a small
# power of two divides. On a GPU each case is compiled: what shapes have nothing to do with is not tried with each.
WHOLE, SHAPES = (1056, 300, 256), ((130, 70, 64), (1, 200, 128), (96, 1, 192))
CASES = {
    f"{n}x{m} of {width}, {kind}, {dtype}": ((n, m, width), dtype, kind)
    for shape, kinds, dtypes in (
        (WHOLE, ("few", "many"), ("float32", "bfloat16")),
        (SHAPES[0], ("few", "many"), ("float16",)),
        (SHAPES[1], ("few",), ("float16",)),
        (SHAPES[2], ("few", "many"), ("float32",)),
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


LAYERS = {"q": 300, "k": 70, "v": 1}  # outputs
LAYER_RANKS = {"q": (1, 16, 0, 33, 70), "k": (40, 0, 5, 33, 1), "v": (0, 16, 3, 70, 17)}


def together(device: str, dtype: torch.dtype = torch.float32) -> dict[str, float | bool]:
    """Layers that read the same x, two or three at once, into columns of one tensor: bit for bit as alone."""
    n, width = 300, 64
    modules = {name: (n, m) for name, m in LAYERS.items()}
    pool = PagePool(modules, pages=4000, width=width, slots=len(RANKS), dtype=dtype, device=device)
    loras = {
        name: [lora(r, n, m, dtype, r, device) if r else None for r in LAYER_RANKS[name]] for name, m in LAYERS.items()
    }
    for slot in range(len(RANKS)):
        pool.add({name: own for name, each in loras.items() if (own := each[slot])})
    found: dict[str, float | bool] = {"same bits": True, "error": 0.0}
    for tiling in TILINGS.values():
        batch = mixed(tiling)
        plan = plan_batch(pool, batch, tiling=tiling)
        x, all_before = (inputs(len(batch), columns, dtype, False, device) for columns in (n, sum(LAYERS.values())))
        for names in (list(LAYERS), ["v", "q"]):
            after, alone = all_before.clone(), all_before.clone()
            parts, own, before = (
                dict(zip(LAYERS, each.split(list(LAYERS.values()), 1), strict=True))
                for each in (after, alone, all_before)
            )
            add_multi_lora([parts[name] for name in names], x, plan, names)
            for name in names:
                add_multi_lora(own[name], x, plan, name)
                found["error"] = max(found["error"], error(parts[name], expected(before[name], x, batch, loras[name])))
            found["same bits"] = found["same bits"] and torch.equal(after, alone)
    return found


def refusals(device: str) -> list[str]:
    """What is said of batches for which a plan has no room."""
    pool, _ = scattered_pool(64, 64, 64, RANKS, torch.float32, device)
    plan = plan_batch(pool, [0, -1], tiling=FEW)
    said = []
    for use in (
        lambda: replan(plan, [3, -1]),
        lambda: replan(plan, [0, 1]),
        lambda: plan_batch(pool, [3], tiling=FEW, largest_rank=32),
    ):
        try:
            use()
        except ValueError as refusal:
            said.append(str(refusal))
    return said


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
    plan = plan_batch(pool, (-1,) * 5, tiling=FEW, largest_rank=70)
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
    others = {
        "again": device == "cpu" or again(device),
        "replanned": replanned(device),
        "captured": captured(device),
        "together": together(device),
        "refusals": refusals(device),
    }
    print(json.dumps({"cases": cases, "others": others}))
