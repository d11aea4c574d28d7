"""The order in which the Hopper kernels take their work: some heads in turn, longest first.

What follows is said of the forward. In the backward an item is a block of keys, with its column of
the transposed lists, the heads that are open together are those of a unit of `sums`, and the
counter that items are claimed from stands there too.

A work item is a tile of queries of one head. Programs claim items one after the other, so the
order is all the schedule that there is (list scheduling). The longest items come first (Graham,
SIAM J. Appl. Math. 17, 1969), but only within a group of heads whose keys and values fit in L2
together: were all heads open at once, they would throw each other's keys out of it. The last group
is larger if it has to be, for some items a program: with the shortest last, all end together.

One launch, no synchronisation, no sort: the place of an item is the number of items of its group
that come before it, and each program counts those of its tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import LENGTHS, ceil_div, list_strides, overlapping
from entropy_attn.kernels.plans import Launch, planned
from entropy_attn.kernels.primitives import (
    head_base,
    may_start_next,
    valid_length,
    wait_for_last,
)

# That are compared with each other, or a few more; unless one head has more.
MOST_ITEMS = 16384
# Of this launch; few where there are few items, which then are looked at on the whole GPU.
TILES_A_PROGRAM = 16
FEW_TILES_A_PROGRAM, FEW_ITEMS = 4, 2048
CHUNK = 512  # items or entries of a list that it looks at in a step
ITEMS_AT_THE_END = 4  # of a program that claims them, at least, in the last group
# Columns of a row of the table.
ITEM_FIELDS = tl.constexpr(4)


@triton.jit
def _reach(
    tiles, q_end, kv_end, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, IS_CAUSAL: tl.constexpr
):
    """Key blocks with a key that the last query of a tile may see, queries aligned to the end."""
    reach = tl.zeros_like(tiles) + tl.cdiv(kv_end, BLOCK_K)
    if IS_CAUSAL:
        last_rows = tl.minimum((tiles + 1) * BLOCK_M, q_end) - 1
        diagonal = tl.maximum(last_rows + kv_end - q_end + BLOCK_K, 0) // BLOCK_K
        reach = tl.minimum(reach, diagonal)
    return reach


@triton.jit
def _lengths(
    counts_ptr, batch, head, tiles, valid, count_strides, q_end, kv_end,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, LISTED: tl.constexpr, HAS_Q_LENS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """At most how many key blocks tiles of queries visit; -1 where not valid.

    Exact but for lists that name blocks after the diagonal or after the last valid key.

    GROUP > 0: the "tiles" are blocks of keys, and the length is that of their columns in all query
    heads of the group; counts_ptr points to the offsets of the transposed lists.
    """
    if GROUP > 0:
        rows = tl.cdiv(q_end, BLOCK_Q)
        most = tl.zeros_like(tiles) + rows
        if IS_CAUSAL:
            most -= tl.minimum(tl.maximum(tiles * BLOCK_M + q_end - kv_end, 0) // BLOCK_Q, rows)
        most = tl.where(tiles * BLOCK_M < kv_end, most, 0)
        length = tl.zeros_like(tiles)
        for member in tl.static_range(GROUP):
            columns = batch * count_strides[0] + (head * GROUP + member) * count_strides[1] + tiles
            begin = tl.load(counts_ptr + columns, mask=valid, other=0)
            end = tl.load(counts_ptr + columns + 1, mask=valid, other=0)
            length += tl.minimum((end - begin).to(tl.int32), most)
        return tl.where(valid, length, -1)
    length = _reach(tiles, q_end, kv_end, BLOCK_M, BLOCK_K, IS_CAUSAL)
    if LISTED:
        offsets = batch * count_strides[0] + head * count_strides[1]
        offsets += (tiles * BLOCK_M // BLOCK_Q) * count_strides[2]
        length = tl.minimum(length, tl.load(counts_ptr + offsets, mask=valid, other=0))
    if HAS_Q_LENS:
        length = tl.where(tiles * BLOCK_M < q_end, length, 0)  # a tile of padding visits nothing
    return tl.where(valid, length, -1)


@triton.jit(do_not_specialize=(*LENGTHS, "group_heads", "last_group"))
def _order_kernel(
    items_ptr, counts_ptr, indices_ptr, kv_lens_ptr, q_lens_ptr,
    count_stride_b, count_stride_h, count_stride_t, index_stride_b, index_stride_h, index_stride_t,
    heads, total_heads, group_heads, last_group, q_len, kv_len, q_tiles,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MAY_CUT: tl.constexpr, LISTED: tl.constexpr,
    HAS_KV_LENS: tl.constexpr, HAS_Q_LENS: tl.constexpr, GROUP: tl.constexpr,
    TILES: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # Whoever is next touches nothing that this launch or the last one uses before it has waited.
    may_start_next(OVERLAP)
    wait_for_last(OVERLAP)
    count_strides = count_stride_b, count_stride_h, count_stride_t
    batch_head = tl.program_id(1)  # counts over all heads of all batch rows
    batch, head = batch_head // heads, batch_head % heads
    tiles = tl.program_id(0) * TILES + tl.arange(0, TILES)  # (T,)
    valid = tiles < q_tiles
    kv_end = valid_length(kv_lens_ptr, batch, kv_len, HAS_KV_LENS)
    q_end = valid_length(q_lens_ptr, batch, q_len, HAS_Q_LENS)
    length = _lengths(
        counts_ptr, batch, head, tiles, valid, count_strides, q_end, kv_end,
        BLOCK_M, BLOCK_Q, BLOCK_K, IS_CAUSAL, LISTED, HAS_Q_LENS, GROUP,
    )  # fmt: skip

    # The blocks of a list that are visited at all, and those that need no mask.
    last = length
    full = length
    if GROUP > 0:  # where the column of the first query head begins, and its entries
        column = batch * count_strides[0] + head * GROUP * count_strides[1] + tiles
        begin = tl.load(counts_ptr + column, mask=valid, other=0)
        last = begin.to(tl.int32)
        full = (tl.load(counts_ptr + column + 1, mask=valid, other=0) - begin).to(tl.int32)
    if (IS_CAUSAL or MAY_CUT) and GROUP == 0:
        clear = tl.zeros_like(tiles) + kv_end // BLOCK_K
        if IS_CAUSAL:
            first_positions = tl.maximum(tiles * BLOCK_M + kv_end - q_end + 1, 0)
            clear = tl.minimum(clear, first_positions // BLOCK_K)
        if LISTED:
            reach = _reach(tiles, q_end, kv_end, BLOCK_M, BLOCK_K, IS_CAUSAL)
            lists = head_base(indices_ptr, batch, head, index_stride_b, index_stride_h)
            rows = lists + (tiles * BLOCK_M // BLOCK_Q).to(tl.int64) * index_stride_t
            last = tl.zeros_like(tiles)
            full = tl.zeros_like(tiles)
            for start in range(0, tl.max(length, 0), CHUNK):
                slots = start + tl.arange(0, CHUNK)
                listed = slots[None, :] < length[:, None]  # (T, C)
                blocks = tl.load(rows[:, None] + slots[None, :], mask=listed, other=2147483647)
                last += tl.sum((blocks < reach[:, None]).to(tl.int32), 1)
                full += tl.sum((blocks < clear[:, None]).to(tl.int32), 1)
        else:
            full = tl.minimum(length, clear)

    # How many items of the group come before.
    first_head = tl.minimum(batch_head // group_heads * group_heads, last_group)
    next_head = tl.where(first_head < last_group, first_head + group_heads, total_heads)
    group_items = (next_head - first_head) * q_tiles
    own = (batch_head - first_head) * q_tiles + tiles  # (T,) number within the group
    rank = tl.zeros_like(tiles)
    for start in range(0, group_items, CHUNK):
        others = start + tl.arange(0, CHUNK)  # (C,)
        other_head = tl.minimum(first_head + others // q_tiles, total_heads - 1)
        other_batch = other_head // heads
        other_kv_end = valid_length(kv_lens_ptr, other_batch, kv_len, HAS_KV_LENS)
        other_q_end = valid_length(q_lens_ptr, other_batch, q_len, HAS_Q_LENS)
        other = _lengths(
            counts_ptr, other_batch, other_head % heads, others % q_tiles,
            others < group_items, count_strides, other_q_end, other_kv_end,
            BLOCK_M, BLOCK_Q, BLOCK_K, IS_CAUSAL, LISTED, HAS_Q_LENS, GROUP,
        )  # fmt: skip
        is_longer = other[None, :] > length[:, None]  # (T, C)
        is_tied = (other[None, :] == length[:, None]) & (others[None, :] < own[:, None])
        rank += tl.sum((is_longer | is_tied).to(tl.int32), 1)

    rows = items_ptr + (first_head * q_tiles + rank) * ITEM_FIELDS
    tl.store(rows, batch_head * q_tiles + tiles, mask=valid)
    tl.store(rows + 1, last, mask=valid)
    tl.store(rows + 2, full, mask=valid)
    if GROUP > 0:
        lists = head_base(indices_ptr, batch, head * GROUP, index_stride_b, index_stride_h)
        tl.store(rows + 3, tl.load(lists + begin, mask=valid & (full > 0), other=0), mask=valid)
    if (batch_head == 0) & (tl.program_id(0) == 0):
        tl.store(items_ptr + total_heads * q_tiles * ITEM_FIELDS, 0)  # nothing is claimed yet


def heads_together(
    total_heads: int, group: int, tiles: int, kv_len: int, head_dim: int, itemsize: int,
    l2_bytes: int,
) -> int:  # fmt: skip
    """How many consecutive query heads to open at once: their keys and values fill a part of L2.

    A quarter: L2 is in two halves that each keep what their multiprocessors read, and queries,
    results and the next group pass through it as well.

    Args:
        group: query heads that share a head of keys.
        tiles: work items a head; each is compared with all others that are open.
    """
    kv_bytes = 2 * kv_len * head_dim * itemsize
    most = min(max(1, l2_bytes // 4 // kv_bytes) * group, max(1, MOST_ITEMS // tiles))
    groups = ceil_div(total_heads, most)
    return ceil_div(total_heads, groups)


def last_group(total_heads: int, together: int, tiles: int, programs: int) -> int:
    """First head of the last group, which has `ITEMS_AT_THE_END` a program if there are so many.

    Args:
        together: of `heads_together`; programs: that claim items.
    """
    fewest = min(ceil_div(ITEMS_AT_THE_END * programs, tiles), max(1, MOST_ITEMS // tiles))
    return max(0, total_heads - fewest) // together * together


def work_order(
    query: Tensor,
    key: Tensor,
    counts: Tensor | None,
    indices: Tensor | None,
    block_size: tuple[int, int],
    block_m: int,
    is_causal: bool,
    l2_bytes: int,
    programs: int,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
) -> Tensor:
    """The work items in the order in which they are to be claimed.

    It depends on the lists, the lengths, the shapes, is_causal and programs alone, never on the
    values of query and key: a caller with the same mask in every layer may keep it as long as lists
    and lengths are unchanged. But two launches that may overlap, on different streams, must not
    share one: it holds the counter.

    Args:
        programs: that will claim the items, if there are so many.
        kv_lens, q_lens: (B,) int32 valid lengths, or None; read on the device.

    Returns:
        (B * Hq * tiles + 1, 4) int32: the tile's number, ((b * Hq + h) * tiles + t); how many
        entries of its list are visited; how many of these, the first ones, need no mask; unused.
        The last row begins with the counter that programs claim items from. It is 0, and 0 again
        after a launch.
    """
    tiles = ceil_div(query.shape[2], block_m)
    rows = query.shape[0] * query.shape[1] * tiles + 1
    items = torch.empty((rows, 4), dtype=torch.int32, device=query.device)
    launch = plan_order(
        query, key, counts, indices, block_size, block_m, is_causal, l2_bytes, programs, kv_lens,
        q_lens,
    )  # fmt: skip
    launch(items, counts, indices, kv_lens, q_lens)
    return items


@planned
def plan_order(
    query: Tensor,
    key: Tensor,
    counts: Tensor | None,
    indices: Tensor | None,
    block_size: tuple[int, int],
    block_m: int,
    is_causal: bool,
    l2_bytes: int,
    programs: int,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
) -> Launch:
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    tiles = ceil_div(q_len, block_m)
    together = heads_together(
        batch * heads, heads // kv_heads, tiles, kv_len, head_dim, key.element_size(), l2_bytes
    )
    return _launch(
        list_strides(counts, indices), key.device, batch, heads, together,
        last_group(batch * heads, together, tiles, programs), q_len, kv_len, tiles,
        BLOCK_M=block_m, BLOCK_Q=block_size[0], BLOCK_K=block_size[1],
        IS_CAUSAL=is_causal, MAY_CUT=kv_lens is not None or kv_len % block_size[1] != 0,
        LISTED=indices is not None,
        HAS_KV_LENS=kv_lens is not None, HAS_Q_LENS=q_lens is not None, GROUP=0,
    )  # fmt: skip


def _launch(
    strides: tuple[int, ...],
    device: torch.device,
    batch: int,
    heads: int,
    together: int,
    last: int,
    q_len: int,
    kv_len: int,
    tiles: int,
    **constants: Any,
) -> Launch:
    few = batch * heads * tiles <= FEW_ITEMS
    tiles_a_program = FEW_TILES_A_PROGRAM if few else TILES_A_PROGRAM
    return Launch(
        _order_kernel, (ceil_div(tiles, tiles_a_program), batch * heads),
        (*strides, heads, batch * heads, together, last, q_len, kv_len, tiles),
        **constants, TILES=tiles_a_program, CHUNK=CHUNK, **overlapping(device), num_warps=4,
    )  # fmt: skip


def backward_order(
    query: Tensor,
    key: Tensor,
    offsets: Tensor,
    rows: Tensor,
    together: int,
    block_q: int,
    is_causal: bool,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
) -> Tensor:
    """The order of the backward, whose items are blocks of 128 keys.

    Args:
        offsets, rows: of the transposed lists, (B|1, H|1, Mk + 1) and (B|1, H|1, Mq * W); their
            entries are adjacent.
        together: heads of keys, over all batch rows, that are open at once.

    Returns:
        (B * Hkv * Mk + 1, 4) int32: an item's number, (b * Hkv + h) * Mk + t; where its column
        begins in the rows of the first query head of the group, its entries, and the first one.
    """
    count = key.shape[0] * key.shape[1] * (offsets.shape[2] - 1) + 1
    items = torch.empty((count, 4), dtype=torch.int32, device=key.device)
    launch = _plan_backward_order(
        query, key, offsets, rows, together, block_q, is_causal, kv_lens, q_lens
    )  # fmt: skip
    launch(items, offsets, rows, kv_lens, q_lens)
    return items


@planned
def _plan_backward_order(
    query: Tensor,
    key: Tensor,
    offsets: Tensor,
    rows: Tensor,
    together: int,
    block_q: int,
    is_causal: bool,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
) -> Launch:
    batch, kv_heads, kv_len, _ = key.shape
    tiles = offsets.shape[2] - 1
    last = (batch * kv_heads - 1) // together * together  # the groups are the units of `sums`
    return _launch(
        list_strides(offsets, rows), key.device, batch, kv_heads, together, last, query.shape[2],
        kv_len, tiles,
        BLOCK_M=128, BLOCK_Q=block_q, BLOCK_K=128, IS_CAUSAL=is_causal, MAY_CUT=False, LISTED=True,
        HAS_KV_LENS=kv_lens is not None, HAS_Q_LENS=q_lens is not None,
        GROUP=query.shape[1] // kv_heads,
    )  # fmt: skip
