"""Many adapters' weights in one tensor of equal pages, so that memory never splinters.

Source: S-LoRA's unified paging (MLSys 2024, arXiv 2311.03285): a page holds `width` numbers, and whatever wants memory
(an adapter of any rank, a key-value cache) takes any pages that are free. Of a LoRA A ∈ ℝ^{r×n}, B ∈ ℝ^{m×r}, each of
the r rows of A and each of the r rows of Bᵀ ("rank rows") takes ⌈n/width⌉ and ⌈m/width⌉ pages of its own:

    A[j, k·width : (k+1)·width]  is page  table[start + j·⌈n/width⌉ + k]
    B[k·width : (k+1)·width, j]  is page  table[start + r·⌈n/width⌉ + j·⌈m/width⌉ + k]

so that a rank row lies in memory without a gap as far as a page reaches, and all that is ever wasted is the rest of a
rank row's last page: nothing where the width divides n and m (the greatest common divisor of a model's widths does).
The scale of an adapter is kept beside it, not multiplied into it: weights are read back as they came.
"""

from collections.abc import Iterator, KeysView, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GRAIN = 64  # numbers; pages are multiples of it, so that rank rows can be read sixteen bytes at a time
_LARGEST_SCALE = float(np.finfo(np.float32).max)
Pages = NDArray[np.int32]


class PoolFull(ValueError):
    """There are not enough free pages, or no free slot."""


class PageAllocator:
    """Hands out the numbers 0 … pages − 1; each has at most one owner. Any free page serves any request.

    Args:
        pages: how many there are; they grow no more.
    """

    def __init__(self, pages: int) -> None:
        if not 0 <= pages < 2**31:
            raise ValueError(f"There cannot be {pages:,} pages.")
        self._free: Pages = np.arange(pages - 1, -1, -1, dtype=np.int32)  # a stack; what lies above `_left` is stale
        self._left = pages
        self._taken = np.zeros(pages, dtype=np.bool_)

    @property
    def total(self) -> int:
        """All pages."""
        return len(self._free)

    @property
    def free(self) -> int:
        """How many are free."""
        return self._left

    def allocate(self, number: int) -> Pages:
        """Take `number` free pages, in no promised order.

        Raises:
            PoolFull: fewer are free; none is taken then.
        """
        if number < 0:
            raise ValueError(f"{number} pages cannot be allocated.")
        if number > self._left:
            raise PoolFull(f"{number:,} pages are wanted, {self._left:,} of {self.total:,} are free.")
        self._left -= number
        pages = self._free[self._left : self._left + number][::-1].copy()
        self._taken[pages] = True
        return pages

    def release(self, pages: Pages) -> None:
        """Give pages back.

        Raises:
            ValueError: one is no page, is free already, or is named twice; none is given back then.
        """
        pages = np.asarray(pages)
        if pages.ndim != 1 or not np.issubdtype(pages.dtype, np.integer):
            raise ValueError("Pages are a vector of integers.")
        if len(pages) and not 0 <= pages.min() <= pages.max() < self.total:
            raise ValueError(f"Pages are numbered 0 … {self.total - 1}, not {pages.min()} … {pages.max()}.")
        if not self._taken[pages].all() or len(np.unique(pages)) != len(pages):
            raise ValueError("A page is given back that is free already.")
        self._taken[pages] = False
        self._free[self._left : self._left + len(pages)] = pages
        self._left += len(pages)


@dataclass(frozen=True, eq=False)
class Lora:
    """y += scale·(x·Aᵀ)·Bᵀ.

    Args:
        A: [r, n].
        B: [m, r].
        scale: finite in float32, in which kernels keep it.

    Raises:
        ValueError: these are no two matrices of one rank, dtype and device, or the scale is not finite.
    """

    A: Tensor
    B: Tensor
    scale: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or len(self.A) != self.B.shape[1]:
            raise ValueError(f"A is [r, n] and B [m, r], not {tuple(self.A.shape)} and {tuple(self.B.shape)}.")
        if (self.A.dtype, self.A.device) != (self.B.dtype, self.B.device):
            raise ValueError(f"A is {self.A.dtype} on {self.A.device}, B {self.B.dtype} on {self.B.device}.")
        if not abs(self.scale) <= _LARGEST_SCALE:
            raise ValueError(f"The scale is {self.scale}, which float32 does not hold.")

    @property
    def rank(self) -> int:
        """r."""
        return len(self.A)


@dataclass(frozen=True)
class Module:
    """A linear layer of the base model that adapters may add to.

    Args:
        index: its row in the pool's directories.
        inputs: n.
        outputs: m.
    """

    index: int
    inputs: int
    outputs: int


class PagePool:
    """The LoRAs of many adapters for one base model, each adapter in a slot.

    Where weights lie is kept on the device, too, for kernels: `directory[i, a]` holds, for module i and slot a, `start`
    above, the rank (0 where the adapter leaves the module alone), the bits of the scale in float32, and 0. The table is
    as long as there are pages; when its end is reached, the holes that removed adapters have left are closed. All is
    done on the current stream: kernels that were launched on it before still see what they were launched for.

    Args:
        modules: name and (inputs n, outputs m) of each layer that adapters may add to.
        pages: how many pages; the pool does not grow.
        width: numbers in a page, a multiple of 64. The greatest common divisor of the layers' widths wastes nothing;
            kernels are fastest from 1024 on.
        slots: how many adapters fit at most.
        dtype: of the weights: float32, bfloat16 or float16 (float64 on the CPU).
        device: where.

    Attributes:
        allocator: of the pages; others may take some, too.
        storage: [pages, width].
    """

    def __init__(
        self,
        modules: Mapping[str, tuple[int, int]],
        *,
        pages: int,
        width: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if width <= 0 or width % GRAIN:
            raise ValueError(f"A page is a multiple of {GRAIN} numbers wide, not {width}.")
        if slots < 0:
            raise ValueError(f"There cannot be {slots} slots.")
        if not dtype.is_floating_point:
            raise ValueError(f"Weights are of a floating dtype, not {dtype}.")
        for name, shape in modules.items():
            if min(shape) < 1:
                raise ValueError(f"Module {name} cannot have {shape[0]} inputs and {shape[1]} outputs.")
        self.modules = {name: Module(i, n, m) for i, (name, (n, m)) in enumerate(modules.items())}
        self.width = width
        self.allocator = PageAllocator(pages)
        self.storage = torch.zeros(pages, width, dtype=dtype, device=device)
        self.device = self.storage.device
        # How many adapters have left each slot, and in all: who made a plan with one of them can tell.
        self.removed, self.removals = np.zeros(slots, dtype=np.int64), 0
        self.host_first, self.host_ranks, self.host_offsets, self.host_scales = (
            np.zeros(slots, dtype=np.int32),
            np.zeros((len(modules), slots), dtype=np.int32),
            np.zeros((len(modules), slots), dtype=np.int32),
            np.zeros((len(modules), slots), dtype=np.float64),
        )
        self.host_largest = np.zeros(slots, dtype=np.int32)  # of an adapter's ranks
        self.host_table: Pages = np.zeros(pages, dtype=np.int32)
        self.table = torch.zeros(pages, dtype=torch.int32, device=device)
        self.directory = torch.zeros(len(modules), slots, 4, dtype=torch.int32, device=device)
        self._lengths: dict[int, int] = {}  # of each tenant's part of the table, in the table's order
        self._end = 0

    @property
    def slots(self) -> int:
        """How many adapters fit at most."""
        return len(self.host_first)

    @property
    def tenants(self) -> KeysView[int]:
        """The slots that hold an adapter."""
        return self._lengths.keys()

    def pages_of(self, adapter: Mapping[str, Lora]) -> int:
        """How many pages an adapter takes."""
        return sum(lora.rank * self._pages_of_row(self.modules[name]) for name, lora in adapter.items())

    def add(self, adapter: Mapping[str, Lora]) -> int:
        """Copy an adapter into the pool.

        Args:
            adapter: by module; of the pool's dtype, on any device.

        Returns:
            Its slot.

        Raises:
            PoolFull: no slot is free, or too few pages are; the pool is as before.
            ValueError: the adapter is for a module that there is not, or of other shapes or another dtype.
        """
        self._check(adapter)
        slot = next((each for each in range(self.slots) if each not in self._lengths), None)
        if slot is None:
            raise PoolFull(f"All {self.slots} slots hold an adapter.")
        pages = self.allocator.allocate(self.pages_of(adapter))
        try:
            self._write(adapter, pages)
        except BaseException:  # of memory, say
            self.allocator.release(pages)
            raise
        if self._end + len(pages) > len(self.host_table):
            self._close_holes()
        begin, self._end = self._end, self._end + len(pages)
        self._lengths[slot] = len(pages)
        self.host_table[begin : self._end] = pages
        self.table[begin : self._end] = torch.from_numpy(pages).to(self.device)
        self.host_first[slot] = begin
        for host in (self.host_ranks, self.host_offsets, self.host_scales):
            host[:, slot] = 0
        for name, offset, _ in self._parts(adapter):
            index = self.modules[name].index
            self.host_offsets[index, slot] = offset
            self.host_ranks[index, slot] = adapter[name].rank
            self.host_scales[index, slot] = adapter[name].scale
        self.host_largest[slot] = self.host_ranks[:, slot].max(initial=0)
        self._tell(slice(slot, slot + 1))
        return slot

    def remove(self, slot: int) -> None:
        """Free an adapter's pages and slot.

        Raises:
            ValueError: there is no adapter in the slot.
        """
        self.allocator.release(self.pages(slot))
        del self._lengths[slot]
        self.removed[slot] += 1
        self.removals += 1
        self.host_ranks[:, slot] = 0
        self._tell(slice(slot, slot + 1))  # of rank 0: a launch that should not be adds nothing

    def pages(self, slot: int) -> Pages:
        """An adapter's pages, in order.

        Raises:
            ValueError: there is no adapter in the slot.
        """
        if slot not in self._lengths:
            raise ValueError(f"There is no adapter in slot {slot}.")
        begin = self.host_first[slot]
        return self.host_table[begin : begin + self._lengths[slot]].copy()

    def read(self, slot: int) -> dict[str, Lora]:
        """An adapter's LoRAs, copied from its pages.

        Raises:
            ValueError: there is no adapter in the slot.
        """
        self.pages(slot)  # or there is none
        found = {}
        for name, module in self.modules.items():
            if self.host_ranks[module.index, slot]:
                A, B = self.rank_rows(slot, module)
                found[name] = Lora(A, B.T.contiguous(), float(self.host_scales[module.index, slot]))
        return found

    def rank_rows(self, slot: int, module: Module) -> tuple[Tensor, Tensor]:
        """A [r, n] and Bᵀ [r, m] of one module, copied from their pages."""
        rank = int(self.host_ranks[module.index, slot])
        begin = int(self.host_first[slot] + self.host_offsets[module.index, slot])
        parts = []
        for extent in (module.inputs, module.outputs):
            end = begin + rank * self._pieces(extent)
            pages = self.table[begin:end].long()
            parts.append(self.storage[pages].view(rank, self._pieces(extent) * self.width)[:, :extent].contiguous())
            begin = end
        return parts[0], parts[1]

    def _check(self, adapter: Mapping[str, Lora]) -> None:
        for name, lora in adapter.items():
            if name not in self.modules:
                raise ValueError(f"The pool has no module {name}.")
            module = self.modules[name]
            if (lora.A.shape[1], len(lora.B)) != (module.inputs, module.outputs):
                raise ValueError(
                    f"{name} has {module.inputs} inputs and {module.outputs} outputs; "
                    f"A is {tuple(lora.A.shape)} and B {tuple(lora.B.shape)}."
                )
            if lora.A.dtype != self.storage.dtype:
                raise ValueError(f"{name} is {lora.A.dtype}, the pool {self.storage.dtype}: convert it first.")

    def _pieces(self, extent: int) -> int:
        return -(-extent // self.width)

    def _pages_of_row(self, module: Module) -> int:
        return self._pieces(module.inputs) + self._pieces(module.outputs)

    def _parts(self, adapter: Mapping[str, Lora]) -> Iterator[tuple[str, int, int]]:
        """Module, where its pages begin among the adapter's, and how many they are."""
        offset = 0
        for name, lora in adapter.items():
            there = lora.rank * self._pages_of_row(self.modules[name])
            yield name, offset, there
            offset += there

    def _write(self, adapter: Mapping[str, Lora], pages: Pages) -> None:
        for name, offset, there in self._parts(adapter):
            own = torch.from_numpy(pages[offset : offset + there]).to(self.device).long()
            self.storage.index_copy_(0, own, self._rank_rows(adapter[name]))

    def _rank_rows(self, lora: Lora) -> Tensor:
        """A LoRA as its pages' contents."""
        parts = []
        for matrix in (lora.A.detach(), lora.B.detach().T):
            missing = -matrix.shape[1] % self.width
            parts.append(torch.nn.functional.pad(matrix, (0, missing)).reshape(-1, self.width))
        return torch.cat(parts).to(self.device)

    def _tell(self, slots: slice) -> None:
        """Bring the device's directory up to date."""
        ranks = self.host_ranks[:, slots]
        entries = np.zeros((*ranks.shape, 4), dtype=np.int32)
        entries[..., 0] = self.host_first[slots] + self.host_offsets[:, slots]
        entries[..., 1] = ranks
        entries[..., 2] = self.host_scales[:, slots].astype(np.float32).view(np.int32)
        self.directory[:, slots] = torch.from_numpy(entries).to(self.device)

    def _close_holes(self) -> None:
        tables = {slot: self.pages(slot) for slot in self._lengths}
        self._end = 0
        for slot, pages in tables.items():
            self.host_first[slot] = self._end
            self.host_table[self._end : self._end + len(pages)] = pages
            self._end += len(pages)
        self.table.copy_(torch.from_numpy(self.host_table))
        self._tell(slice(None))
