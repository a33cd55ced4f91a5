"""The gradient of a few scattered entries of a weight, and their product, against the dense ones.

On the CPU in turn with what it is compared with: seconds of the processor on one thread, and of the clock on two, which
only mean something on an idle machine. On a GPU in bfloat16, in CUDA graphs. Results are compared first: a wrong one
ends the benchmark.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.measuring import (
    CPU_CLOCKS,
    Ceilings,
    event_seconds,
    gpu_peak_bytes,
    graph_seconds,
    interleaved_seconds,
    require_equal,
)
from benchmarks.kernels.one import measure
from benchmarks.results_file import Row
from kernels import sparse_delta
from kernels.sparse_delta import (
    add_sparse_product,
    blocked_gradient,
    sampled_gradient,
    sparse_gradient,
    sparse_linear,
)
from kernels.sparse_plan import BLOCK, SparsePlan, planned

REPEATS = 9
CPU_SHAPE, CPU_TOKENS = (2048, 2048), 512
GPU_SHAPES = {"attention": (4096, 4096), "MLP": (14336, 4096)}
GPU_TOKENS = 8192
DENSITIES = (0.01, 0.001)
FEW_TOKENS = (1, 16, 128)


def problem(
    shape: tuple[int, int], tokens: int, density: float, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, SparsePlan]:
    """g, x, η and its plan."""
    m, n = shape
    generator = torch.Generator(device).manual_seed(0)
    chosen = torch.randperm(m * n, generator=generator, device=device)[: int(density * m * n)].int()
    g, x = (torch.randn(tokens, size, generator=generator, device=device).to(dtype) for size in shape)
    return g, x, chosen, planned(chosen, shape)


def on_cpu() -> list[Row]:
    (m, n), rows = CPU_SHAPE, []
    g, x, chosen, plan = problem(CPU_SHAPE, CPU_TOKENS, 0.01, torch.float32, "cpu")
    gradients: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: sparse_gradient(g, x, plan),
        "the dense gradient and a gather": lambda: (g.T @ x).view(-1)[chosen],
        "features gathered, multiplied and summed": lambda: _gathered(g, x, plan),
    }
    for peer, gradient in gradients.items():
        require_equal(gradient(), gradients["ours"](), peer, 1e-5)
    for threads, clock, unit in CPU_CLOCKS:
        torch.set_num_threads(threads)
        seconds = interleaved_seconds(gradients, REPEATS)
        claim = f"gradient of 1 % scattered entries of {m}×{n}, {CPU_TOKENS} tokens"
        for peer, goal in zip(list(gradients)[1:], (1 / 3, 1.0), strict=True):
            ours, theirs = (1e3 * seconds[each][clock] for each in ("ours", peer))
            rows.append(Row(claim, ours, theirs, peer, unit, goal, "lower"))
    torch.set_num_threads(1)
    W, values = torch.randn(m, n), torch.randn(len(chosen))
    for tokens in (1, 64, CPU_TOKENS):
        part = x[:tokens]
        products: dict[str, Callable[[], Tensor]] = {
            "ours": lambda part=part: sparse_linear(part, values, W, plan),
            "a copy of the weight": lambda part=part: functional.linear(part, _copied(W, chosen, values)),
        }
        require_equal(products["ours"](), products["a copy of the weight"](), "product", 1e-5)
        seconds = interleaved_seconds(products, REPEATS)
        ours, theirs = (1e3 * seconds[each][1] for each in products)
        claim = f"layer with 1 % changed entries of {m}×{n}, {tokens} tokens"
        rows.append(Row(claim, ours, theirs, "a copy of the weight", "ms of processor", 1.05, "lower"))
    return rows


def on_gpu(ceilings: Ceilings) -> list[Row]:
    rows = []
    for name, shape in GPU_SHAPES.items():
        for density in DENSITIES:
            g, x, chosen, plan = problem(shape, GPU_TOKENS, density, torch.bfloat16, "cuda")
            rows += _gradient_rows(f"{shape[0]}×{shape[1]} ({name})", density, g, x, chosen, plan, ceilings)
            rows += _product_rows(f"{shape[0]}×{shape[1]} ({name})", density, x, chosen, plan)
            del g, x
    return rows


def _gradient_rows(
    name: str,
    density: float,
    g: Tensor,
    x: Tensor,
    chosen: Tensor,
    plan: SparsePlan,
    ceilings: Ceilings,
) -> list[Row]:
    (m, n), k, claim = plan.shape, len(chosen), f"gradient of {density:.1%} of the entries of {name}"

    def dense() -> Tensor:
        return (g.T @ x).view(-1)[chosen]

    for way in (sparse_gradient, sampled_gradient, blocked_gradient):
        require_equal(way(g, x, plan), dense(), f"{claim}, {way.__name__}")
    seconds = {
        way.__name__: graph_seconds([lambda way=way: way(g, x, plan)], REPEATS)
        for way in (sparse_gradient, sampled_gradient, blocked_gradient)
    }
    ours, peer = 1e3 * seconds["sparse_gradient"], 1e3 * graph_seconds([dense], REPEATS)
    print(f"{claim}: entry by entry {1e3 * seconds['sampled_gradient']:.3f} ms, in blocks of rows", end=" ")
    print(f"{1e3 * seconds['blocked_gradient']:.3f} ms")
    # At 1 % tensor cores take no longer for all entries than the caches for these; what is gained is memory.
    goal = 1.1 if density > 0.004 else 0.6
    rows = [Row(claim, ours, peer, "the dense gradient and a gather", "ms", goal, "lower")]
    fastest = min(seconds["sampled_gradient"], seconds["blocked_gradient"])
    rows.append(Row(f"{claim}: the rule", ours, 1e3 * fastest, "the faster of two ways", "ms", 1.05, "lower"))
    if density <= 0.004:
        read = len(x) * (m + n) * x.element_size() + 12 * k  # g and x once, places, sums
        label = f"{claim}: bytes that must be moved"
        rows.append(Row(label, 1e-6 * read / ours, ceilings.bandwidth / 1e9, "copying", "GB/s", 0.3))
    else:
        rate = 2 * m * n * len(x) / seconds["blocked_gradient"]
        label = f"{claim}, in blocks of rows: dense operations"
        rows.append(Row(label, rate / 1e12, ceilings.rate / 1e12, "a product of matrices", "TFLOP/s", 0.8))
    held, theirs = gpu_peak_bytes(lambda: sparse_gradient(g, x, plan)), gpu_peak_bytes(dense)
    rows.append(Row(f"{claim}: memory", held / 2**20, theirs / 2**20, "the dense gradient", "MiB", 3.0, "lower"))
    try:
        sampled = _torch_sampled(g, x, plan)
        require_equal(sampled(), dense(), "torch.sparse.sampled_addmm")
        theirs = 1e3 * event_seconds(sampled, 3, warm=1)
        rows.append(Row(claim, ours, theirs, "torch's sampled_addmm, float32", "ms", 1.0, "lower"))
    except RuntimeError as error:
        print(f"No torch.sparse.sampled_addmm: {error}")
    return rows


def _product_rows(name: str, density: float, x: Tensor, chosen: Tensor, plan: SparsePlan) -> list[Row]:
    m, n = plan.shape
    W, values = torch.randn(m, n, device="cuda").bfloat16(), torch.randn(len(chosen), device="cuda")
    rows = []
    for tokens in (*FEW_TOKENS, GPU_TOKENS):
        part = x[:tokens]
        expected = functional.linear(part, _copied(W, chosen, values))
        require_equal(sparse_linear(part, values, W, plan), expected, f"layer of {name}")
        y = functional.linear(part, W)
        add_sparse_product(y, part, values, plan)
        require_equal(y, expected, f"product of {name}")
        ours = graph_seconds([lambda part=part: sparse_linear(part, values, W, plan)], REPEATS)
        peer = graph_seconds([lambda part=part: functional.linear(part, _copied(W, chosen, values))], REPEATS)
        claim = f"layer with {density:.1%} changed entries of {name}, {tokens} tokens"
        goal = 0.6 if tokens < GPU_TOKENS else 1.05
        rows.append(Row(claim, 1e6 * ours, 1e6 * peer, "a copy of the weight", "µs", goal, "lower"))
    return rows


def sweep(ceilings: Ceilings) -> None:
    """What other tiles of the sampled product, parts of tokens, and blocks of rows would take."""
    del ceilings
    as_it_is = sparse_delta._ENTRIES, sparse_delta._TOKENS, sparse_delta._WARPS, sparse_delta._CACHED
    shape = GPU_SHAPES["attention"]
    for density in (0.01, 0.004, 0.001):
        g, x, chosen, plan = problem(shape, GPU_TOKENS, density, torch.bfloat16, "cuda")
        for entries, tokens, warps in (
            (16, 128, 4),
            (16, 256, 4),
            (32, 128, 4),
            (8, 256, 4),
            (32, 64, 4),
            (16, 128, 2),
        ):
            for cached in (12, 24, 1024):
                sparse_delta._ENTRIES, sparse_delta._TOKENS, sparse_delta._WARPS = entries, tokens, warps
                sparse_delta._CACHED = cached << 20
                seconds = graph_seconds([lambda g=g, x=x, plan=plan: sampled_gradient(g, x, plan)], REPEATS)
                print(f"sampled {density:.1%} {entries}×{tokens} {warps} warps, {cached} MiB: {1e3 * seconds:.3f} ms")
        sparse_delta._ENTRIES, sparse_delta._TOKENS, sparse_delta._WARPS, sparse_delta._CACHED = as_it_is
        both = graph_seconds(
            [lambda g=g, x=x: (sparse_delta._feature_major(g), sparse_delta._feature_major(x))], REPEATS
        )
        print(f"  of which transposing: {1e3 * both:.3f} ms")
        whole = BLOCK["cuda"]
        for block in (1 << 22, 1 << 23, 1 << 24):
            BLOCK["cuda"] = block
            other = planned(chosen, shape)
            seconds = graph_seconds([lambda g=g, x=x, other=other: blocked_gradient(g, x, other)], REPEATS)
            print(f"blocks {density:.1%} of {block >> 20} Mi entries: {1e3 * seconds:.3f} ms")
        BLOCK["cuda"] = whole


def _copied(W: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
    flat = W.view(-1)
    return flat.index_put((chosen,), (flat[chosen].float() + values).to(W.dtype)).view(W.shape)


def _gathered(g: Tensor, x: Tensor, plan: SparsePlan) -> Tensor:
    """As one would write it: a few thousand entries at a time."""
    left, right = g.T.contiguous(), x.T.contiguous()
    found = torch.empty(len(plan.order))
    for begin in range(0, len(found), 2048):
        at = slice(begin, begin + 2048)
        both = left.index_select(0, plan.rows[at]).mul_(right.index_select(0, plan.columns[at]))
        found[plan.order[at]] = both.sum(1)
    return found


def _torch_sampled(g: Tensor, x: Tensor, plan: SparsePlan) -> Callable[[], Tensor]:
    left, right = g.T.float().contiguous(), x.float()
    zeros = torch.zeros(len(plan.order), device=g.device)
    S = torch.sparse_csr_tensor(plan.starts, plan.columns, zeros, plan.shape)
    place = plan.order.argsort()
    return lambda: torch.sparse.sampled_addmm(S, left, right, beta=0.0).values()[place]


if __name__ == "__main__":
    measure("sparse_delta")
