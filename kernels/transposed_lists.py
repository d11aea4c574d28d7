"""Transposed block lists in CSR form, for the backward: the query blocks of each key block.

One launch, no sort, no atomics, no synchronisation; `entropy_attn.block_lists.column_lists` is the
reference. A program takes a few columns (key blocks) of one head and walks over the rows twice: to
count, then to fill in. Lists are ascending, so a binary search finds how many entries of a row
stand before the program's columns. That is all it needs of other programs: summed over the rows it
is where its own columns begin. The entries of its columns follow, at most one a column; together
they are the bits of one word.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import ceil_div, list_strides, overlapping
from entropy_attn.kernels.plans import Launch, planned
from entropy_attn.kernels.primitives import (
    head_base,
    may_start_next,
    program_tile,
    wait_for_last,
)

# Columns of a program: all bits of a word, or fewer where that would leave the GPU idle.
COLUMNS, FEWER_COLUMNS = 32, 8
MANY_PROGRAMS = 256
ROWS = 128  # of a step
# Words of 32 columns of a row that take no longer than launching a sort does.
FEW_WORDS = 2**20
# A program walks over all rows, twice: with more of them a sort keeps more of the GPU busy.
MOST_ROWS = 8192
# Arguments that vary from call to call: a new length must not compile the kernel again.
SIZES = (
    "count_stride_b", "count_stride_h", "count_stride_t",
    "index_stride_b", "index_stride_h", "index_stride_t",
    "heads", "num_rows", "num_columns", "width", "entries", "tiles", "search_steps",
)  # fmt: skip


@triton.jit
def _members(
    counts, lists, rows, num_rows, count_stride, index_stride, first, search_steps,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """What some rows list.

    Returns:
        before (R,): entries of each row for columns before ``first``. members (C, R): 1 where a row
        lists the column, else 0.
    """
    count = tl.load(counts + rows * count_stride, mask=rows < num_rows, other=0)
    pointers = lists + rows.to(tl.int64) * index_stride
    before = tl.zeros_like(rows)
    for step in range(search_steps):
        further = before + (1 << (search_steps - 1 - step))
        inside = further <= count
        last = tl.load(pointers + further - 1, mask=inside, other=0)
        before = tl.where(inside & (last < first), further, before)
    lane = tl.arange(0, COLUMNS)
    slots = before[:, None] + lane[None, :]  # (R, C): unique entries, hence no more than columns
    entries = tl.load(pointers[:, None] + slots, mask=slots < count[:, None], other=first + COLUMNS)
    bits = entries - first
    inside = (bits >= 0) & (bits < COLUMNS)
    bits = tl.where(inside, 1 << tl.where(inside, bits, 0), 0)
    word = tl.sum(bits, 1)  # (R,)
    members = (word[None, :] >> lane[:, None]) & 1  # (C, R): consecutive rows are stored together
    return before, members


@triton.jit(do_not_specialize=SIZES)
def _transpose_kernel(
    counts_ptr, indices_ptr, offsets_ptr, rows_ptr, order_ptr,
    count_stride_b, count_stride_h, count_stride_t, index_stride_b, index_stride_h, index_stride_t,
    heads, num_rows, num_columns, width, entries, tiles, search_steps,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, HAS_ORDER: tl.constexpr,
    FEW_ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """FEW_ROWS: a step takes all of them, and what it found is kept for the second look."""
    # In this order: the statistics, which may begin then, do not wait for what came before.
    wait_for_last(OVERLAP)
    may_start_next(OVERLAP)
    batch, head, tile = program_tile(tiles, heads, False)
    counts = head_base(counts_ptr, batch, head, count_stride_b, count_stride_h)
    lists = head_base(indices_ptr, batch, head, index_stride_b, index_stride_h)
    batch_head = (batch * heads + head).to(tl.int64)
    offsets = offsets_ptr + batch_head * (num_columns + 1)
    targets = rows_ptr + batch_head * entries
    order = order_ptr
    if HAS_ORDER:
        order += batch_head * entries
    lane = tl.arange(0, ROWS)
    first = tile * COLUMNS

    before, members = _members(
        counts, lists, lane, num_rows, count_stride_t, index_stride_t, first, search_steps, COLUMNS
    )
    all_before, lengths = before, members
    if not FEW_ROWS:
        for start in range(ROWS, num_rows, ROWS):
            before, members = _members(
                counts, lists, start + lane, num_rows, count_stride_t, index_stride_t, first,
                search_steps, COLUMNS,
            )  # fmt: skip
            all_before += before
            lengths += members
    length = tl.sum(lengths, 1).to(tl.int64)  # (C,)
    # Lists that are not ascending break the contract, but harm nobody else.
    end = tl.minimum(tl.sum(all_before.to(tl.int64), 0) + tl.cumsum(length, 0), entries)
    columns = first + tl.arange(0, COLUMNS)
    tl.store(offsets + 1 + columns, end, mask=columns < num_columns)
    if tile == 0:
        tl.store(offsets, 0)

    place = end - length  # (C,) where the next row goes
    for start in range(0, num_rows, ROWS):
        rows = start + lane
        if not FEW_ROWS:
            before, members = _members(
                counts, lists, rows, num_rows, count_stride_t, index_stride_t, first,
                search_steps, COLUMNS,
            )  # fmt: skip
        places = place[:, None] + tl.cumsum(members, 1) - 1  # (C, R)
        kept = (members > 0) & (places >= 0) & (places < entries)
        tl.store(targets + places, tl.broadcast_to(rows[None, :], (COLUMNS, ROWS)), mask=kept)
        if HAS_ORDER:
            slots = before[None, :] + tl.cumsum(members, 0) - 1
            tl.store(order + places, rows.to(tl.int64)[None, :] * width + slots, mask=kept)
        place += tl.sum(members, 1)


def is_faster_than_sort(indices: Tensor, num_columns: int) -> bool:
    """Whether a GPU runs this kernel faster than it sorts all entries.

    The sort is linear in B·H·Mq·W. The kernel looks twice at each row of each 32 columns, be it
    empty there or not: B·H·Mq·Mk/32 words. By the memory that is read, not timed, a word costs half
    of what sorting an entry does, and 2^20 words (a head of 5792 × 5792 blocks, 32 heads of
    1024 × 1024) what launching a sort does. So only larger problems whose lists have room for less
    than one block in 32 are left to the sort, and lists of more than 8192 rows.
    """
    words = indices.shape[:3].numel() * ceil_div(num_columns, COLUMNS)
    return indices.shape[2] <= MOST_ROWS and words <= max(indices.numel(), FEW_WORDS)


def transpose_lists(
    counts: Tensor, indices: Tensor, num_columns: int, with_order: bool, fill: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the kernel.

    Args:
        counts: (B, H, Mq) int32. indices: (B, H, Mq, W) int32, the entries of a list adjacent
            (`launch.adjacent_lists`), else of any strides. The caller keeps both until the launch
            for the statistics, which may get the memory of what is freed while this one reads.
        num_columns: Mk.
        with_order: whether to return the last result.
        fill: entries past the last offset are 0; else they are not written.

    Returns:
        offsets (B, H, Mk + 1) int32 (int64 where B·H·Mq·W needs it) and rows (B, H, Mq·W) int32:
        key block ``c`` is visited by the query blocks ``rows[..., offsets[c]:offsets[c + 1]]``,
        ascending; with ``fill`` rows past ``offsets[Mk]`` are 0. order (B, H, Mq·W) int64, or None:
        the entry ``m · W + slot`` that each row ``m`` comes from, and 0.
    """
    batch, heads, num_rows, width = indices.shape
    entries = num_rows * width
    fits = indices.numel() <= torch.iinfo(torch.int32).max
    offset_type = torch.int32 if fits else torch.int64
    offsets = indices.new_empty((batch, heads, num_columns + 1), dtype=offset_type)
    # What is left of them belongs to no column, but some kernels read it, and it must be valid.
    make = indices.new_zeros if fill else indices.new_empty
    rows = make((batch, heads, entries))
    order = torch.zeros_like(rows, dtype=torch.int64) if with_order else None
    if indices.numel() == 0 or num_columns == 0:
        return offsets.zero_(), rows.zero_(), order
    assert indices.shape[-1] <= 1 or indices.stride(-1) == 1, "a copy would be freed too early"
    launch = _plan_transposition(counts, indices, num_columns, offset_type, with_order)
    launch(counts, indices, offsets, rows, order)
    return offsets, rows, order


@planned
def _plan_transposition(
    counts: Tensor, indices: Tensor, num_columns: int, offset_type: torch.dtype, with_order: bool
) -> Launch:
    batch, heads, num_rows, width = indices.shape
    is_large = batch * heads * ceil_div(num_columns, COLUMNS) >= MANY_PROGRAMS
    columns = COLUMNS if is_large else FEWER_COLUMNS
    tiles = ceil_div(num_columns, columns)
    return Launch(
        _transpose_kernel, (tiles * batch * heads,),
        (
            *list_strides(counts, indices), heads, num_rows, num_columns, width, num_rows * width,
            tiles, width.bit_length(),
        ),
        COLUMNS=columns, ROWS=ROWS, HAS_ORDER=with_order, FEW_ROWS=num_rows <= ROWS,
        **overlapping(counts.device), num_warps=4,
    )  # fmt: skip
