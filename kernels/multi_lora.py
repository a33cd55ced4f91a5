"""The LoRAs of a batch whose rows belong to different adapters, of different ranks, from one pool of pages.

For row i of adapter a(i), or of none (−1), and one linear layer of the base model

    y[i] ← y[i] + s_a·(x[i]·A_aᵀ)·B_aᵀ,        A_a ∈ ℝ^{r_a×n},  B_a ∈ ℝ^{m×r_a}

Sources: Punica (arXiv 2310.18547), whose two launches a layer, shrink and expand, serve all adapters of a batch; S-LoRA
(arXiv 2311.03285), whose kernels gather weights of any rank from pages (MBGMV for single rows, MBGMM for many). Which
rows are whose is planned once a batch (`kernels.batch_plan`), for every layer: rows of one adapter make tiles.

What comes between, h = s·x·Aᵀ, stays in float32. Where n is divided among programs, each writes its own part of h, and
the expanding kernel adds them, always in the same order: results do not depend on which program ends first. On GPUs
that can (compute capability 9), programs of the expanding kernel read their weights while the shrinking one still runs
(programmatic dependent launch).
"""

import warnings
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels.batch_plan import FEW, Adapters, BatchPlan, checked_slots, pieces
from kernels.dispatch import interpreted, runs_on_triton, triton_is_there
from kernels.page_pool import Module, PagePool

_PROGRAMS = 128  # that keep a GPU busy
_TOGETHER = 3  # layers in one launch
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if triton_is_there():
    import triton
    import triton.language as tl

    _INTERPRETED = tl.constexpr(interpreted())

    @triton.jit
    def _product(left, right, total):  # type: ignore[no-untyped-def]
        """total [M, N] + left [M, K] · right [K, N]; float32 to its own precision."""
        if _INTERPRETED:  # the interpreter multiplies bfloat16 as if its bits were integers
            left, right = left.to(tl.float32), right.to(tl.float32)
        return tl.dot(left, right, total, input_precision="ieee")

    @triton.jit  # type: ignore[untyped-decorator]
    def _weights(storage, table, ranks, there, pieces, begin, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Of rank rows the columns from `begin` on, [ranks, COLUMNS]; 0 where a rank row is not `there`.

        COLUMNS divides WIDTH and `begin`: they lie in one page.
        """
        piece = begin // WIDTH
        page = tl.load(table + ranks * pieces + piece, mask=there, other=0).to(tl.int64)
        # What is left of `begin`, said so that the compiler sees that sixteen bytes can be read at a time.
        number = page[:, None] * WIDTH + (begin - piece * WIDTH + tl.arange(0, COLUMNS))[None, :]
        return tl.load(storage + number, mask=there[:, None], other=0.0)

    @triton.jit  # type: ignore[untyped-decorator]
    def _own(which, first, second, third, MODULES: tl.constexpr):  # type: ignore[no-untyped-def]
        """What is the module's of which this program is."""
        if MODULES == 1:
            return first
        elif MODULES == 2:  # noqa: RET505 (what is compiled is one of them)
            return tl.where(which == 0, first, second)
        else:
            return tl.where(which == 0, first, tl.where(which == 1, second, third))

    @triton.jit(do_not_specialize=["entries_0", "entries_1", "entries_2"])  # type: ignore[untyped-decorator]
    def _shrink(  # type: ignore[no-untyped-def]
        x,
        h,
        storage,
        table,
        directory,
        order,
        blocks,
        entries_0,
        entries_1,
        entries_2,
        n,
        x_stride,
        h_stride,
        h_module,
        span,
        MODULES: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        RANKS: tl.constexpr,
        COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """h[module, rows, ranks, part] = s · x[rows, columns] · A[ranks, columns]ᵀ for the columns of a part."""
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        which = tl.program_id(0) % MODULES  # next to each other they find x in the cache
        blocks += tl.program_id(0) // MODULES * 4
        slot = tl.load(blocks)
        begin = tl.load(blocks + 1)
        count = tl.load(blocks + 2)
        first_rank = tl.load(blocks + 3)
        if slot < 0:
            return
        entry = directory + _own(which, entries_0, entries_1, entries_2, MODULES) + slot * 4
        first = tl.load(entry)  # all are under way before one is looked at
        rank = tl.load(entry + 1)
        scale = tl.load(entry + 2).to(tl.float32, bitcast=True)
        if first_rank >= rank:
            return
        table += first
        pieces = tl.cdiv(n, WIDTH)
        part = tl.program_id(1)
        parts = tl.num_programs(1)
        start = part * span
        j = first_rank + tl.arange(0, RANKS)
        there = j < rank
        row = tl.arange(0, ROWS)
        live = row < count
        places = tl.load(order + begin + row, mask=live, other=0).to(tl.int64) * x_stride
        total = tl.zeros([ROWS, RANKS], tl.float32)
        for c in tl.range(start, tl.minimum(n, start + span), COLUMNS, num_stages=STAGES):
            weights = _weights(storage, table, j, there, pieces, c, WIDTH, COLUMNS)
            column = c + tl.arange(0, COLUMNS)
            inside = live[:, None] & (column < n)[None, :]
            inputs = tl.load(x + places[:, None] + column[None, :], mask=inside, other=0.0)
            total = _product(inputs, weights.trans(), total)
        h += which.to(tl.int64) * h_module + part
        target = h + (begin + row).to(tl.int64)[:, None] * h_stride + j[None, :] * parts
        # Up to a multiple of 16 ranks there are zeros, so that h can be read sixteen bytes at a time.
        wanted = live[:, None] & (j < tl.cdiv(rank, 16) * 16)[None, :]
        tl.store(target, tl.where(there[None, :], total * scale, 0.0), mask=wanted)

    @triton.jit  # type: ignore[untyped-decorator]
    def _expand_columns(  # type: ignore[no-untyped-def]
        y,
        h,
        storage,
        table,
        order,
        begin,
        count,
        rank,
        share,
        shares,
        m,
        y_stride,
        h_stride,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        RANKS: tl.constexpr,
        COLUMNS: tl.constexpr,
        PARTS: tl.constexpr,
        ROUND: tl.constexpr,
        STAGES: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """y[rows, columns] += Σ_part h[rows, :, part] · Bᵀ[:, columns], COLUMNS at a time: a share of all of them."""
        pieces = tl.cdiv(m, WIDTH)
        part = tl.arange(0, ROUND)
        row = tl.arange(0, ROWS)
        live = row < count
        places = tl.load(order + begin + row, mask=live, other=0).to(tl.int64) * y_stride
        h += (begin + row).to(tl.int64)[:, None] * h_stride
        for start in range(share * COLUMNS, m, shares * COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            target = y + places[:, None] + column[None, :]
            inside = live[:, None] & (column < m)[None, :]
            before = tl.load(target, mask=inside, other=0.0)  # on its way while the page is looked up
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            for first_rank in tl.range(0, rank, RANKS, num_stages=STAGES):
                j = first_rank + tl.arange(0, RANKS)
                weights = _weights(storage, table, j, j < rank, pieces, start, WIDTH, COLUMNS)
                there = live[:, None] & (j < tl.cdiv(rank, 16) * 16)[None, :]
                if EARLY:
                    tl.extra.cuda.gdc_wait()  # for h
                if PARTS == 1:
                    hidden = tl.load(h + j[None, :], mask=there, other=0.0)
                else:
                    number = h[:, :, None] + j[None, :, None] * PARTS + part[None, None, :]
                    known = there[:, :, None] & (part < PARTS)[None, None, :]
                    hidden = tl.sum(tl.load(number, mask=known, other=0.0), 2)
                if weights.dtype == tl.float32:
                    total = _product(hidden, weights, total)
                else:  # two numbers of sixteen bits are nearly one of 32
                    high = hidden.to(weights.dtype)
                    low = (hidden - high.to(tl.float32)).to(weights.dtype)
                    total = _product(low, weights, total)
                    total = _product(high, weights, total)
            tl.store(target, (total + before.to(tl.float32)).to(y.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["entries_0", "entries_1", "entries_2"])  # type: ignore[untyped-decorator]
    def _expand(  # type: ignore[no-untyped-def]
        y_0,
        y_1,
        y_2,
        h,
        storage,
        table,
        directory,
        order,
        blocks,
        entries_0,
        entries_1,
        entries_2,
        n,
        m_0,
        m_1,
        m_2,
        y_stride_0,
        y_stride_1,
        y_stride_2,
        h_stride,
        h_module,
        MODULES: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        RANKS: tl.constexpr,
        WIDE: tl.constexpr,
        MIDDLE: tl.constexpr,
        NARROW: tl.constexpr,
        PARTS: tl.constexpr,
        ROUND: tl.constexpr,
        STAGES: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """y += h · Bᵀ for a tile of rows, whose columns are divided among programs, more for more ranks."""
        which = tl.program_id(0) % MODULES
        blocks += tl.program_id(0) // MODULES * 4
        slot = tl.load(blocks)
        begin = tl.load(blocks + 1)
        count = tl.load(blocks + 2)
        first_rank = tl.load(blocks + 3)
        if slot < 0:
            return
        entry = directory + _own(which, entries_0, entries_1, entries_2, MODULES) + slot * 4
        first = tl.load(entry)
        rank = tl.load(entry + 1)
        if first_rank >= rank:
            return
        y = _own(which, y_0, y_1, y_2, MODULES)
        m = _own(which, m_0, m_1, m_2, MODULES)
        y_stride = _own(which, y_stride_0, y_stride_1, y_stride_2, MODULES)
        h += which.to(tl.int64) * h_module
        table += first + rank * tl.cdiv(n, WIDTH)  # B is after A
        share = first_rank // RANKS * tl.num_programs(1) + tl.program_id(1)
        shares = tl.cdiv(rank, RANKS) * tl.num_programs(1)
        if rank <= 16:
            _expand_columns(
                y, h, storage, table, order, begin, count, rank, share, shares, m, y_stride, h_stride,
                WIDTH, ROWS, 16, WIDE, PARTS, ROUND, STAGES, EARLY,
            )  # fmt: skip
        elif rank <= 32:
            _expand_columns(
                y, h, storage, table, order, begin, count, rank, share, shares, m, y_stride, h_stride,
                WIDTH, ROWS, 32, MIDDLE, PARTS, ROUND, STAGES, EARLY,
            )  # fmt: skip
        else:
            _expand_columns(
                y, h, storage, table, order, begin, count, rank, share, shares, m, y_stride, h_stride,
                WIDTH, ROWS, 64, NARROW, PARTS, ROUND, STAGES, EARLY,
            )  # fmt: skip


def multi_lora_reference(x: Tensor, adapters: Adapters, pool: PagePool, module: str) -> Tensor:
    """What `add_multi_lora` adds, row by row."""
    added = x.new_zeros(len(x), pool.modules[module].outputs)
    for row, slot in enumerate(checked_slots(pool, adapters).tolist()):
        lora = pool.read(slot).get(module) if slot >= 0 else None
        if lora is not None:
            added[row] = lora.scale * ((x[row] @ lora.A.T) @ lora.B.T)
    return added


def add_multi_lora(y: Tensor | Sequence[Tensor], x: Tensor, plan: BatchPlan, module: str | Sequence[str]) -> None:
    """y[i] += s_a·(x[i]·A_aᵀ)·B_aᵀ for each row's adapter a, in place; without a gradient.

    Layers that read the same x (queries, keys and values; a gate and what it lets through) cost little more together
    than one of them alone, and give bit for bit what they give alone.

    Args:
        y: [rows, m], what the base layer gives, rows of any stride; of the pool's dtype and device. Of several layers
            a tensor each, which may be parts of one.
        x: [rows, n], likewise.
        plan: of the batch.
        module: name of the layer, or of up to three. Adapters that leave one alone add nothing.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit the plan's pool; one of the plan's adapters has been
            removed since; or a gradient would be lost.
    """
    ys, names = ([y] if isinstance(y, Tensor) else y), ([module] if isinstance(module, str) else module)
    if not 1 <= len(names) == len(ys) <= _TOGETHER:
        raise ValueError(f"There are {len(names)} modules and {len(ys)} tensors: up to {_TOGETHER}, as many of each.")
    pool = plan.pool
    for name in names:
        if name not in pool.modules:
            raise ValueError(f"The pool has no module {name}.")
    modules = [pool.modules[name] for name in names]
    _check(ys, x, plan, modules)
    if not runs_on_triton(pool.storage) or pool.storage.dtype not in _KERNEL_DTYPES:
        sparse = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        for each, layer in zip(ys, modules, strict=True):
            (_add_by_pages if sparse else _add_by_adapters)(each.detach(), x.detach(), plan, layer)
        return
    if not len(plan.blocks):
        return
    # A kernel is launched on the current device, whatever its arguments are on.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _launch(ys, x, plan, modules)


def _check(ys: Sequence[Tensor], x: Tensor, plan: BatchPlan, modules: Sequence[Module]) -> None:
    pool = plan.pool
    tensors = [("x", x, module.inputs) for module in modules]
    tensors += [("y", y, module.outputs) for y, module in zip(ys, modules, strict=True)]
    for name, tensor, columns in tensors:
        if tensor.shape != (plan.rows, columns):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; the plan and the module need {(plan.rows, columns)}.")
        if (tensor.dtype, tensor.device) != (pool.storage.dtype, pool.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, the pool {pool.storage.dtype} on {pool.device}."
            )
        if columns > 1 and tensor.stride(1) != 1:
            raise ValueError(f"The rows of {name} must be contiguous.")
        if name == "y" and plan.rows > 1 and tensor.stride(0) < columns:
            raise ValueError("The rows of y must not overlap.")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError("What is added in place has no gradient: use torch.no_grad.")
    if any(_overlap(left, right) for left, right in combinations(ys, 2)):
        raise ValueError("Layers that are added together must not write to the same numbers.")
    if not (pool.table.is_contiguous() and pool.storage.is_contiguous() and plan.buffer.is_contiguous()):
        raise ValueError("The pool's storage, its page table and the plan must be contiguous.")
    plan.check()


def _overlap(left: Tensor, right: Tensor) -> bool:
    """Whether two [rows, columns] tensors share numbers; columns of one wider tensor do not."""
    left, right = sorted((left, right), key=Tensor.data_ptr)
    apart = (right.data_ptr() - left.data_ptr()) // left.element_size()
    rows, stride = len(left), left.stride(0)
    if not rows or apart >= (rows - 1) * stride + left.shape[1]:
        return False
    apart %= max(stride, 1)
    return not (rows == 1 or stride == right.stride(0)) or not left.shape[1] <= apart <= stride - right.shape[1]


def _launch(ys: Sequence[Tensor], x: Tensor, plan: BatchPlan, modules: Sequence[Module]) -> None:
    pool, shrink, expand = plan.pool, plan.tiling.shrink, plan.tiling.expand
    n, number = x.shape[1], len(modules)
    most, wider = pool.width & -pool.width, pool.storage.element_size() // 2  # `most` is a power of two
    columns = min(shrink.columns // wider, most)
    span = shrink.span or _span(n, columns, len(plan.blocks))
    parts = triton.cdiv(n, span)
    h = torch.empty(number, plan.rows, plan.width, parts, dtype=torch.float32, device=x.device)
    early = plan.tiling.rows <= FEW.rows and _overlaps(x.device)
    known: dict[str, Any] = {"MODULES": number, "WIDTH": pool.width, "ROWS": plan.tiling.rows, "EARLY": early}
    known |= {"RANKS": shrink.ranks}
    weights = pool.storage, pool.table, pool.directory, plan.order, plan.blocks
    filled = [*range(number), 0, 0][:_TOGETHER]  # what a module that there is not would have is never looked at
    entries = [4 * pool.slots * modules[each].index for each in filled]
    _shrink[(number * len(plan.blocks), parts)](
        x,
        h,
        *weights,
        *entries,
        n,
        x.stride(0),
        h.stride(1),
        h.stride(0),
        span,
        **known,
        COLUMNS=columns,
        STAGES=shrink.stages,
        num_warps=shrink.warps,
    )
    wide, middle, narrow = (min(each // wider, most) for each in expand.columns)
    largest = max(module.outputs for module in modules)
    _expand[(number * len(plan.blocks), triton.cdiv(largest, wide * expand.turns))](
        *(ys[each] for each in filled),
        h,
        *weights,
        *entries,
        n,
        *(modules[each].outputs for each in filled),
        *(ys[each].stride(0) for each in filled),
        h.stride(1),
        h.stride(0),
        **known,
        WIDE=wide,
        MIDDLE=middle,
        NARROW=narrow,
        PARTS=parts,
        ROUND=triton.next_power_of_2(parts),
        STAGES=expand.stages,
        num_warps=expand.warps,
        **({"launch_pdl": True} if early else {}),
    )


def _span(n: int, columns: int, blocks: int) -> int:
    """Columns of a part, so that one, two, four or eight parts of n make enough programs."""
    parts = next(parts for parts in (1, 2, 4, 8) if parts * blocks >= _PROGRAMS or parts == 8)
    return -(-n // columns // parts) * columns


@cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin before the one that it waits for has ended."""
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def _add_by_pages(y: Tensor, x: Tensor, plan: BatchPlan, module: Module) -> None:
    """On the CPU: a batch is a sparse matrix, rows × pages, with an entry where a page is a row's adapter's.

    Its entries are products of x with pages of A, computed where they are wanted only, and y is the sum that they weigh
    of pages of B. A page is read where it lies.
    """
    _expect_beta()
    pool, width = plan.pool, plan.pool.width
    order = np.argsort(plan.adapters, kind="stable")  # an adapter's rows find its pages in the cache
    order = order[np.count_nonzero(plan.adapters < 0) :]
    slots = plan.adapters[order]
    ranks = pool.host_ranks[module.index, slots].astype(np.int64)
    inputs, outputs = -(-module.inputs // width), -(-module.outputs // width)
    begin = pool.host_first[slots] + pool.host_offsets[module.index, slots]
    row, rank = pieces(ranks, 1)
    A, B = begin[row] + rank * inputs, (begin + ranks * inputs)[row] + rank * outputs
    rows, ends = torch.from_numpy(order), torch.from_numpy(np.append(0, np.cumsum(ranks)))
    x = x.index_select(0, rows)
    if x.shape[1] % width:
        x = functional.pad(x, (0, -x.shape[1] % width))
    hidden = x.new_zeros(len(row))
    for piece in range(inputs):
        pages = torch.from_numpy(pool.host_table[A + piece].astype(np.int64))
        size = len(order), len(pool.storage)
        entries = torch.sparse_csr_tensor(ends, pages, hidden, size, check_invariants=False)
        part = x[:, piece * width : (piece + 1) * width]
        hidden = torch.sparse.sampled_addmm(entries, part, pool.storage.T).values()
    hidden *= torch.from_numpy(pool.host_scales[module.index, slots][row]).to(x.dtype)
    for piece in range(outputs):
        pages = torch.from_numpy(pool.host_table[B + piece].astype(np.int64))
        sums = functional.embedding_bag(pages, pool.storage, ends[:-1], mode="sum", per_sample_weights=hidden)
        part = y[:, piece * width : (piece + 1) * width]
        part.index_add_(0, rows, sums[:, : part.shape[1]])


@cache
def _expect_beta() -> None:
    """PyTorch says once that sparse tensors may change: whoever serves adapters can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (0, 0))


def _add_by_adapters(y: Tensor, x: Tensor, plan: BatchPlan, module: Module) -> None:
    """One adapter after the other, where neither kernels nor sparse products are."""
    pool = plan.pool
    wide = torch.promote_types(x.dtype, torch.float32)
    for slot in np.unique(plan.adapters[plan.adapters >= 0]):
        rank = int(pool.host_ranks[module.index, slot])
        if not rank:
            continue
        A, B = (pages.to(wide) for pages in pool.rank_rows(int(slot), module))
        rows = torch.from_numpy(np.flatnonzero(plan.adapters == slot)).to(y.device)
        hidden = float(pool.host_scales[module.index, slot]) * (x[rows].to(wide) @ A.T)
        y[rows] = (y[rows].to(wide) + hidden @ B).to(y.dtype)
