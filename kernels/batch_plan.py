"""Which rows of a batch belong to which adapter, sorted and cut for the kernels of `kernels.multi_lora`.

Made once a batch, on the host, for all layers: rows are put in groups, an adapter each, the largest rank first; groups
are cut into tiles of rows, and tiles into blocks of ranks. One copy brings that to the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    """

    columns: tuple[int, int, int]
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiling:
    """How work is cut.

    Args:
        rows: of an adapter, in a tile. One is multiplied without tensor cores, sixteen and more with them.
            Columns below are for numbers of 16 bits: of 32 bits, programs take half as many.
        shrink: x to h.
        expand: h to y.
    """

    rows: int
    shrink: Shrinking
    expand: Expanding


# For one row of each adapter (S-LoRA's MBGMV), a few, and prompts (MBGMM).
SINGLE = Tiling(1, Shrinking(16, 1024, 1024, warps=4, stages=1), Expanding((512, 256, 128), warps=4, stages=1))
FEW = Tiling(16, Shrinking(16, 256, 1024, warps=4, stages=4), Expanding((512, 256, 128), warps=4, stages=1))
MANY = Tiling(64, Shrinking(64, 64, 0, warps=4, stages=4), Expanding((128, 128, 128), warps=4, stages=2))
_FROM_FEW, _FROM_MANY = 2, 32  # rows of an adapter, on average


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Which rows of a batch are whose, for every layer.

    Args:
        pool: that holds the adapters.
        adapters: [rows], each row's slot, −1: none.
        tiling: how the work is cut.
        width: the most ranks of an adapter that there is room for, rounded up to 16.
        tiles: [tiles, 4] int32 on the pool's device: slot, first position, rows, 0; slot −1 where there is no tile.
        blocks: [blocks, 4] likewise, of ranks of tiles: the same and the first rank.
        order: [rows] likewise: the row at each position.
        buffer: all three.
        removals: how many adapters had been removed from each slot, and in all, when the plan was made.
        editions: how many plans there have been in this buffer, a number that they share.
        edition: which of them this is.
    """

    pool: PagePool
    adapters: NDArray[np.int64]
    tiling: Tiling
    width: int
    tiles: Tensor
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
        tiling: SINGLE, FEW or MANY; as a rule the one that fits the batch.
        largest_rank: make room for any adapters of up to this rank: for `replan`, where a CUDA graph is captured.

    Raises:
        ValueError: a slot is out of range or empty, or an adapter's rank is larger than the largest.
    """
    slots = checked_slots(pool, adapters)
    tiling = tiling or _tiling(slots)
    groups = _group(pool, slots, tiling)
    tiles, blocks, width = len(groups.tiles), len(groups.blocks), groups.width
    if largest_rank is not None:
        tiles, blocks = len(slots), len(slots) * -(-largest_rank // tiling.shrink.ranks)
        width = -(-largest_rank // 16) * 16
    buffer = torch.empty(4 * (tiles + blocks) + len(slots), dtype=torch.int32, device=pool.device)
    end = 4 * (tiles + blocks)
    parts = buffer[: 4 * tiles].view(-1, 4), buffer[4 * tiles : end].view(-1, 4), buffer[end:]
    plan = BatchPlan(pool, slots, tiling, width, *parts, buffer, _removals(pool), np.zeros(1, np.int64))
    _upload(plan, groups)
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
    _upload(plan, _group(plan.pool, slots, plan.tiling))
    plan.editions[0] = plan.edition
    return plan


@dataclass(frozen=True, eq=False)
class _Groups:
    """A plan's content, as long as it is."""

    tiles: NDArray[np.int64]
    blocks: NDArray[np.int64]
    order: NDArray[np.int64]
    width: int


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
    slots = slots.astype(np.int64)
    if len(slots) and not -1 <= slots.min() <= slots.max() < pool.slots:
        raise ValueError(f"Slots are −1 … {pool.slots - 1}, not {slots.min()} … {slots.max()}.")
    for slot in set(slots.tolist()) - {-1}:
        if slot not in pool.tenants:
            raise ValueError(f"There is no adapter in slot {slot}.")
    return slots


def _tiling(slots: NDArray[np.int64]) -> Tiling:
    own = slots[slots >= 0]
    mean = len(own) / max(len(np.unique(own)), 1)
    return SINGLE if mean < _FROM_FEW else FEW if mean < _FROM_MANY else MANY


def _group(pool: PagePool, slots: NDArray[np.int64], tiling: Tiling) -> _Groups:
    ranks = np.where(slots < 0, 0, pool.host_largest[slots])
    order = np.lexsort((slots, -ranks))  # the largest first: what is left for the end is small
    order = order[: np.count_nonzero(ranks)]
    sorted_slots, sorted_ranks = slots[order], ranks[order]
    begins = np.flatnonzero(np.diff(sorted_slots, prepend=-1))
    counts = np.diff(begins, append=len(order))
    begin, first = cut(counts, tiling.rows)
    first += begins[begin]
    size = np.minimum((begins + counts)[begin] - first, tiling.rows)
    tiles = np.stack([sorted_slots[first], first, size, np.zeros_like(first)], 1)
    tile, first_rank = cut(sorted_ranks[first], tiling.shrink.ranks)
    blocks = tiles[tile]
    blocks[:, 3] = first_rank
    return _Groups(tiles, blocks, order, -(-int(ranks.max(initial=0)) // 16) * 16)


def cut(lengths: NDArray[Any], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each length in pieces of a size: of each piece, whose it is and where it begins."""
    pieces = -(-lengths.astype(np.int64) // size)
    whose = np.repeat(np.arange(len(lengths)), pieces)
    return whose, (np.arange(len(whose)) - (np.cumsum(pieces) - pieces)[whose]) * size


def _upload(plan: BatchPlan, groups: _Groups) -> None:
    if groups.width > plan.width or len(groups.tiles) > len(plan.tiles) or len(groups.blocks) > len(plan.blocks):
        raise ValueError(
            f"The plan has room for {len(plan.tiles)} tiles, {len(plan.blocks)} blocks and rank {plan.width}; the "
            f"batch needs {len(groups.tiles)}, {len(groups.blocks)} and {groups.width}: plan with a `largest_rank`."
        )
    # The allocator of pinned memory hands this out again only when it has been copied.
    host = torch.full(plan.buffer.shape, -1, dtype=torch.int32, pin_memory=plan.buffer.is_cuda)
    content, at = host.numpy(), 0
    for there, part in ((plan.tiles, groups.tiles), (plan.blocks, groups.blocks), (plan.order, groups.order)):
        content[at : at + part.size] = part.reshape(-1)
        at += there.numel()
    plan.buffer.copy_(host, non_blocking=True)
