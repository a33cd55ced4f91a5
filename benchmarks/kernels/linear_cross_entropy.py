"""Cross-entropy of a head without its logits, against making them first, `torch.compile` and Liger's fused one.

    python -m benchmarks.kernels.linear_cross_entropy

On a GPU in bfloat16, with the head frozen, as it is beside adapters, and trained: time of forward and backward, and
the most memory they take on top of hidden states and head. Launches are part of the time, as Liger's cannot be
captured in a graph. Its gradient of the head is summed in bfloat16 by default; ours in float32, so it is measured with
a float32 sum, too. Ours trades memory for fewer launches, so it is also measured "lean", in about as much as Liger's.
On the CPU: the head of Gemma-3-270M on 8 × 128 tokens in float32 on one thread, each side in a process of its own.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.measuring import Ceilings, event_seconds, gpu_peak_bytes, require_equal
from benchmarks.kernels.one import measure
from benchmarks.memory import peak_memory
from benchmarks.results_file import Row
from kernels import linear_cross_entropy as ours_module
from kernels.linear_cross_entropy import Head, linear_cross_entropy

REPEATS = 10
LEAN = 8 << 20  # bytes; about what Liger works in
GPU_SIZES = {
    "SmolLM2-135M, 8192 labels": (8192, 576, 49_152),
    "Gemma-3-270M, 4096 labels": (4096, 640, 262_144),
    "Llama-3-8B, 8192 labels": (8192, 4096, 128_256),
}
CPU_SIZE, CPU_REPEATS = (1016, 640, 262_144), 3  # 8 × 127 labels

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Work:
    """Hidden states [N, H] and a head [V, H], with or without a gradient of the head."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor

    def gradients(self, loss: Loss) -> tuple[Tensor, ...]:
        """Forward and backward of the mean."""
        leaves = [leaf for leaf in (self.hidden, self.weight) if leaf.requires_grad]
        return torch.autograd.grad(loss(self.hidden, self.weight, self.targets), leaves)


def work(size: tuple[int, int, int], trained: bool, device: str, dtype: torch.dtype) -> Work:
    rows, width, vocabulary = size
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device=device).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, device=device).mul_(2 / width**0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    return Work(hidden.requires_grad_(), weight.requires_grad_(trained), targets)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, Head(weight), targets).mean()


def pytorch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As transformers' own loss does it: all logits, then in float32."""
    return functional.cross_entropy(functional.linear(hidden, weight).float(), targets)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, accumulator: torch.dtype | None = None) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(hidden, weight, targets, accum_dtype=accumulator)
    return loss


def liger_exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return liger(hidden, weight, targets, torch.float32)


def peers(trained: bool) -> dict[str, Loss]:
    found: dict[str, Loss] = {"PyTorch": pytorch}
    if not trained:  # compiling takes longer than all else
        found["torch.compile"] = torch.compile(pytorch, dynamic=False)
    if find_spec("liger_kernel"):
        found["Liger"] = liger
        if trained:
            found["Liger, float32 sums"] = liger_exact
    return found


def measured(given: Work, loss: Loss, repeats: int = REPEATS) -> tuple[float, int]:
    """Seconds of forward and backward, and the most bytes on top."""
    return event_seconds(lambda: given.gradients(loss), repeats), gpu_peak_bytes(lambda: given.gradients(loss))


@contextmanager
def working_memory(number: int) -> Iterator[None]:
    """Within it, ours takes so many bytes beside results, where hidden states take less."""
    before, ours_module._LEAST = ours_module._LEAST, number
    try:
        yield
    finally:
        ours_module._LEAST = before


def on_gpu(ceilings: Ceilings) -> list[Row]:
    rows = []
    for name, size in GPU_SIZES.items():
        for trained in (False, True):
            torch.cuda.empty_cache()
            given = work(size, trained, "cuda", torch.bfloat16)
            claim = f"linear cross-entropy, {name}, head {'trained' if trained else 'frozen'}"
            exact = part_of_reference(given)
            require_equal(given.gradients(ours)[0][:128], exact, claim, tolerance=2**-5)
            seconds, memory = measured(given, ours)
            # What any implementation multiplies that keeps no logits and sees them once: h·Wᵀ and once more a gradient.
            products = 3 if trained else 2
            rate = 2 * products * size[0] * size[1] * size[2] / seconds
            rows.append(Row(f"{claim}, rate", rate / 1e12, ceilings.rate / 1e12, "product 8192³", "TFLOP/s", 0.5))
            for peer, loss in peers(trained).items():
                try:
                    their_seconds, their_memory = measured(given, loss)
                except Exception as error:  # a peer that fails is no failure of ours
                    print(f"{claim}: {peer} was left out: {str(error).splitlines()[0]}")
                    torch.cuda.empty_cache()
                    continue
                rows.append(Row(f"{claim}, time", 1e3 * seconds, 1e3 * their_seconds, peer, "ms", 1.0, "lower"))
                rows.append(Row(f"{claim}, memory on top", memory / 1e6, their_memory / 1e6, peer, "MB", 1.0, "lower"))
                if peer == "Liger":
                    with working_memory(LEAN):
                        lean, least = measured(given, ours)
                    rows.append(Row(f"{claim}, lean, time", 1e3 * lean, 1e3 * their_seconds, peer, "ms", 1.0, "lower"))
                    rows.append(
                        Row(f"{claim}, lean, memory", least / 1e6, their_memory / 1e6, peer, "MB", 1.0, "lower")
                    )
            del given
    return rows


def part_of_reference(given: Work, rows: int = 128) -> Tensor:
    """The gradient of the first hidden states, from logits in float32."""
    hidden = given.hidden.detach()[:rows].float().requires_grad_()
    loss = functional.cross_entropy(hidden @ given.weight.detach().float().T, given.targets[:rows], reduction="sum")
    return torch.autograd.grad(loss / len(given.targets), hidden)[0]


def sweep(ceilings: Ceilings) -> None:
    """Time and memory with other amounts of working memory."""
    del ceilings
    for name, size in GPU_SIZES.items():
        for trained in (False, True):
            given = work(size, trained, "cuda", torch.bfloat16)
            for least in (8, 32, 64, 128, 192, 256):
                with working_memory(least << 20):
                    tile = ours_module._tile(given.hidden, 1, True)
                    seconds, memory = measured(given, ours, 5)
                print(
                    f"{name}, {'trained' if trained else 'frozen'}: {least} MiB, tile {tile}: "
                    f"{1e3 * seconds:.2f} ms, {memory / 1e6:.1f} MB"
                )


CPU_SIDES: dict[str, Loss] = {"ours": ours, "PyTorch": pytorch}


def one_side(side: str) -> tuple[float, float]:
    """Processor seconds of forward and backward, and the most bytes on top of hidden states and head."""
    torch.set_num_threads(1)
    given = work(CPU_SIZE, False, "cpu", torch.float32)
    small = work((16, 640, 4096), False, "cpu", torch.float32)
    small.gradients(CPU_SIDES[side])  # so that what libraries take for themselves is there before
    with peak_memory() as peak:
        began = time.process_time()
        given.gradients(CPU_SIDES[side])
        seconds = time.process_time() - began
    return seconds, peak[0]


def on_cpu(repeats: int = CPU_REPEATS) -> list[Row]:
    torch.set_num_threads(1)
    given = work((64, *CPU_SIZE[1:]), False, "cpu", torch.float32)
    require_equal(given.gradients(ours)[0], given.gradients(pytorch)[0], "the gradient", tolerance=1e-5)
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in CPU_SIDES}
    for _ in range(repeats):
        for side, measured in found.items():
            command = [sys.executable, "-m", "benchmarks.kernels.linear_cross_entropy", "--side", side]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            measured.append((float(printed[0]), float(printed[1])))
    claim = "linear cross-entropy, Gemma-3-270M's head on 8×128 tokens, float32"
    (seconds, memory), (their_seconds, their_memory) = (
        tuple(median(each) for each in zip(*measured, strict=True)) for measured in found.values()
    )
    return [
        Row(f"{claim}, memory", memory / 1e6, their_memory / 1e6, "PyTorch, all logits", "MB", 1 / 3, "lower"),
        Row(f"{claim}, time", seconds, their_seconds, "PyTorch, all logits", "s", 1.0, "lower"),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=CPU_SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(*one_side(options.side))
    else:
        measure("linear_cross_entropy")
