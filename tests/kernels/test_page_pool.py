"""Pages and the pool of adapters: nothing leaks, overlaps or splinters, whatever comes and goes."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")  # where kernels are tried beside little more than PyTorch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kernels.page_pool import Lora, PageAllocator, PagePool, PoolFull
from tests.kernels.adapters import lora

MODULES = {"wide": (130, 64), "narrow": (10, 200)}
WIDTH, PAGES, SLOTS = 64, 60, 4
RANK_PAGES = {"wide": 3 + 1, "narrow": 1 + 4}  # of a rank, ⌈n/64⌉ + ⌈m/64⌉


def small_pool(**changes: object) -> PagePool:
    options = {"pages": PAGES, "width": WIDTH, "slots": SLOTS, "dtype": torch.float32, "device": "cpu"} | changes
    return PagePool(MODULES, **options)


def equal(left: dict[str, Lora], right: dict[str, Lora]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name].A, right[name].A)
        and torch.equal(left[name].B, right[name].B)
        and left[name].scale == right[name].scale
        for name in left
    )


class Allocations(RuleBasedStateMachine):
    """Any order of allocating and releasing keeps every page in one hand."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(17)
        self.held: list[np.ndarray] = []

    @rule(number=st.integers(0, 19))
    def allocate(self, number: int) -> None:
        free = 17 - sum(map(len, self.held))
        if number <= free:  # whichever pages are free
            self.held.append(self.allocator.allocate(number))
            assert len(self.held[-1]) == number
        else:
            with pytest.raises(PoolFull, match=f"{number} pages are wanted, {free} of 17"):
                self.allocator.allocate(number)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        keep = data.draw(st.integers(0, len(pages)))  # a cache may give back a part
        self.held.append(pages[:keep])
        self.allocator.release(data.draw(st.permutations(pages[keep:].tolist())) if keep < len(pages) else pages[:0])
        if keep < len(pages):
            with pytest.raises(ValueError, match="free already"):
                self.allocator.release(pages[keep:])

    @invariant()
    def every_page_is_in_one_hand(self) -> None:
        held = np.concatenate([np.zeros(0, np.int32), *self.held])
        assert len(np.unique(held)) == len(held)
        assert not len(held) or 0 <= held.min() <= held.max() < 17
        assert self.allocator.free == 17 - len(held)


class Tenants(RuleBasedStateMachine):
    """Adapters and others who take pages come and go; each adapter reads back as it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = small_pool()
        self.adapters: dict[int, dict[str, Lora]] = {}
        self.others: list[np.ndarray] = []
        self.seed = 0

    @rule(wide=st.integers(0, 6), narrow=st.integers(0, 6))
    def add(self, wide: int, narrow: int) -> None:
        self.seed += 1
        ranks = {"wide": wide, "narrow": narrow}
        adapter = {name: lora(rank, *MODULES[name], torch.float32, self.seed) for name, rank in ranks.items() if rank}
        need = sum(rank * RANK_PAGES[name] for name, rank in ranks.items())
        free = self.pool.allocator.free
        if len(self.adapters) == SLOTS:
            with pytest.raises(PoolFull, match="All 4 slots"):
                self.pool.add(adapter)
        elif need > free:
            with pytest.raises(PoolFull, match=f"{need} pages are wanted, {free} of 60"):
                self.pool.add(adapter)
        else:
            slot = self.pool.add(adapter)
            assert slot not in self.adapters
            assert len(self.pool.pages(slot)) == need  # to the page: nothing is lost between rank rows
            self.adapters[slot] = adapter

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.adapters)))
        del self.adapters[slot]
        self.pool.remove(slot)

    @rule(number=st.integers(0, 10))
    def others_write(self, number: int) -> None:
        if number <= self.pool.allocator.free:
            self.others.append(self.pool.allocator.allocate(number))
            self.pool.storage[torch.from_numpy(self.others[-1]).long()] = float("nan")

    @precondition(lambda self: self.others)
    @rule()
    def others_leave(self) -> None:
        self.pool.allocator.release(self.others.pop(0))

    @invariant()
    def every_adapter_reads_back_as_it_was_written(self) -> None:
        assert self.pool.tenants == set(self.adapters)
        for slot, adapter in self.adapters.items():
            assert equal(self.pool.read(slot), adapter)

    @invariant()
    def no_page_is_lost_or_shared(self) -> None:
        held = np.concatenate([np.zeros(0, np.int32), *self.others, *map(self.pool.pages, self.adapters)])
        assert len(np.unique(held)) == len(held)
        assert self.pool.allocator.free == PAGES - len(held)

    @invariant()
    def the_device_knows_what_the_host_knows(self) -> None:
        pool = self.pool
        start, ranks, scales, _ = pool.directory.unbind(2)
        assert np.array_equal(ranks.numpy(), pool.host_ranks)
        assert np.array_equal(
            scales.contiguous().view(torch.float32).numpy()[:, list(self.adapters)],
            pool.host_scales[:, list(self.adapters)],
        )
        for slot, adapter in self.adapters.items():
            pages = pool.pages(slot)
            for name, module in pool.modules.items():
                begin, rows = int(start[module.index, slot]), adapter[name].rank if name in adapter else 0
                offset = begin - int(pool.host_first[slot])
                there = pool.table[begin : begin + rows * RANK_PAGES[name]].numpy()
                assert np.array_equal(there, pages[offset : offset + len(there)])
        assert not ranks[:, [slot for slot in range(SLOTS) if slot not in self.adapters]].any()


TestAllocations = Allocations.TestCase
TestTenants = Tenants.TestCase
TestAllocations.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestTenants.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_of_any_dtype_reads_back_bit_for_bit_in_its_own_shapes(dtype: torch.dtype) -> None:
    pool = small_pool(dtype=dtype)
    adapter = {"narrow": lora(7, 10, 200, dtype, 1), "wide": lora(2, 130, 64, dtype, 2)}
    read = pool.read(pool.add(adapter))
    assert equal(read, adapter)
    assert read["narrow"].B.shape == (200, 7) and read["narrow"].B.is_contiguous()


def test_weights_of_any_strides_are_copied_and_what_becomes_of_them_later_is_not_seen() -> None:
    pool = small_pool()
    own = lora(3, 130, 64, torch.float32, 1)
    strided = Lora(own.A.T.contiguous().T, own.B.T.contiguous().T, own.scale)
    slot = pool.add({"wide": strided})
    strided.A.zero_()
    assert equal(pool.read(slot), {"wide": own})


def test_a_fleet_that_leaves_holes_everywhere_still_fills_the_pool_to_the_last_page() -> None:
    pool = small_pool(pages=40, slots=10)
    slots = [pool.add({"wide": lora(1, 130, 64, torch.float32, seed)}) for seed in range(10)]
    assert pool.allocator.free == 0
    for slot in slots[::2]:
        pool.remove(slot)
    large = {"wide": lora(5, 130, 64, torch.float32, 99)}  # 20 pages, no two of which need lie side by side
    assert equal(pool.read(pool.add(large)), large)
    assert pool.allocator.free == 0


def test_what_cannot_be_added_leaves_the_pool_as_it_was() -> None:
    pool = small_pool()
    good = lora(2, 130, 64, torch.float32, 0)
    slot = pool.add({"wide": good})
    for adapter, message in (
        ({"deep": good}, "no module deep"),
        ({"narrow": good}, "narrow has 10 inputs and 200 outputs; A is"),
        ({"wide": lora(2, 130, 64, torch.float16, 0)}, "convert it first"),
        ({"wide": lora(20, 130, 64, torch.float32, 0)}, "80 pages are wanted, 52 of 60 are free"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.add(adapter)
        assert pool.tenants == {slot} and pool.allocator.free == 52
    assert equal(pool.read(slot), {"wide": good})


def test_a_failure_on_the_way_gives_the_pages_back() -> None:
    pool = small_pool()
    pool.storage = pool.storage[:1]
    with pytest.raises((IndexError, RuntimeError)):
        pool.add({"wide": lora(2, 130, 64, torch.float32, 0)})
    assert pool.allocator.free == PAGES and not pool.tenants


@pytest.mark.parametrize(
    ("A", "B", "scale", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), 1.0, r"B \[m, r\]"),
        (torch.ones(2), torch.ones(4, 2), 1.0, r"A is \[r, n\]"),
        (torch.ones(2, 3), torch.ones(4, 2).half(), 1.0, "torch.float16"),
        (torch.ones(2, 3), torch.ones(4, 2, device="meta"), 1.0, "meta"),
        (torch.ones(2, 3), torch.ones(4, 2), float("nan"), "scale is nan"),
        (torch.ones(2, 3), torch.ones(4, 2), -1e39, "float32 does not hold"),
    ],
)
def test_what_is_no_lora_is_refused(A: torch.Tensor, B: torch.Tensor, scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(A, B, scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 100}, "multiple of 64"),
        ({"width": 0}, "multiple of 64"),
        ({"pages": -1}, "-1 pages"),
        ({"slots": -1}, "-1 slots"),
        ({"dtype": torch.int8}, "floating dtype"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_pool(**changes)


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([0, 0], "free already"),
        ([1], "free already"),
        ([5], "numbered 0 … 4, not 5 … 5"),
        ([-1], "numbered 0 … 4"),
        ([0.0], "vector of integers"),
        ([[0]], "vector of integers"),
    ],
)
def test_pages_that_nobody_holds_are_not_taken_back(pages: Sequence[float], message: str) -> None:
    allocator = PageAllocator(5)
    (held,) = allocator.allocate(1)
    assert held == 0
    with pytest.raises(ValueError, match=message):
        allocator.release(np.array(pages))
    assert allocator.free == 4


def test_a_slot_without_an_adapter_can_be_neither_read_nor_removed() -> None:
    pool = small_pool()
    pool.remove(pool.add({"wide": lora(2, 130, 64, torch.float32, 0)}))
    for slot in (0, -1, SLOTS):
        for use in (pool.remove, pool.read, pool.pages):
            with pytest.raises(ValueError, match=f"no adapter in slot {slot}"):
                use(slot)
