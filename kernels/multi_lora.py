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
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels.batch_plan import FEW, Adapters, BatchPlan, checked_slots, cut
from kernels.dispatch import interpreted, runs_on_triton, triton_is_there
from kernels.page_pool import Module, PagePool

_PROGRAMS = 256  # that keep a GPU busy
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

    @triton.jit(do_not_specialize=["directory"])  # type: ignore[untyped-decorator]
    def _shrink(  # type: ignore[no-untyped-def]
        x,
        h,
        storage,
        table,
        first,
        offsets,
        ranks,
        scales,
        order,
        blocks,
        directory,
        n,
        x_stride,
        h_stride,
        span,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        RANKS: tl.constexpr,
        COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """h[rows, ranks, part] = s · x[rows, columns] · A[ranks, columns]ᵀ for the columns of a part."""
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        blocks += tl.program_id(0) * 4
        slot = tl.load(blocks)
        begin = tl.load(blocks + 1)
        count = tl.load(blocks + 2)
        first_rank = tl.load(blocks + 3)
        if slot < 0:
            return
        rank = tl.load(ranks + directory + slot)
        if first_rank >= rank:
            return
        table += tl.load(first + slot) + tl.load(offsets + directory + slot)
        scale = tl.load(scales + directory + slot)
        pieces = tl.cdiv(n, WIDTH)
        part = tl.program_id(1)
        start = part * span
        end = tl.minimum(n, start + span)
        h += part
        parts = tl.num_programs(1)
        j = first_rank + tl.arange(0, RANKS)
        there = j < rank
        if ROWS == 1:
            x += tl.load(order + begin).to(tl.int64) * x_stride
            sums = tl.zeros([RANKS], tl.float32)
            for c in tl.range(start, end, COLUMNS, num_stages=STAGES):
                weights = _weights(storage, table, j, there, pieces, c, WIDTH, COLUMNS)
                column = c + tl.arange(0, COLUMNS)
                inputs = tl.load(x + column, mask=column < n, other=0.0)
                sums += tl.sum(weights.to(tl.float32) * inputs.to(tl.float32)[None, :], 1)
            tl.store(h + begin.to(tl.int64) * h_stride + j * parts, sums * scale, mask=there)
        else:
            row = tl.arange(0, ROWS)
            live = row < count
            places = tl.load(order + begin + row, mask=live, other=0).to(tl.int64) * x_stride
            total = tl.zeros([ROWS, RANKS], tl.float32)
            for c in tl.range(start, end, COLUMNS, num_stages=STAGES):
                weights = _weights(storage, table, j, there, pieces, c, WIDTH, COLUMNS)
                column = c + tl.arange(0, COLUMNS)
                inside = live[:, None] & (column < n)[None, :]
                inputs = tl.load(x + places[:, None] + column[None, :], mask=inside, other=0.0)
                total = _product(inputs, weights.trans(), total)
            target = h + (begin + row).to(tl.int64)[:, None] * h_stride + j[None, :] * parts
            tl.store(target, total * scale, mask=live[:, None] & there[None, :])

    @triton.jit  # type: ignore[untyped-decorator]
    def _expand_block(  # type: ignore[no-untyped-def]
        y,
        h,
        storage,
        table,
        order,
        begin,
        count,
        rank,
        m,
        y_stride,
        h_stride,
        start,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        RANKS: tl.constexpr,
        COLUMNS: tl.constexpr,
        PARTS: tl.constexpr,
        ROUND: tl.constexpr,
        STAGES: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """y[rows, columns] += Σ_part h[rows, :, part] · Bᵀ[:, columns] for COLUMNS columns from `start` on."""
        column = start + tl.arange(0, COLUMNS)
        pieces = tl.cdiv(m, WIDTH)
        part = tl.arange(0, ROUND)
        if ROWS == 1:
            target = y + tl.load(order + begin).to(tl.int64) * y_stride + column
            total = tl.load(target, mask=column < m, other=0.0).to(tl.float32)
            h += begin.to(tl.int64) * h_stride
            for first_rank in tl.range(0, rank, RANKS, num_stages=STAGES):
                j = first_rank + tl.arange(0, RANKS)
                weights = _weights(storage, table, j, j < rank, pieces, start, WIDTH, COLUMNS)
                if EARLY:
                    tl.extra.cuda.gdc_wait()  # for h
                entry = h + j[:, None] * PARTS + part[None, :]
                hidden = tl.sum(tl.load(entry, mask=(j < rank)[:, None] & (part < PARTS)[None, :], other=0.0), 1)
                total += tl.sum(weights.to(tl.float32) * hidden[:, None], 0)
            tl.store(target, total.to(y.dtype.element_ty), mask=column < m)
        else:
            row = tl.arange(0, ROWS)
            live = row < count
            places = tl.load(order + begin + row, mask=live, other=0).to(tl.int64) * y_stride
            h += (begin + row).to(tl.int64)[:, None] * h_stride
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            for first_rank in tl.range(0, rank, RANKS, num_stages=STAGES):
                j = first_rank + tl.arange(0, RANKS)
                weights = _weights(storage, table, j, j < rank, pieces, start, WIDTH, COLUMNS)
                there = live[:, None] & (j < rank)[None, :]
                if EARLY:
                    tl.extra.cuda.gdc_wait()
                if PARTS == 1:
                    hidden = tl.load(h + j[None, :], mask=there, other=0.0)
                else:
                    entry = h[:, :, None] + j[None, :, None] * PARTS + part[None, None, :]
                    inside = there[:, :, None] & (part < PARTS)[None, None, :]
                    hidden = tl.sum(tl.load(entry, mask=inside, other=0.0), 2)
                if weights.dtype == tl.float32:
                    total = _product(hidden, weights, total)
                else:  # two numbers of sixteen bits are nearly one of 32
                    high = hidden.to(weights.dtype)
                    low = (hidden - high.to(tl.float32)).to(weights.dtype)
                    total = _product(low, weights, total)
                    total = _product(high, weights, total)
            target = y + places[:, None] + column[None, :]
            inside = live[:, None] & (column < m)[None, :]
            total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
            tl.store(target, total.to(y.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["directory"])  # type: ignore[untyped-decorator]
    def _expand(  # type: ignore[no-untyped-def]
        y,
        h,
        storage,
        table,
        first,
        offsets,
        ranks,
        order,
        tiles,
        directory,
        n,
        m,
        y_stride,
        h_stride,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        WIDE: tl.constexpr,
        MIDDLE: tl.constexpr,
        NARROW: tl.constexpr,
        PARTS: tl.constexpr,
        ROUND: tl.constexpr,
        STAGES: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """y += h · Bᵀ for a tile of rows and a block of columns, of which there are more the fewer ranks there are."""
        tiles += tl.program_id(0) * 4
        block = tl.program_id(1)
        slot = tl.load(tiles)
        begin = tl.load(tiles + 1)
        count = tl.load(tiles + 2)
        if slot < 0:
            return
        rank = tl.load(ranks + directory + slot)
        if rank == 0:
            return
        table += tl.load(first + slot) + tl.load(offsets + directory + slot) + rank * tl.cdiv(n, WIDTH)  # B is after A
        if rank <= 16:
            if block * WIDE < m:
                _expand_block(
                    y, h, storage, table, order, begin, count, rank, m, y_stride, h_stride,
                    block * WIDE, WIDTH, ROWS, 16, WIDE, PARTS, ROUND, STAGES, EARLY,
                )  # fmt: skip
        elif rank <= 32:
            if block * MIDDLE < m:
                _expand_block(
                    y, h, storage, table, order, begin, count, rank, m, y_stride, h_stride,
                    block * MIDDLE, WIDTH, ROWS, 32, MIDDLE, PARTS, ROUND, STAGES, EARLY,
                )  # fmt: skip
        else:
            if block * NARROW < m:
                _expand_block(
                    y, h, storage, table, order, begin, count, rank, m, y_stride, h_stride,
                    block * NARROW, WIDTH, ROWS, 64, NARROW, PARTS, ROUND, STAGES, EARLY,
                )  # fmt: skip


def multi_lora_reference(x: Tensor, adapters: Adapters, pool: PagePool, module: str) -> Tensor:
    """What `add_multi_lora` adds, row by row."""
    added = x.new_zeros(len(x), pool.modules[module].outputs)
    for row, slot in enumerate(checked_slots(pool, adapters).tolist()):
        lora = pool.read(slot).get(module) if slot >= 0 else None
        if lora is not None:
            added[row] = lora.scale * ((x[row] @ lora.A.T) @ lora.B.T)
    return added


def add_multi_lora(y: Tensor, x: Tensor, plan: BatchPlan, module: str) -> None:
    """y[i] += s_a·(x[i]·A_aᵀ)·B_aᵀ for each row's adapter a, in place; without a gradient.

    Args:
        y: [rows, m], what the base layer gives, rows of any stride; of the pool's dtype and device.
        x: [rows, n], likewise.
        plan: of the batch.
        module: name of the layer. Adapters that leave it alone add nothing.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit the plan's pool; one of the plan's adapters has been
            removed since; or a gradient would be lost.
    """
    pool = plan.pool
    if module not in pool.modules:
        raise ValueError(f"The pool has no module {module}.")
    layer = pool.modules[module]
    _check(y, x, plan, layer)
    if not len(plan.tiles):
        return
    if not runs_on_triton(pool.storage) or pool.storage.dtype not in _KERNEL_DTYPES:
        sparse = y.device.type == "cpu" and y.dtype in (torch.float32, torch.float64)
        (_add_by_pages if sparse else _add_by_adapters)(y.detach(), x.detach(), plan, layer)
        return
    # A kernel is launched on the current device, whatever its arguments are on.
    with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
        _launch(y, x, plan, layer)


def _check(y: Tensor, x: Tensor, plan: BatchPlan, module: Module) -> None:
    pool = plan.pool
    for name, tensor, columns in (("x", x, module.inputs), ("y", y, module.outputs)):
        if tensor.shape != (plan.rows, columns):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; the plan and the module need {(plan.rows, columns)}.")
        if (tensor.dtype, tensor.device) != (pool.storage.dtype, pool.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, the pool {pool.storage.dtype} on {pool.device}."
            )
        if columns > 1 and tensor.stride(1) != 1:
            raise ValueError(f"The rows of {name} must be contiguous.")
    if plan.rows > 1 and y.stride(0) < module.outputs:
        raise ValueError("The rows of y must not overlap.")
    if not (pool.table.is_contiguous() and pool.storage.is_contiguous() and plan.buffer.is_contiguous()):
        raise ValueError("The pool's storage, its page table and the plan must be contiguous.")
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        raise ValueError("What is added in place has no gradient: use torch.no_grad.")
    plan.check()


def _launch(y: Tensor, x: Tensor, plan: BatchPlan, module: Module) -> None:
    pool, rows, shrink, expand = plan.pool, plan.tiling.rows, plan.tiling.shrink, plan.tiling.expand
    n, m = module.inputs, module.outputs
    most, wider = pool.width & -pool.width, pool.storage.element_size() // 2  # `most` is a power of two
    columns = min(shrink.columns // wider, most)
    span = shrink.span or _span(n, columns, len(plan.blocks))
    parts = triton.cdiv(n, span)
    h = torch.empty(plan.rows, plan.width, parts, dtype=torch.float32, device=y.device)
    early = rows <= FEW.rows and _overlaps(y.device)
    common: dict[str, Any] = {"WIDTH": pool.width, "ROWS": rows, "EARLY": early}
    _shrink[(len(plan.blocks), parts)](
        x,
        h,
        pool.storage,
        pool.table,
        pool.first,
        pool.offsets,
        pool.ranks,
        pool.scales,
        plan.order,
        plan.blocks,
        module.index * pool.slots,
        n,
        x.stride(0),
        h.stride(0),
        span,
        **common,
        RANKS=shrink.ranks,
        COLUMNS=columns,
        STAGES=shrink.stages,
        num_warps=shrink.warps,
    )
    wide, middle, narrow = (min(each // wider, most) for each in expand.columns)
    _expand[(len(plan.tiles), triton.cdiv(m, min(wide, middle, narrow)))](
        y,
        h,
        pool.storage,
        pool.table,
        pool.first,
        pool.offsets,
        pool.ranks,
        plan.order,
        plan.tiles,
        module.index * pool.slots,
        n,
        m,
        y.stride(0),
        h.stride(0),
        **common,
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
    row, rank = cut(ranks, 1)
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
