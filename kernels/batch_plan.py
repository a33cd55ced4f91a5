"""Which rows of a batch belong to which adapter, sorted and cut for the kernels of `kernels.multi_lora`.

Made once a batch, on the host, for all layers: rows are put in groups, an adapter each, the largest rank first; groups
are cut into tiles of rows, and tiles into blocks of ranks. One copy brings that to the device. Without kernels, on the
CPU, nothing is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.dispatch import runs_on_triton
from kernels.page_pool import PagePool

Adapters = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Shrinking:
    """How a program computes a block of h.

    Args:
        ranks: of the adapter, in a block.
        columns: of x, at a time.
        span: columns in all; 0: as many as leave enough programs to fill a GPU.
        warps: of a program.
        stages: of loads that are under way.
    """

    ranks: int
    columns: int
    span: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Expanding:
    """How a program adds to a block of y.

    Args:
        columns: of y, for adapters of up to 16 ranks, of up to 32, and of more, which take 64 ranks at a time.
        warps: of a program.
        stages: of loads that are under way.
        turns: so many columns a program takes in turn, about: for it is long until it knows where its weights are.
    """

    columns: tuple[int, int, int]
    warps: int
    stages: int
    turns: int


@dataclass(frozen=True)
class Tiling:
    """How work is cut.

    Args:
        rows: of an adapter, in a tile: 16 or more, for tensor cores. Columns below are for numbers of 16 bits: of 32
            bits, programs take half as many.
        shrink: x to h.
        expand: h to y.
    """

    rows: int
    shrink: Shrinking
    expand: Expanding


# For one row or a few of each adapter, as an H200 does best with, and for prompts.
FEW = Tiling(16, Shrinking(16, 256, 1024, warps=4, stages=4), Expanding((512, 256, 128), warps=4, stages=1, turns=1))
MANY = Tiling(64, Shrinking(32, 64, 0, warps=4, stages=6), Expanding((64, 64, 64), warps=4, stages=1, turns=8))
_FROM_MANY = 32  # rows of an adapter, on average


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Which rows of a batch are whose, for every layer.

    Args:
        pool: that holds the adapters.
        adapters: [rows], each row's slot, −1: none.
        tiling: how the work is cut.
        width: the most ranks of an adapter that there is room for, rounded up to 16.
        blocks: [blocks, 4] int32 on the pool's device: slot, first position, rows and first rank; slot −1 where there
            is no block.
        order: [rows] likewise: the row at each position.
        buffer: both; empty where no kernel will read it.
        removals: how many adapters had been removed from each slot, and in all, when the plan was made.
        editions: how many plans there have been in this buffer, a number that they share.
        edition: which of them this is.
    """

    pool: PagePool
    adapters: NDArray[np.int64]
    tiling: Tiling
    width: int
    blocks: Tensor
    order: Tensor
    buffer: Tensor
    removals: tuple[NDArray[np.int64], int]
    editions: NDArray[np.int64]
    edition: int = 0

    @property
    def rows(self) -> int:
        """Of the batch."""
        return len(self.adapters)

    def check(self) -> None:
        """Refuse what is no plan any more.

        Raises:
            ValueError: one of its adapters has been removed from the pool, or another plan is in its memory.
        """
        if self.editions[0] != self.edition:
            raise ValueError("Another batch has been planned in this plan's memory.")
        removed, before = self.removals
        if self.pool.removals != before:
            own = self.adapters[self.adapters >= 0]
            if (removed != self.pool.removed)[own].any():
                raise ValueError("An adapter of the plan has been removed from the pool: plan anew.")


def plan_batch(
    pool: PagePool, adapters: Adapters, *, tiling: Tiling | None = None, largest_rank: int | None = None
) -> BatchPlan:
    """Sort a batch's rows for `add_multi_lora`, on the host; one copy goes to the device.

    Args:
        pool: holds the adapters.
        adapters: for each row the slot of its adapter, −1 for none; on the host.
        tiling: FEW or MANY; as a rule the one that fits the batch.
        largest_rank: make room for any adapters of up to this rank: for `replan`, where a CUDA graph is captured.

    Raises:
        ValueError: a slot is out of range or empty, an adapter's rank is larger than the largest, or that is below 1.
    """
    slots = checked_slots(pool, adapters)
    if largest_rank is not None and largest_rank < 1:
        raise ValueError(f"The largest rank is 1 or more, not {largest_rank}.")
    cut = cut_batch(pool, slots, tiling) if runs_on_triton(pool.storage) else _UNCUT
    blocks, positions, width = len(cut.blocks), len(cut.order), cut.width
    if largest_rank is not None and cut is not _UNCUT:
        blocks, positions = len(slots) * -(-largest_rank // cut.tiling.shrink.ranks), len(slots)
        width = -(-largest_rank // 16) * 16
    buffer = torch.empty(4 * blocks + positions, dtype=torch.int32, device=pool.device)
    parts = buffer[: 4 * blocks].view(-1, 4), buffer[4 * blocks :]
    plan = BatchPlan(pool, slots, cut.tiling, width, *parts, buffer, _removals(pool), np.zeros(1, np.int64))
    _upload(plan, cut)
    return plan


def replan(plan: BatchPlan, adapters: Adapters) -> BatchPlan:
    """The plan of another batch of as many rows, in the device memory of an earlier plan, which ends with that.

    Launches that a CUDA graph has captured with the earlier plan compute the new batch when they are replayed.

    Raises:
        ValueError: as `plan_batch`; there are more or fewer rows, or the plan has no room for so much.
    """
    slots = checked_slots(plan.pool, adapters)
    if plan.editions[0] != plan.edition:
        raise ValueError("Another batch has been planned in this plan's memory: take the latest plan.")
    if len(slots) != plan.rows:
        raise ValueError(f"The plan is for {plan.rows} rows, not {len(slots)}.")
    plan = replace(plan, adapters=slots, removals=_removals(plan.pool), edition=plan.edition + 1)
    if runs_on_triton(plan.pool.storage):
        _upload(plan, cut_batch(plan.pool, slots, plan.tiling))
    plan.editions[0] = plan.edition
    return plan


@dataclass(frozen=True, eq=False)
class Cut:
    """A plan's content, as long as it is.

    Args:
        tiling: how it was cut.
        blocks: [blocks, 4], as `BatchPlan.blocks`.
        order: [positions], the rows that have an adapter.
        width: the most ranks of an adapter, rounded up to 16.
    """

    tiling: Tiling
    blocks: NDArray[np.int64]
    order: NDArray[np.int64]
    width: int


_UNCUT = Cut(FEW, np.zeros((0, 4), np.int64), np.zeros(0, np.int64), 0)


def _removals(pool: PagePool) -> tuple[NDArray[np.int64], int]:
    return pool.removed.copy(), pool.removals


def checked_slots(pool: PagePool, adapters: Adapters) -> NDArray[np.int64]:
    """The slots as an array.

    Raises:
        ValueError: they are no vector of integers, or one is out of range or empty.
    """
    slots = np.asarray(adapters)
    if slots.ndim != 1 or (len(slots) and not np.issubdtype(slots.dtype, np.integer)):
        raise ValueError("Adapters are a vector of integers, a slot for each row.")
    if len(slots) and not -1 <= slots.min() <= slots.max() < pool.slots:
        raise ValueError(f"Slots are −1 … {pool.slots - 1}, not {slots.min()} … {slots.max()}.")
    slots = slots.astype(np.int64)  # in which −1 is what it says
    if empty := set(slots.tolist()) - pool.tenants - {-1}:
        raise ValueError(f"There is no adapter in slot {min(empty)}.")
    return slots


def cut_batch(pool: PagePool, slots: NDArray[np.int64], tiling: Tiling | None = None) -> Cut:
    """Sort rows by adapter, the largest rank first: what is left for the end is small. Cut them as `tiling` says."""
    ranks = pool.host_largest[slots] * (slots >= 0) if pool.slots else np.zeros(len(slots), np.int32)
    own = np.count_nonzero(ranks)
    order = (slots - ranks * np.int64(pool.slots + 1)).argsort(kind="stable")[:own]
    if not own:
        return Cut(tiling or FEW, _UNCUT.blocks, order, 0)
    slots, ranks = slots[order], ranks[order]
    edges = np.flatnonzero(slots[1:] != slots[:-1])
    bounds = np.zeros(len(edges) + 2, np.int64)
    bounds[1:-1], bounds[-1] = edges + 1, own
    counts = bounds[1:] - bounds[:-1]
    tiling = tiling or (FEW if own < _FROM_MANY * len(counts) else MANY)
    group, at = pieces(counts, tiling.rows)
    first = at + bounds[group]
    tile, first_rank = pieces(ranks[first], tiling.shrink.ranks)
    first = first[tile]
    blocks = np.empty((len(first), 4), np.int64)
    blocks[:, 0], blocks[:, 1], blocks[:, 3] = slots[first], first, first_rank
    np.minimum((counts[group] - at)[tile], tiling.rows, out=blocks[:, 2])
    return Cut(tiling, blocks, order, -(-int(ranks[0]) // 16) * 16)


def pieces(lengths: NDArray[Any], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each length in pieces of a size: of each piece, whose it is and where it begins."""
    numbers = -(-lengths.astype(np.int64) // size)
    ends = numbers.cumsum()
    whose = np.arange(len(lengths)).repeat(numbers)
    return whose, (np.arange(len(whose)) - (ends - numbers)[whose]) * size


def _upload(plan: BatchPlan, cut: Cut) -> None:
    if cut.width > plan.width or len(cut.blocks) > len(plan.blocks) or len(cut.order) > len(plan.order):
        raise ValueError(
            f"The plan has room for {len(plan.blocks)} blocks, {len(plan.order)} rows with an adapter and rank "
            f"{plan.width}; the batch needs {len(cut.blocks)}, {len(cut.order)} and {cut.width}: plan with a "
            "`largest_rank`."
        )
    if not len(plan.buffer):
        return
    # The allocator of pinned memory hands this out again only when it has been copied.
    host = torch.empty(plan.buffer.shape, dtype=torch.int32, pin_memory=plan.buffer.is_cuda)
    content, positions = host.numpy(), 4 * len(plan.blocks)
    content[: cut.blocks.size] = cut.blocks.reshape(-1)
    content[cut.blocks.size :] = -1
    content[positions : positions + len(cut.order)] = cut.order
    plan.buffer.copy_(host, non_blocking=True)
