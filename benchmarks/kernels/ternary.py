"""Ternary matrices applied and decoded from their masks, against dense matrices, the plain reference, and copying.

    python -m benchmarks.kernels.ternary [--density 0.05] [--repeats 9]

On the CPU all runs on one thread, and times are those of the processor, so that what else the machine does counts
little. Where there is a CUDA device, that is measured instead: for few tokens, as generation has them, over so many
matrices in turn that none is still in the cache, in a CUDA graph, as launching by itself takes longer than the work.
Dense peers are bfloat16, and on the CPU float32, too. Results are compared first: a wrong one ends the benchmark.
"""

import argparse
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.measuring import Ceilings, gpu_ceilings, graph_seconds, processor_seconds, require_equal
from benchmarks.results_file import Row, write
from kernels.ternary import (
    TernaryTensor,
    apply_ternary,
    apply_ternary_reference,
    decode_ternary,
    decode_ternary_reference,
)

DENSITY, REPEATS = 0.05, 9
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


def unpackbits(ternary: TernaryTensor, dtype: torch.dtype) -> Tensor:
    """Decoding as one would write it with NumPy."""
    nonzero, negative = (
        np.unpackbits(mask.numpy(), count=ternary.length, bitorder="little").view(np.int8)
        for mask in (ternary.nonzero, ternary.negative)
    )
    return torch.from_numpy(nonzero - 2 * negative).to(dtype).mul_(SCALE).view(ternary.shape)


def on_cpu(density: float = DENSITY, repeats: int = REPEATS) -> list[Row]:
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
            require_equal(decoder(), W, peer)
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
                require_equal(product(), products["dense in memory"](), peer)
            seconds = {peer: processor_seconds(product, repeats) for peer, product in products.items()}
            claim = f"ternary {name} applied to {tokens} tokens, {dtype_name}"
            # What is dense in memory takes 8 or 16 times the bytes; that it may be faster is what the first goal says.
            for peer, goal in (("dense in memory", 3.0), ("decoding first", 1.0), ("the plain reference", 0.1)):
                rows.append(Row(claim, 1e3 * seconds["ours"], 1e3 * seconds[peer], peer, "ms", goal, "lower"))
    return rows


def on_gpu(ceilings: Ceilings, density: float = DENSITY, repeats: int = REPEATS) -> list[Row]:
    rows = []
    for name, shape in GPU_SHAPES.items():
        number = max(-(-UNCACHED // (shape[0] * shape[1] // 4)), 2)
        # Dense matrices are 8 times as large: fewer of them leave the cache as cold.
        gammas = [matrix(shape, density, seed, "cuda") for seed in range(number)]
        dense = [decode_ternary(gamma, SCALE, torch.bfloat16) for gamma in gammas[: max(-(-number // 8), 2)]]
        part = TernaryTensor(
            (64, shape[1]), *(mask[: 8 * shape[1]] for mask in (gammas[0].nonzero, gammas[0].negative))
        )
        require_equal(dense[0][:64], decode_ternary_reference(part, SCALE, torch.bfloat16), name)
        for tokens in GPU_TOKENS:
            generator = torch.Generator("cuda").manual_seed(tokens)
            x = torch.randn(tokens, shape[1], generator=generator, device="cuda", dtype=torch.bfloat16)
            require_equal(apply_ternary(x, gammas[0], SCALE), functional.linear(x, dense[0]), name)
            ours = graph_seconds([lambda g=gamma, x=x: apply_ternary(x, g, SCALE) for gamma in gammas], repeats)
            peer = graph_seconds([lambda W=W, x=x: functional.linear(x, W) for W in dense], repeats)
            claim = f"ternary {shape[0]}×{shape[1]} ({name}) applied to {tokens} tokens"
            rows.append(Row(claim, 1e6 * ours, 1e6 * peer, "dense bfloat16", "µs", 0.25, "lower"))
        for dtype, dtype_name in DTYPE_NAMES.items():
            few = gammas[: len(dense)]
            seconds = graph_seconds([lambda g=g, dtype=dtype: decode_ternary(g, SCALE, dtype) for g in few], repeats)
            moved = shape[0] * shape[1] * (dtype.itemsize + 1 / 4)  # written, and the masks read
            claim = f"ternary {shape[0]}×{shape[1]} becomes dense {dtype_name}"
            rows.append(
                Row(claim, moved / seconds / 1e9, ceilings.bandwidth / 1e9, "copying on the device", "GB/s", 0.8)
            )
        del gammas, dense
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=DENSITY)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    details = {"density": options.density, "load": os.getloadavg()[0]}
    if torch.cuda.is_available():
        rows = on_gpu(gpu_ceilings(options.repeats), options.density, options.repeats)
        write("ternary", rows, torch.cuda.get_device_name(), details)
    else:
        write("ternary", on_cpu(options.density, options.repeats), details=details)
