"""Ternary matrices applied and decoded from their masks, against dense matrices, the plain reference, and copying.

    python -m benchmarks.kernels.ternary [--density 0.05] [--repeats 9]

On the CPU all runs on one thread, and times are those of the processor, so that what else the machine does counts
little. Where there is a CUDA device, that is measured instead: for few tokens, as generation has them, over so many
matrices in turn that none is still in the cache, in a CUDA graph, as launching by itself takes longer than the work.
Dense peers are bfloat16, and on the CPU float32, too. Results are compared first: a wrong one ends the benchmark.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.results_file import Row, write
from kernels.ternary import (
    TernaryTensor,
    apply_ternary,
    apply_ternary_reference,
    decode_ternary,
    decode_ternary_reference,
)

SCALE = 0.03125
CPU_SHAPE, CPU_TOKENS = (4096, 4096), (1, 8, 64)
GPU_SHAPES = {"Llama 8B's attention": (4096, 4096), "Llama 8B's MLP": (14336, 4096), "Llama 70B's MLP": (28672, 8192)}
GPU_TOKENS = (1, 4, 16)
UNCACHED = 512 << 20  # bytes of masks that are gone through before one comes again; the largest L2 caches have 128 MB
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def matrix(shape: tuple[int, int], density: float, seed: int, device: str) -> TernaryTensor:
    """Random places and signs."""
    generator = torch.Generator(device).manual_seed(seed)
    places = torch.arange(8, device=device, dtype=torch.uint8)

    def packed(bits: Tensor) -> Tensor:
        return (bits.view(-1, 8).to(torch.uint8) << places).sum(1, dtype=torch.uint8)

    kept = torch.rand(shape, generator=generator, device=device) < density
    negative = kept & (torch.rand(shape, generator=generator, device=device) < 0.5)
    return TernaryTensor(shape, packed(kept), packed(negative))


def check(found: Tensor, expected: Tensor, what: str) -> None:
    """End the benchmark where a result is wrong."""
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    if not error < 2**-6:
        raise SystemExit(f"{what}: results differ by {error:.2g}; the comparison means nothing")


def processor_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of the processor's seconds, after one run that does not count."""
    work()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found)


def unpackbits(ternary: TernaryTensor, dtype: torch.dtype) -> Tensor:
    """Decoding as one would write it with NumPy."""
    nonzero, negative = (
        np.unpackbits(mask.numpy(), count=ternary.length, bitorder="little").view(np.int8)
        for mask in (ternary.nonzero, ternary.negative)
    )
    return torch.from_numpy(nonzero - 2 * negative).to(dtype).mul_(SCALE).view(ternary.shape)


def on_cpu(density: float, repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    gamma = matrix(CPU_SHAPE, density, 0, "cpu")
    name = f"{CPU_SHAPE[0]}×{CPU_SHAPE[1]}"
    rows = []
    for dtype, dtype_name in DTYPE_NAMES.items():
        W = decode_ternary(gamma, SCALE, dtype)
        megabytes = W.numel() * W.element_size() / 1e6
        decoders: dict[str, Callable[[], Tensor]] = {
            "ours": lambda dtype=dtype: decode_ternary(gamma, SCALE, dtype),
            "NumPy's unpackbits": lambda dtype=dtype: unpackbits(gamma, dtype),
            "the plain reference": lambda dtype=dtype: decode_ternary_reference(gamma, SCALE, dtype),
            "copying the dense matrix": lambda W=W: W.clone(),
        }
        for peer, decoder in decoders.items():
            check(decoder(), W, peer)
        speeds = {peer: megabytes / processor_seconds(decoder, repeats) for peer, decoder in decoders.items()}
        for peer, goal in (("NumPy's unpackbits", 1), ("the plain reference", 10), ("copying the dense matrix", 0.1)):
            claim = f"ternary {name} becomes dense {dtype_name}"
            rows.append(Row(claim, speeds["ours"], speeds[peer], peer, "MB/s", goal))
        for tokens in CPU_TOKENS:
            x = torch.randn(tokens, CPU_SHAPE[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
            products: dict[str, Callable[[], Tensor]] = {
                "ours": lambda x=x: apply_ternary(x, gamma, SCALE),
                "the plain reference": lambda x=x: apply_ternary_reference(x, gamma, SCALE),
                "decoding first": lambda x=x: functional.linear(x, decode_ternary(gamma, SCALE, x.dtype)),
                "dense in memory": lambda x=x, W=W: functional.linear(x, W),
            }
            for peer, product in products.items():
                check(product(), products["dense in memory"](), peer)
            seconds = {peer: processor_seconds(product, repeats) for peer, product in products.items()}
            claim = f"ternary {name} applied to {tokens} tokens, {dtype_name}"
            # What is dense in memory takes 8 or 16 times the bytes; that it may be faster is what the first goal says.
            for peer, goal in (("dense in memory", 3.0), ("decoding first", 1.0), ("the plain reference", 0.1)):
                rows.append(Row(claim, 1e3 * seconds["ours"], 1e3 * seconds[peer], peer, "ms", goal, "lower"))
    return rows


def graph_seconds(work: Sequence[Callable[[], object]], repeats: int) -> float:
    """Median seconds of one piece of `work`, all of which are run in turn within one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for each in work[:2]:  # kernels are compiled before a graph is captured
            each()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in work:
            each()
    graph.replay()
    found = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found) / len(work)


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second, read and written, of copying 1 GiB on the device."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_seconds([lambda: target.copy_(source)], repeats)


def on_gpu(density: float, repeats: int) -> list[Row]:
    rows = []
    bandwidth = copy_bandwidth(repeats)
    for name, shape in GPU_SHAPES.items():
        number = max(-(-UNCACHED // (shape[0] * shape[1] // 4)), 2)
        # Dense matrices are 8 times as large: fewer of them leave the cache as cold.
        gammas = [matrix(shape, density, seed, "cuda") for seed in range(number)]
        dense = [decode_ternary(gamma, SCALE, torch.bfloat16) for gamma in gammas[: max(-(-number // 8), 2)]]
        part = TernaryTensor(
            (64, shape[1]), *(mask[: 8 * shape[1]] for mask in (gammas[0].nonzero, gammas[0].negative))
        )
        check(dense[0][:64], decode_ternary_reference(part, SCALE, torch.bfloat16), name)
        for tokens in GPU_TOKENS:
            generator = torch.Generator("cuda").manual_seed(tokens)
            x = torch.randn(tokens, shape[1], generator=generator, device="cuda", dtype=torch.bfloat16)
            check(apply_ternary(x, gammas[0], SCALE), functional.linear(x, dense[0]), name)
            ours = graph_seconds([lambda g=gamma, x=x: apply_ternary(x, g, SCALE) for gamma in gammas], repeats)
            peer = graph_seconds([lambda W=W, x=x: functional.linear(x, W) for W in dense], repeats)
            claim = f"ternary {shape[0]}×{shape[1]} ({name}) applied to {tokens} tokens"
            rows.append(Row(claim, 1e6 * ours, 1e6 * peer, "dense bfloat16", "µs", 0.25, "lower"))
        for dtype, dtype_name in DTYPE_NAMES.items():
            few = gammas[: len(dense)]
            seconds = graph_seconds([lambda g=g, dtype=dtype: decode_ternary(g, SCALE, dtype) for g in few], repeats)
            moved = shape[0] * shape[1] * (dtype.itemsize + 1 / 4)  # written, and the masks read
            claim = f"ternary {shape[0]}×{shape[1]} becomes dense {dtype_name}"
            rows.append(Row(claim, moved / seconds / 1e9, bandwidth / 1e9, "copying on the device", "GB/s", 0.8))
        del gammas, dense
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    details = {"density": options.density, "load": os.getloadavg()[0]}
    if torch.cuda.is_available():
        write("ternary", on_gpu(options.density, options.repeats), torch.cuda.get_device_name(), details)
    else:
        write("ternary", on_cpu(options.density, options.repeats), details=details)
