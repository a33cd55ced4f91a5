"""What the benchmarks of packed matrices share: decoded and applied, against dense matrices of the same numbers.

On the CPU all runs on one thread, and times are those of the processor, so that what else the machine does counts
little. On a GPU few tokens are multiplied, as generation has them, by so many matrices in turn that none is still in
the cache, in a CUDA graph, as launching by itself takes longer than the work. Results are compared first: a wrong one
ends the benchmark.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.measuring import Ceilings, graph_seconds, processor_seconds, require_equal
from benchmarks.results_file import Row
from kernels import packed_bits
from kernels.packed_bits import Tile, Tiles

CPU_SHAPE, CPU_TOKENS = (4096, 4096), (1, 8, 64)
GPU_SHAPES = {"Llama 8B's attention": (4096, 4096), "Llama 8B's MLP": (14336, 4096), "Llama 70B's MLP": (28672, 8192)}
GPU_TOKENS = (1, 4, 16)
UNCACHED = 512 << 20  # bytes that are gone through before one comes again; the largest L2 caches have 128 MB
SWEPT, SWEEP_SECONDS = 200 << 20, 25.0  # bytes as above, of fewer matrices; what does not begin by then is not tried
# Most tokens of a tile, with how many it is tried, and the tiles: rows, tokens, words, warps.
CANDIDATES = {
    (2, 1): ((16, 8, 4, 8), (16, 8, 4, 4), (16, 8, 2, 8), (32, 8, 4, 4)),
    (64, 16): ((64, 16, 2, 8), (64, 16, 2, 4), (32, 16, 4, 8)),
    (8, 4): ((16, 8, 4, 8), (32, 8, 4, 8), (32, 8, 4, 4)),
}
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}

Decode = Callable[[torch.dtype], Tensor]
Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Packed:
    """A matrix [m, k] in few bits.

    Args:
        size: its bytes.
        decode: makes it dense.
        decode_reference: likewise, the plain way.
        unpack: likewise, as one would write it with NumPy; only of the CPU's.
        apply: x [n, k] to x·Wᵀ.
        apply_reference: likewise, the plain way.
    """

    size: int
    decode: Decode
    decode_reference: Decode
    unpack: Decode
    apply: Apply
    apply_reference: Apply


Make = Callable[[tuple[int, int], int, str], Packed]  # of a shape, a seed and a device


def cpu_rows(kind: str, make: Make, repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    packed = make(CPU_SHAPE, 0, "cpu")
    name = f"{kind} {CPU_SHAPE[0]}×{CPU_SHAPE[1]}"
    rows = []
    for dtype, dtype_name in DTYPE_NAMES.items():
        W = packed.decode(dtype)
        megabytes = W.numel() * W.element_size() / 1e6
        decoders: dict[str, Callable[[], Tensor]] = {
            "ours": lambda dtype=dtype: packed.decode(dtype),
            "NumPy's unpackbits": lambda dtype=dtype: packed.unpack(dtype),
            "the plain reference": lambda dtype=dtype: packed.decode_reference(dtype),
            "copying the dense matrix": lambda W=W: W.clone(),
        }
        for peer, decoder in decoders.items():
            require_equal(decoder(), W, peer)
        speeds = {peer: megabytes / processor_seconds(decoder, repeats) for peer, decoder in decoders.items()}
        for peer, goal in (("NumPy's unpackbits", 1), ("the plain reference", 10), ("copying the dense matrix", 0.1)):
            rows.append(Row(f"{name} becomes dense {dtype_name}", speeds["ours"], speeds[peer], peer, "MB/s", goal))
        for tokens in CPU_TOKENS:
            x = torch.randn(tokens, CPU_SHAPE[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
            products: dict[str, Callable[[], Tensor]] = {
                "ours": lambda x=x: packed.apply(x),
                "the plain reference": lambda x=x: packed.apply_reference(x),
                "decoding first": lambda x=x: functional.linear(x, packed.decode(x.dtype)),
                "dense in memory": lambda x=x, W=W: functional.linear(x, W),
            }
            for peer, product in products.items():
                require_equal(product(), products["dense in memory"](), peer)
            seconds = {peer: processor_seconds(product, repeats) for peer, product in products.items()}
            claim = f"{name} applied to {tokens} tokens, {dtype_name}"
            # What is dense in memory takes many times the bytes; that it may be faster is what the first goal says.
            for peer, goal in (("dense in memory", 3.0), ("decoding first", 1.0), ("the plain reference", 0.1)):
                rows.append(Row(claim, 1e3 * seconds["ours"], 1e3 * seconds[peer], peer, "ms", goal, "lower"))
    return rows


def gpu_rows(kind: str, make: Make, ceilings: Ceilings, repeats: int) -> list[Row]:
    rows = []
    copying = ceilings.bandwidth / 1e9
    for name, (m, k) in GPU_SHAPES.items():
        size = make((m, k), 0, "cuda").size
        packed = [make((m, k), seed, "cuda") for seed in range(max(-(-UNCACHED // size), 2))]
        # Dense matrices are many times as large: fewer of them leave the cache as cold.
        few = packed[: max(-(-UNCACHED // (2 * m * k)), 2)]
        dense = [each.decode(torch.bfloat16) for each in few]
        require_equal(dense[0], few[0].decode_reference(torch.bfloat16), name)
        for tokens in GPU_TOKENS:
            generator = torch.Generator("cuda").manual_seed(tokens)
            x = torch.randn(tokens, k, generator=generator, device="cuda", dtype=torch.bfloat16)
            require_equal(few[0].apply(x), functional.linear(x, dense[0]), name)
            ours = graph_seconds([lambda each=each, x=x: each.apply(x) for each in packed], repeats)
            peer = graph_seconds([lambda W=W, x=x: functional.linear(x, W) for W in dense], repeats)
            claim = f"{kind} {m}×{k} ({name}) applied to {tokens} tokens"
            rows.append(Row(claim, 1e6 * ours, 1e6 * peer, "dense bfloat16", "µs", 0.25, "lower"))
            moved = size + 2 * tokens * (m + k)
            rows.append(Row(claim, moved / ours / 1e9, copying, "copying on the device", "GB/s", 0.5))
        for dtype, dtype_name in DTYPE_NAMES.items():
            seconds = graph_seconds([lambda each=each, dtype=dtype: each.decode(dtype) for each in few], repeats)
            moved = m * k * dtype.itemsize + size
            claim = f"{kind} {m}×{k} becomes dense {dtype_name}"
            rows.append(Row(claim, moved / seconds / 1e9, copying, "copying on the device", "GB/s", 0.8))
        del packed, few, dense
    return rows


def sweep(kind: str, make: Make, repeats: int) -> Tiles:
    """The fastest of the candidates' tiles for each number of tokens: printed as they are tried, and returned."""
    found = candidates_seconds(kind, make, repeats)
    return Tiles(tuple(sorted((most, min(tiles, key=tiles.__getitem__)) for most, tiles in found.items() if tiles)))


def candidates_seconds(kind: str, make: Make, repeats: int) -> Mapping[int, Mapping[Tile, float]]:
    """By the most tokens of a tile: the geometric mean of each candidate's seconds for the GPU's shapes."""
    deadline, own = time.monotonic() + SWEEP_SECONDS, packed_bits.TILES
    packed = {}
    for shape in GPU_SHAPES.values():
        first = make(shape, 0, "cuda")
        packed[shape] = [first, *(make(shape, seed, "cuda") for seed in range(1, -(-SWEPT // first.size)))]
    found: dict[int, dict[Tile, float]] = {}
    try:
        for (most, tokens), candidates in CANDIDATES.items():
            found[most] = {}
            for tile in (Tile(*candidate) for candidate in candidates):
                if time.monotonic() > deadline:
                    break
                packed_bits.TILES = Tiles(((packed_bits.TILES.most_tokens, tile),))
                seconds = [_seconds(each, tokens, shape[1], repeats) for shape, each in packed.items()]
                found[most][tile] = prod(seconds) ** (1 / len(seconds))
                took = "  ".join(f"{m}×{k} {1e6 * each:7.2f} µs" for (m, k), each in zip(packed, seconds, strict=True))
                print(f"{kind}, {tokens:2} tokens, {astuple(tile)}: {took}", flush=True)
    finally:
        packed_bits.TILES = own
    return found


def _seconds(packed: list[Packed], tokens: int, columns: int, repeats: int) -> float:
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    require_equal(packed[0].apply(x), functional.linear(x, packed[0].decode(torch.bfloat16)), "a tile")
    return graph_seconds([lambda each=each: each.apply(x) for each in packed], repeats)
