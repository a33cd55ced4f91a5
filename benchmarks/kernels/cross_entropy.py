"""The cross-entropy kernel against PyTorch's own and Liger's: forward and backward, and the memory that they take.

Logits are bfloat16 and labels few or many, as a training step has them. Needs a CUDA device; Liger is compared where
it is installed (`pip install --no-deps liger-kernel`).

    python -m benchmarks.kernels.cross_entropy
"""

from collections.abc import Callable
from importlib.util import find_spec
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.measuring import Ceilings, require_equal
from benchmarks.kernels.one import measure
from benchmarks.results_file import Row
from kernels.cross_entropy import cross_entropy

SIZES = {"SmolLM2, 8192 labels": (8192, 49_152), "Gemma 3, 4096 labels": (4096, 262_144)}
WARM, TIMED = 5, 30

Loss = Callable[[Tensor, Tensor], Tensor]


def ours(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets).sum()


def pytorch(logits: Tensor, targets: Tensor) -> Tensor:
    """As transformers' own loss calls it: the logits in float32 first."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def liger(logits: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    loss: Tensor = liger_cross_entropy(logits, targets, reduction="sum")
    return loss


def cost(loss: Loss, rows: int, vocabulary: int) -> tuple[float, float, float]:
    """Median seconds, GB on top of the logits at the peak, and the loss."""
    generator = torch.Generator("cuda").manual_seed(0)
    source = torch.randn(rows, vocabulary, generator=generator, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (rows,), generator=generator, device="cuda")
    seconds, peak, value = [], 0, 0.0
    for number in range(WARM + TIMED):
        logits = source.detach().clone().requires_grad_() * 1  # no leaf, so that it may be overwritten
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        total = loss(logits, targets)
        (gradient,) = torch.autograd.grad(total, logits)
        end.record()
        torch.cuda.synchronize()
        if number >= WARM:
            seconds.append(begin.elapsed_time(end) / 1000)
        peak, value = torch.cuda.max_memory_allocated() - before, total.item()
        del logits, gradient, total
    return median(seconds), peak / 1e9, value


def require_gradient(vocabulary: int) -> None:
    """End the benchmark where the kernel's gradient is not PyTorch's."""
    generator = torch.Generator("cuda").manual_seed(1)
    source = torch.randn(64, vocabulary, generator=generator, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (64,), generator=generator, device="cuda")
    gradients = []
    for loss in (ours, pytorch):
        logits = source.clone().requires_grad_()
        gradients += torch.autograd.grad(loss(logits * 1, targets), logits)
    require_equal(*gradients, "the gradient")


def compare(size: str, ceilings: Ceilings) -> list[Row]:
    rows, vocabulary = SIZES[size]
    require_gradient(vocabulary)
    our_seconds, our_memory, our_loss = cost(ours, rows, vocabulary)
    claim = f"cross-entropy, {size}"
    moved = 3 * 2 * rows * vocabulary  # logits are read by forward and by backward, which writes over them
    speed, copying = moved / our_seconds / 1e9, ceilings.bandwidth / 1e9
    found = [Row(f"{claim}, bytes moved", speed, copying, "copying on the device", "GB/s", 0.8)]
    peers = {"PyTorch": pytorch, **({"Liger": liger} if find_spec("liger_kernel") else {})}
    for name, peer in peers.items():
        seconds, memory, loss = cost(peer, rows, vocabulary)
        if abs(our_loss - loss) > 2**-8 * loss:  # Liger's comes in the dtype of the logits, rounded to 8 bits
            raise SystemExit(f"{size}: losses differ ({our_loss}, {loss}); the comparison means nothing")
        found.append(Row(f"{claim}, time", our_seconds * 1e3, seconds * 1e3, name, "ms", 1.0, "lower"))
        # The kernel allocates two floats a row, which no peer can do without either.
        floor = 2 * 4 * rows / 1e9
        found.append(
            Row(f"{claim}, memory on top", max(our_memory, floor), max(memory, floor), name, "GB", 1.0, "lower")
        )
    return found


def on_gpu(ceilings: Ceilings) -> list[Row]:
    return [row for size in SIZES for row in compare(size, ceilings)]


if __name__ == "__main__":
    measure("cross_entropy")
