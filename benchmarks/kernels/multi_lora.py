"""The LoRAs of a mixed batch, from a pool of pages: decoding and prompts, against loops and padded products.

    python -m benchmarks.kernels.multi_lora [--repeats 9] [--sweep]

On a GPU decoding is measured over the layers of a model in turn, so many that no weight is still in the cache when it
comes again, in one CUDA graph; what must be read are the weights of each row's adapter, once. On the CPU all is
measured on two threads, interleaved, and a row counts its plan, too. Results are compared first: a wrong one ends the
benchmark. --sweep: on a GPU, how fast other tilings are.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels.measuring import Ceilings, event_seconds, gpu_ceilings, graph_seconds, require_equal
from benchmarks.results_file import Row, write
from kernels.batch_plan import FEW, SINGLE, Expanding, Shrinking, Tiling, plan_batch
from kernels.multi_lora import add_multi_lora, multi_lora_reference
from kernels.page_pool import Lora, PagePool

REPEATS = 9
UNCACHED = 256 << 20  # bytes of weights that are gone through before one comes again
HIDDEN, ROWS = 4096, 64
MIXED = (8, 16, 32, 64)  # ranks in equal shares: 30 on average
PROMPT_RANKS, PROMPT_TOKENS = (8, 16, 32, 64), 8192
CPU_HIDDEN, CPU_RANKS = 2048, (4, 8, 16, 32, 64)
CPU_ADAPTERS, CPU_ROWS = 32, 64

Work = Callable[[], object]


def filled_pool(
    ranks: Sequence[int], hidden: int, layers: int, dtype: torch.dtype, device: str
) -> tuple[PagePool, list[dict[str, Lora]]]:
    """An adapter of each rank for so many square layers; one layer's worth of random weights for all of them."""
    names = [f"layer {number}" for number in range(layers)]
    page = min(hidden, 4096)
    pages = 2 * layers * sum(ranks) * (hidden // page)
    pool = PagePool(
        dict.fromkeys(names, (hidden, hidden)), pages=pages, width=page, slots=len(ranks), dtype=dtype, device=device
    )
    generator = torch.Generator(device).manual_seed(0)
    shuffled = pool.allocator.allocate(pages)  # pages are handed out in no order, as they are after a while
    np.random.default_rng(0).shuffle(shuffled)
    pool.allocator.release(shuffled)
    adapters = []
    for rank in ranks:
        A, B = (
            torch.randn(shape, generator=generator, device=device).mul_(hidden**-0.5).to(dtype)
            for shape in ((rank, hidden), (hidden, rank))
        )
        adapters.append(dict.fromkeys(names, Lora(A, B, 2.0)))
        pool.add(adapters[-1])
    return pool, adapters


def loop(y: Tensor, x: Tensor, groups: Mapping[int, Tensor], loras: Sequence[Lora]) -> None:
    """What one writes first: an adapter after the other. `groups`: each one's rows."""
    for slot, rows in groups.items():
        lora = loras[slot]
        y[rows] += lora.scale * ((x[rows] @ lora.A.T) @ lora.B.T)


def grouped(adapters: Sequence[int] | np.ndarray, device: str) -> dict[int, Tensor]:
    """Each adapter's rows: what a loop needs as a plan."""
    slots = np.asarray(adapters)
    own, begins = np.unique(np.sort(slots), return_index=True)
    rows = np.split(np.argsort(slots, kind="stable"), begins[1:])
    return {slot: torch.from_numpy(each).to(device) for slot, each in zip(own.tolist(), rows, strict=True)}


def decoding(ranks: Sequence[int], rows: int, repeats: int, tiling: Tiling | None = None) -> dict[str, float]:
    """Seconds of one layer for `rows` rows, adapters in turn, of ours and of peers, and what must be read."""
    needed = sum(sorted(ranks, reverse=True)[: min(rows, len(ranks))]) * 2 * HIDDEN * 2
    layers = max(2, -(-UNCACHED // needed))
    pool, adapters = filled_pool(ranks, HIDDEN, layers, torch.bfloat16, "cuda")
    batch = [row % len(ranks) for row in range(rows)]
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(rows, HIDDEN, generator=generator, device="cuda").bfloat16()
    y = torch.zeros_like(x)
    plan = plan_batch(pool, batch, tiling=tiling)
    name = "layer 0"
    if tiling is None:
        add_multi_lora(y, x, plan, name)
        require_equal(y, multi_lora_reference(x, batch, pool, name), f"decoding {rows} rows")
    found = {"bytes": float(needed)}
    found["ours"] = graph_seconds([lambda k=k: add_multi_lora(y, x, plan, k) for k in pool.modules], repeats)
    if tiling is None:
        # Peers have their weights as they like them, in as many copies as leave the cache as cold.
        loras = [[Lora(e[name].A.clone(), e[name].B.clone(), 2.0) for e in adapters] for _ in range(layers)]
        groups = grouped(batch, "cuda")
        found["loop"] = graph_seconds([lambda each=each: loop(y, x, groups, each) for each in loras], 3)
        del loras
        most = max(ranks)
        stacks = []
        for _ in range(layers):
            A, B = (torch.zeros(len(ranks), most, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            for slot, adapter in enumerate(adapters):
                A[slot, : ranks[slot]], B[slot, : ranks[slot]] = adapter[name].A, adapter[name].B.T * 2.0
            stacks.append((A, B))
        index = torch.tensor(batch, device="cuda")
        alone = len(set(batch)) == rows  # then nothing need be gathered: the fastest that padding can be

        def padded(A: Tensor, B: Tensor) -> None:
            if not alone:
                A, B = A[index], B[index]
            y.add_(torch.bmm(torch.bmm(x[:, None], A.transpose(1, 2)), B)[:, 0])

        y.zero_()
        padded(*stacks[0])
        require_equal(y, multi_lora_reference(x, batch, pool, name), "padded products")
        found["padded"] = graph_seconds([lambda AB=AB: padded(*AB) for AB in stacks], repeats)
    return found


def prompts(repeats: int, tiling: Tiling | None = None) -> dict[str, float]:
    """Seconds of one layer for prompts of a few adapters, of ours and of a loop."""
    pool, adapters = filled_pool(PROMPT_RANKS, HIDDEN, 1, torch.bfloat16, "cuda")
    batch = np.repeat(np.arange(len(PROMPT_RANKS)), PROMPT_TOKENS // len(PROMPT_RANKS))
    generator = torch.Generator("cuda").manual_seed(1)
    xs = [torch.randn(PROMPT_TOKENS, HIDDEN, generator=generator, device="cuda").bfloat16() for _ in range(2)]
    ys = [torch.zeros_like(x) for x in xs]  # two of each are more than a cache holds
    plan = plan_batch(pool, batch, tiling=tiling)
    loras = [adapter["layer 0"] for adapter in adapters]
    groups = grouped(batch.tolist(), "cuda")
    if tiling is None:
        add_multi_lora(ys[0], xs[0], plan, "layer 0")
        loop(ys[1], xs[0], groups, loras)
        require_equal(ys[0], ys[1], "prompts")
    pairs = list(zip(ys, xs, strict=True)) * 2
    found = {"ours": graph_seconds([lambda p=p: add_multi_lora(*p, plan, "layer 0") for p in pairs], repeats)}
    if tiling is None:
        found["loop"] = graph_seconds([lambda p=p: loop(*p, groups, loras) for p in pairs], repeats)
    tokens = PROMPT_TOKENS / len(PROMPT_RANKS)
    found["bytes"] = 3 * xs[0].numel() * 2.0 + sum(PROMPT_RANKS) * 2 * HIDDEN * 2
    found["operations"] = sum(PROMPT_RANKS) * tokens * HIDDEN * 4
    return found


def on_gpu(ceilings: Ceilings, repeats: int = REPEATS) -> list[Row]:
    rows = []
    mixed = [MIXED[i % len(MIXED)] for i in range(ROWS)]
    same = [sum(MIXED) // len(MIXED)] * ROWS
    cases = {"ranks 8, 16, 32, 64": (mixed, ROWS), "ranks 8, 16, 32, 64, two rows each": (mixed[: ROWS // 2], ROWS)}
    for name, (ranks, number) in cases.items():
        claim = f"{number} rows of {len(ranks)} adapters, {name}, {HIDDEN}×{HIDDEN}"
        heterogeneous = decoding(ranks, number, repeats)
        homogeneous = decoding(same[: len(ranks)], number, repeats, SINGLE if number == len(ranks) else FEW)
        speed = heterogeneous["bytes"] / heterogeneous["ours"]
        rows.append(
            Row(f"{claim}: bytes that must be read", speed / 1e9, ceilings.bandwidth / 1e9, "copying", "GB/s", 0.8)
        )
        rows.append(
            Row(
                f"{claim}: bytes a second",
                speed / 1e9,
                homogeneous["bytes"] / homogeneous["ours"] / 1e9,
                f"rank {same[0]} in all",
                "GB/s",
                0.9,
            )
        )
        for peer, what, goal in (("padded", "bmm padded to rank 64", 0.67), ("loop", "a loop over adapters", 0.2)):
            rows.append(Row(claim, 1e6 * heterogeneous["ours"], 1e6 * heterogeneous[peer], what, "µs", goal, "lower"))
    found = prompts(repeats)
    claim = f"prompts of {PROMPT_TOKENS} tokens, 4 adapters of ranks 8, 16, 32, 64"
    rows.append(Row(claim, 1e6 * found["ours"], 1e6 * found["loop"], "a loop over adapters", "µs", 0.8, "lower"))
    speed, rate = (found[what] / found["ours"] for what in ("bytes", "operations"))
    rows.append(Row(f"{claim}: bytes", speed / 1e9, ceilings.bandwidth / 1e9, "copying", "GB/s", 0.6))
    print(f"{claim}: {rate / 1e12:.1f} TFLOP/s, {rate / ceilings.rate:.3f} of a matrix product's rate")
    pool, _ = filled_pool(mixed, 64, 1, torch.bfloat16, "cuda")
    seconds = event_seconds(lambda: plan_batch(pool, np.arange(ROWS)), 30)
    rows.append(Row(f"planning {ROWS} rows, once a batch", 1e6 * seconds, 200.0, "a limit", "µs", 1.0, "lower"))
    print("vLLM's kernels are not measured: it is not installed")
    return rows


def sweep(ceilings: Ceilings) -> None:
    """Other tilings, a line each: the share of the bandwidth that they reach."""
    mixed = [MIXED[i % len(MIXED)] for i in range(ROWS)]
    singles = [
        replace(SINGLE, shrink=Shrinking(*shrink), expand=Expanding(*expand))
        for shrink, expand in (
            ((16, 1024, 1024, 4, 1), ((512, 256, 128), 4, 1)),
            ((16, 1024, 1024, 8, 1), ((512, 256, 128), 4, 1)),
            ((16, 512, 512, 4, 1), ((512, 256, 128), 4, 1)),
            ((8, 1024, 1024, 4, 1), ((512, 256, 128), 4, 1)),
            ((8, 2048, 2048, 4, 1), ((512, 256, 128), 4, 1)),
            ((16, 1024, 1024, 4, 1), ((1024, 512, 256), 8, 1)),
            ((16, 1024, 1024, 4, 1), ((256, 128, 64), 4, 1)),
        )
    ]
    fews = [
        replace(FEW, shrink=Shrinking(*shrink), expand=Expanding(*expand))
        for shrink, expand in (
            ((16, 256, 1024, 4, 4), ((512, 256, 128), 4, 1)),
            ((16, 128, 1024, 4, 5), ((512, 256, 128), 4, 1)),
            ((16, 512, 1024, 4, 2), ((512, 256, 128), 4, 1)),
            ((16, 256, 2048, 4, 4), ((512, 256, 128), 4, 1)),
            ((16, 256, 1024, 4, 4), ((512, 256, 128), 8, 1)),
            ((16, 256, 1024, 4, 4), ((256, 128, 64), 4, 1)),
        )
    ]
    for tiling in [*singles, *fews]:
        found = decoding(mixed, ROWS, 5, tiling)
        share = found["bytes"] / found["ours"] / ceilings.bandwidth
        print(f"decoding {1e6 * found['ours']:7.2f} µs {share:6.3f}  {tiling}")
    for rows, shrink, expand in (
        (64, (64, 64, 0, 4, 4), ((128, 128, 128), 4, 2)),
        (64, (64, 128, 0, 4, 3), ((128, 128, 64), 4, 3)),
        (64, (32, 64, 0, 4, 4), ((256, 256, 256), 8, 2)),
        (128, (64, 64, 0, 8, 4), ((128, 128, 128), 8, 2)),
    ):
        tiling = Tiling(rows, Shrinking(*shrink), Expanding(*expand))
        found = prompts(5, tiling)
        share = found["bytes"] / found["ours"] / ceilings.bandwidth
        print(f"prompts  {1e6 * found['ours']:7.2f} µs {share:6.3f}  {tiling}")


def interleaved(works: Mapping[str, Work], repeats: int) -> dict[str, float]:
    """Median seconds on the clock of each, in turn."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            found[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def on_cpu(repeats: int = REPEATS) -> list[Row]:
    torch.set_num_threads(2)
    generator = np.random.default_rng(0)
    ranks = [CPU_RANKS[i % len(CPU_RANKS)] for i in range(CPU_ADAPTERS)]
    batch = np.repeat(np.arange(CPU_ADAPTERS), CPU_ROWS // CPU_ADAPTERS)
    generator.shuffle(batch)
    pool, adapters = filled_pool(ranks, CPU_HIDDEN, 1, torch.float32, "cpu")
    loras = [adapter["layer 0"] for adapter in adapters]
    x = torch.randn(CPU_ROWS, CPU_HIDDEN, generator=torch.Generator().manual_seed(1))
    y = torch.zeros_like(x)
    A, B = (torch.zeros(CPU_ADAPTERS, max(ranks), CPU_HIDDEN) for _ in range(2))
    for slot, lora in enumerate(loras):
        A[slot, : ranks[slot]], B[slot, : ranks[slot]] = lora.A, lora.B.T * lora.scale

    def padded() -> None:
        index = torch.from_numpy(batch)
        y.add_(torch.bmm(torch.bmm(x[:, None], A[index].transpose(1, 2)), B[index])[:, 0])

    def ours() -> None:
        add_multi_lora(y, x, plan_batch(pool, batch), "layer 0")

    peers: dict[str, tuple[Work, float]] = {
        "a loop over adapters": (lambda: loop(y, x, grouped(batch, "cpu"), loras), 0.2),
        "bmm padded to rank 64": (padded, 0.5),
    }
    expected = multi_lora_reference(x, batch, pool, "layer 0")
    claim = f"{CPU_ROWS} rows of {CPU_ADAPTERS} adapters, ranks 4 to 64, {CPU_HIDDEN}×{CPU_HIDDEN}, planning included"
    rows = []
    for name, (peer, goal) in peers.items():
        for work in (ours, peer):
            y.zero_()
            work()
            require_equal(y, expected, name, 1e-4)
        seconds = interleaved({"ours": ours, name: peer}, 4 * repeats)
        rows.append(Row(claim, 1e6 * seconds["ours"], 1e6 * seconds[name], name, "µs", goal, "lower"))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    details = {"load": os.getloadavg()[0]}
    if not torch.cuda.is_available():
        write("multi_lora", on_cpu(options.repeats), details=details)
    elif options.sweep:
        sweep(gpu_ceilings(options.repeats))
    else:
        measured = on_gpu(gpu_ceilings(options.repeats), options.repeats)
        write("multi_lora", measured, torch.cuda.get_device_name(), details)
