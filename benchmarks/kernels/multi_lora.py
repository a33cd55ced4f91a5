"""The LoRAs of a mixed batch, from a pool of pages: decoding and prompts, against loops, padded products and peft.

    python -m benchmarks.kernels.multi_lora [--sweep]

On a GPU decoding is measured over the layers of a model in turn, so many that no weight is still in the cache when it
comes again, in one CUDA graph; what must be read are the weights of each row's adapter, once. peft cannot be captured:
beside it ours is launched from Python, too, and both with the base layer. On the CPU all is measured on two threads,
interleaved, and counts its plan, too. Results are compared first: a wrong one ends the benchmark. --sweep: on a GPU,
how fast other tilings are.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.measuring import Ceilings, event_seconds, graph_seconds, interleaved_seconds, require_equal
from benchmarks.kernels.one import measure
from benchmarks.results_file import Row
from kernels.batch_plan import FEW, MANY, BatchPlan, Expanding, Shrinking, Tiling, plan_batch
from kernels.multi_lora import add_multi_lora, multi_lora_reference
from kernels.page_pool import Lora, PagePool

REPEATS = 9
UNCACHED = 256 << 20  # bytes of weights that are gone through before one comes again
HIDDEN, ROWS = 4096, 64
MIXED = (8, 16, 32, 64)  # ranks in equal shares: 30 on average
SQUARE = {"layer": (HIDDEN, HIDDEN)}
# Of Llama 8B: what reads the same x, and is launched together.
TOGETHER = {
    "q, k and v at once": {"q": (HIDDEN, 4096), "k": (HIDDEN, 1024), "v": (HIDDEN, 1024)},
    "gate alone": {"gate": (HIDDEN, 14336)},
    "gate and up at once": {"gate": (HIDDEN, 14336), "up": (HIDDEN, 14336)},
}
PROMPT_RANKS, PROMPT_TOKENS = (8, 16, 32, 64), 8192
CPU_HIDDEN, CPU_RANKS = 2048, (4, 8, 16, 32, 64)
CPU_ADAPTERS, CPU_ROWS = 32, 64
TURN = 20  # calls of the same in a row

Work = Callable[[], object]
Shapes = Mapping[str, tuple[int, int]]


def filled_pool(
    ranks: Sequence[int], shapes: Shapes, layers: int, dtype: torch.dtype, device: str
) -> tuple[PagePool, list[dict[str, Lora]]]:
    """An adapter of each rank for so many layers of these modules; one layer's random weights for all of them.

    Module NAME of layer i is "i NAME" in the pool; what is given back beside it are the adapters of one layer.
    """
    page = min(gcd(*(extent for shape in shapes.values() for extent in shape)), 4096)
    pages = layers * sum(ranks) * sum((n + m) // page for n, m in shapes.values())
    modules = {f"{layer} {name}": shape for layer in range(layers) for name, shape in shapes.items()}
    pool = PagePool(modules, pages=pages, width=page, slots=len(ranks), dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    shuffled = pool.allocator.allocate(pages)  # pages are handed out in no order, as they are after a while
    np.random.default_rng(0).shuffle(shuffled)
    pool.allocator.release(shuffled)
    adapters = []
    for rank in ranks:
        own = {}
        for name, (n, m) in shapes.items():
            A, B = (
                torch.randn(shape, generator=generator, device=device).mul_(n**-0.5).to(dtype)
                for shape in ((rank, n), (m, rank))
            )
            own[name] = Lora(A, B, 2.0)
        adapters.append(own)
        pool.add({f"{layer} {name}": each for layer in range(layers) for name, each in own.items()})
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


@dataclass(frozen=True, eq=False)
class Decoding:
    """Rows of adapters in turn, and layers that leave no weight in the cache.

    Args:
        pool: of all layers.
        adapters: of one layer.
        batch: each row's slot.
        plan: of that.
        x: [rows, n].
        ys: of each module.
        layers: how many there are.
        size: bytes of a layer's weights that must be read.
    """

    pool: PagePool
    adapters: Sequence[Mapping[str, Lora]]
    batch: Sequence[int]
    plan: BatchPlan
    x: Tensor
    ys: Mapping[str, Tensor]
    layers: int
    size: int

    def add(self, layer: int) -> None:
        """One launch."""
        add_multi_lora(list(self.ys.values()), self.x, self.plan, [f"{layer} {name}" for name in self.ys])

    def ours(self, repeats: int) -> float:
        """Seconds of a layer; compared with the reference first."""
        for y in self.ys.values():
            y.zero_()
        self.add(0)
        for name, y in self.ys.items():
            require_equal(y, multi_lora_reference(self.x, self.batch, self.pool, f"0 {name}"), f"decoding {name}")
        return graph_seconds([partial(self.add, layer) for layer in range(self.layers)], repeats)


def decoding(ranks: Sequence[int], shapes: Shapes, tiling: Tiling | None = None) -> Decoding:
    """`ROWS` rows of an adapter of each rank."""
    size = sum(ranks) * sum(map(sum, shapes.values())) * 2
    layers = max(2, -(-UNCACHED // size))
    pool, adapters = filled_pool(ranks, shapes, layers, torch.bfloat16, "cuda")
    batch = [row % len(ranks) for row in range(ROWS)]
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(ROWS, HIDDEN, generator=generator, device="cuda").bfloat16()
    ys = {name: torch.zeros(ROWS, m, device="cuda", dtype=x.dtype) for name, (_, m) in shapes.items()}
    return Decoding(pool, adapters, batch, plan_batch(pool, batch, tiling=tiling), x, ys, layers, size)


def loop_seconds(work: Decoding) -> float:
    """Of a loop over adapters, whose weights lie as it likes them, in as many copies as leave the cache as cold."""
    groups, y = grouped(work.batch, "cuda"), work.ys["layer"]
    loras = [
        [Lora(own["layer"].A.clone(), own["layer"].B.clone(), 2.0) for own in work.adapters] for _ in range(work.layers)
    ]
    return graph_seconds([partial(loop, y, work.x, groups, each) for each in loras], 3)


def padded_seconds(work: Decoding, repeats: int) -> float:
    """Of products in batches, all of the largest rank."""
    loras = [own["layer"] for own in work.adapters]
    y, x, number, most = work.ys["layer"], work.x, len(loras), max(lora.rank for lora in loras)
    stacks = []
    for _ in range(work.layers):
        A, B = (torch.zeros(number, most, HIDDEN, device="cuda", dtype=x.dtype) for _ in range(2))
        for slot, lora in enumerate(loras):
            A[slot, : lora.rank], B[slot, : lora.rank] = lora.A, lora.B.T * lora.scale
        stacks.append((A, B))
    index = torch.tensor(work.batch, device="cuda")

    def padded(A: Tensor, B: Tensor) -> None:
        if number < len(x):  # else nothing need be gathered: the fastest that padding can be
            A, B = A[index], B[index]
        y.add_(torch.bmm(torch.bmm(x[:, None], A.transpose(1, 2)), B)[:, 0])

    y.zero_()
    padded(*stacks[0])
    require_equal(y, multi_lora_reference(x, work.batch, work.pool, "0 layer"), "padded products")
    return graph_seconds([partial(padded, *stack) for stack in stacks], repeats)


def peft_rows(work: Decoding, claim: str) -> list[Row]:
    """peft's own mixed batches; none where peft is not installed, or does not do it."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        print("peft's mixed batches are not measured: it is not installed")
        return []
    model: Any = torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN, bias=False))
    for slot, own in enumerate(work.adapters):
        config = LoraConfig(r=own["layer"].rank, lora_alpha=2 * own["layer"].rank, target_modules=["0"])
        if slot:
            model.add_adapter(str(slot), config)
        else:
            model = get_peft_model(model, config, adapter_name="0")
    model.to("cuda", torch.bfloat16).eval()
    layer = model.base_model.model[0]
    for slot, own in enumerate(work.adapters):
        layer.lora_A[str(slot)].weight.data.copy_(own["layer"].A)
        layer.lora_B[str(slot)].weight.data.copy_(own["layer"].B)
    names, weight = [str(slot) for slot in work.batch], layer.base_layer.weight

    def ours() -> Tensor:
        y = functional.linear(work.x, weight)
        add_multi_lora(y, work.x, work.plan, "0 layer")
        return y

    with torch.no_grad():
        require_equal(ours(), layer(work.x, adapter_names=names), "peft's mixed batch")
        seconds = [event_seconds(each, 20) for each in (ours, lambda: layer(work.x, adapter_names=names))]
    name = f"{claim}, with the base layer, launched from Python"
    return [Row(name, 1e6 * seconds[0], 1e6 * seconds[1], "peft, adapter_names", "µs", 0.2, "lower")]


def prompts(repeats: int, tiling: Tiling | None = None) -> dict[str, float]:
    """Seconds of one layer for prompts of a few adapters, of ours and of a loop."""
    pool, adapters = filled_pool(PROMPT_RANKS, SQUARE, 1, torch.bfloat16, "cuda")
    batch = np.repeat(np.arange(len(PROMPT_RANKS)), PROMPT_TOKENS // len(PROMPT_RANKS))
    generator = torch.Generator("cuda").manual_seed(1)
    xs = [torch.randn(PROMPT_TOKENS, HIDDEN, generator=generator, device="cuda").bfloat16() for _ in range(2)]
    ys = [torch.zeros_like(x) for x in xs]  # two of each are more than a cache holds
    plan = plan_batch(pool, batch, tiling=tiling)
    loras = [adapter["layer"] for adapter in adapters]
    groups = grouped(batch, "cuda")
    add_multi_lora(ys[0], xs[0], plan, "0 layer")
    loop(ys[1], xs[0], groups, loras)
    require_equal(ys[0], ys[1], "prompts")
    pairs = list(zip(ys, xs, strict=True)) * 2
    found = {"ours": graph_seconds([partial(add_multi_lora, y, x, plan, "0 layer") for y, x in pairs], repeats)}
    if tiling is None:
        found["loop"] = graph_seconds([partial(loop, y, x, groups, loras) for y, x in pairs], repeats)
    tokens = PROMPT_TOKENS / len(PROMPT_RANKS)
    found["bytes"] = 3 * xs[0].numel() * 2.0 + sum(PROMPT_RANKS) * 2 * HIDDEN * 2
    found["operations"] = sum(PROMPT_RANKS) * tokens * HIDDEN * 4
    return found


def on_gpu(ceilings: Ceilings) -> list[Row]:
    rows = []
    mixed = [MIXED[i % len(MIXED)] for i in range(ROWS)]
    copying = ceilings.bandwidth / 1e9
    for ranks, each in ((mixed, ""), (mixed[: ROWS // 2], ", two rows each")):
        claim = f"{ROWS} rows of {len(ranks)} adapters, ranks 8, 16, 32, 64{each}, {HIDDEN}×{HIDDEN}"
        work = decoding(ranks, SQUARE)
        seconds = work.ours(REPEATS)
        speed = work.size / seconds / 1e9
        rows.append(Row(f"{claim}: bytes that must be read", speed, copying, "copying", "GB/s", 0.8))
        same = decoding([sum(MIXED) // len(MIXED)] * len(ranks), SQUARE)
        peer = same.size / same.ours(REPEATS) / 1e9
        rows.append(Row(f"{claim}: bytes a second", speed, peer, "rank 30 in all", "GB/s", 0.9))
        for name, other, goal in (
            ("bmm padded to rank 64", padded_seconds(work, REPEATS), 0.67),
            ("a loop over adapters", loop_seconds(work), 0.2),
        ):
            rows.append(Row(claim, 1e6 * seconds, 1e6 * other, name, "µs", goal, "lower"))
        rows += peft_rows(work, claim)
        del work, same
    for name, shapes in TOGETHER.items():
        work = decoding(mixed, shapes)
        speed = work.size / work.ours(REPEATS) / 1e9
        claim = f"{ROWS} rows of {ROWS} adapters, ranks 8, 16, 32, 64, Llama 8B's {name}: bytes that must be read"
        rows.append(Row(claim, speed, copying, "copying", "GB/s", 0.8))
        del work
    found = prompts(REPEATS)
    claim = f"prompts of {PROMPT_TOKENS} tokens, 4 adapters of ranks 8, 16, 32, 64"
    rows.append(Row(claim, 1e6 * found["ours"], 1e6 * found["loop"], "a loop over adapters", "µs", 0.8, "lower"))
    speed, rate = (found[what] / found["ours"] for what in ("bytes", "operations"))
    rows.append(Row(f"{claim}: bytes", speed / 1e9, copying, "copying", "GB/s", 0.6))
    print(f"{claim}: {rate / 1e12:.1f} TFLOP/s, {rate / ceilings.rate:.3f} of a matrix product's rate")
    pool, _ = filled_pool(mixed, {"layer": (64, 64)}, 1, torch.bfloat16, "cuda")
    seconds = event_seconds(lambda: plan_batch(pool, np.arange(ROWS)), 30)
    rows.append(Row(f"planning {ROWS} rows, once a batch", 1e6 * seconds, 100.0, "a limit", "µs", 1.0, "lower"))
    print("vLLM's kernels are not measured: it is not installed")
    return rows


def sweep(ceilings: Ceilings) -> None:
    """Other tilings, a line each: the share of the bandwidth that they reach."""
    mixed = [MIXED[i % len(MIXED)] for i in range(ROWS)]
    for expand in (
        Expanding((256, 256, 256), 8, 1, 1),
        Expanding((512, 256, 128), 8, 1, 1),
        Expanding((256, 128, 64), 4, 1, 1),
    ):
        tiling = Tiling(FEW.rows, FEW.shrink, expand)
        work = decoding(mixed, TOGETHER["q, k and v at once"], tiling)
        seconds = work.ours(5)
        print(f"decoding {1e6 * seconds:7.2f} µs {work.size / seconds / ceilings.bandwidth:6.3f}  {tiling}")
    for tiling in (
        Tiling(64, MANY.shrink, Expanding((64, 64, 64), 4, 1, 2)),
        Tiling(64, MANY.shrink, Expanding((128, 128, 128), 4, 1, 4)),
        Tiling(64, Shrinking(32, 64, 2048, 4, 4), MANY.expand),
        Tiling(64, Shrinking(64, 64, 0, 4, 6), MANY.expand),
        Tiling(64, Shrinking(32, 64, 2048, 4, 4), Expanding((256, 256, 256), 8, 2, 1)),
    ):
        found = prompts(5, tiling)
        share = found["bytes"] / found["ours"] / ceilings.bandwidth
        print(f"prompts  {1e6 * found['ours']:7.2f} µs {share:6.3f}  {tiling}")


def on_cpu() -> list[Row]:
    torch.set_num_threads(2)
    generator = np.random.default_rng(0)
    ranks = [CPU_RANKS[i % len(CPU_RANKS)] for i in range(CPU_ADAPTERS)]
    batch = np.repeat(np.arange(CPU_ADAPTERS), CPU_ROWS // CPU_ADAPTERS)
    generator.shuffle(batch)
    pool, adapters = filled_pool(ranks, {"layer": (CPU_HIDDEN, CPU_HIDDEN)}, 1, torch.float32, "cpu")
    loras = [adapter["layer"] for adapter in adapters]
    x = torch.randn(CPU_ROWS, CPU_HIDDEN, generator=torch.Generator().manual_seed(1))
    y = torch.zeros_like(x)
    A, B = (torch.zeros(CPU_ADAPTERS, max(ranks), CPU_HIDDEN) for _ in range(2))
    for slot, lora in enumerate(loras):
        A[slot, : ranks[slot]], B[slot, : ranks[slot]] = lora.A, lora.B.T * lora.scale

    def padded() -> None:
        index = torch.from_numpy(batch)
        y.add_(torch.bmm(torch.bmm(x[:, None], A[index].transpose(1, 2)), B[index])[:, 0])

    def ours() -> None:
        add_multi_lora(y, x, plan_batch(pool, batch), "0 layer")

    peers: dict[str, tuple[Work, float]] = {
        "a loop over adapters": (lambda: loop(y, x, grouped(batch, "cpu"), loras), 0.2),
        "bmm padded to rank 64": (padded, 0.5),
    }
    expected = multi_lora_reference(x, batch, pool, "0 layer")
    claim = f"{CPU_ROWS} rows of {CPU_ADAPTERS} adapters, ranks 4 to 64, {CPU_HIDDEN}×{CPU_HIDDEN}, planning included"
    rows = []
    for name, (peer, goal) in peers.items():
        for work in (ours, peer):
            y.zero_()
            work()
            require_equal(y, expected, name, 1e-4)
        found = interleaved_seconds({"ours": ours, name: peer}, 4 * REPEATS, TURN)
        for what, own, other in zip(("on the clock", "of the processor"), found["ours"], found[name], strict=True):
            rows.append(Row(f"{claim}, {what}", 1e6 * own, 1e6 * other, name, "µs", goal, "lower"))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    measure("multi_lora", sweep=parser.parse_args().sweep)
