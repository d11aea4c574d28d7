"""Which blocks of a cache a few queries attend to, from the boxes around the blocks' keys.

A block of keys lies in the box [low, high], one interval a dimension. No key of it has a larger
product with a query q than

    bound(q, block) = sum_d max(q_d low_d, q_d high_d) = max(q, 0) . high + min(q, 0) . low

(Quest, arXiv 2406.10774). The queries of the heads that share a key head share a list: the mass of
a block is the sum, over them, of the softmax of the scaled bounds over all blocks.

Two launches. The first brings the boxes up to date and takes the bounds, a program a few blocks;
the second takes the softmax and writes the lists, a program a key head. How far the boxes are right
is known on the device alone: ``fresh``, tokens, which the second launch moves on. So the host
needs to know no length, and a captured graph of both works at every step. Boxes hold the keys of
padding too: what is padding may be another thing at the next call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import (
    LENGTHS,
    ceil_div,
    exponent_scale,
    next_power_of_2,
    padded_head_dim,
)
from entropy_attn.kernels.plans import device_of, dot_precision
from entropy_attn.kernels.primitives import NO_SCORE, head_base, load_tile, valid_keys, valid_length

# Arguments that vary from call to call: a new length must not compile the kernels again.
VARYING = (
    *LENGTHS, "blocks", "width", "rows", "box_stride_b", "box_stride_h", "stride_valid",
)  # fmt: skip
# Bytes of a tile of boxes' ends, or of keys, in the first launch.
TILE_BYTES = 8192
# Queries, over the heads of a group, that are taken at a time.
MOST_ROWS = 32
# The masses of a key head stay in the registers of one program; and the boxes of so many blocks
# are few enough for offsets of 32 bits.
MOST_BLOCKS = 16384


@triton.jit
def _box_pointers(base, blocks, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(N, D) addresses of the lower ends of the boxes; the upper ends follow HEAD_DIM further."""
    return base + blocks[:, None] * (2 * HEAD_DIM) + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _refresh_box(
    base, block, key_base, stride_row, stride_dim, kv_end,
    BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store the box around a block's keys before kv_end, of which there is one."""
    dims = tl.arange(0, BLOCK_D)
    low = tl.full([BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK_D], float("-inf"), tl.float32)
    for start in tl.static_range(0, BLOCK_K, STEP):
        keys = block * BLOCK_K + start + tl.arange(0, STEP)
        pointers = key_base + keys.to(tl.int64)[:, None] * stride_row
        pointers += dims.to(tl.int64)[None, :] * stride_dim
        key = load_tile(pointers, keys, kv_end, HEAD_DIM, BLOCK_D, True).to(tl.float32)  # (S, D)
        counted = (keys < kv_end)[:, None]
        low = tl.minimum(low, tl.min(tl.where(counted, key, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(counted, key, float("-inf")), 0))
    target = base + block * (2 * HEAD_DIM) + dims
    tl.store(target, low.to(base.dtype.element_ty), mask=dims < HEAD_DIM)
    tl.store(target + HEAD_DIM, high.to(base.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
def _holds_valid(valid_ptr, batch, stride_valid, blocks, kv_end, BLOCK_K: tl.constexpr):
    """(N,) whether a block has a key that may be attended to."""
    found = blocks * 0
    for start in tl.static_range(0, BLOCK_K, 16):
        keys = blocks[:, None] * BLOCK_K + start + tl.arange(0, 16)[None, :]
        valid = valid_keys(valid_ptr, batch, stride_valid, keys, kv_end)  # (N, 16)
        found = tl.maximum(found, tl.max(valid.to(tl.int32), 1))
    return found > 0


@triton.jit(do_not_specialize=VARYING)
def _bound_kernel(
    query_ptr, key_ptr, boxes_ptr, bounds_ptr, fresh_ptr, valid_ptr, kv_lens_ptr,
    query_strides, key_strides, box_stride_b, box_stride_h, stride_valid,
    kv_heads, group, rows, q_len, kv_len, blocks, scale_log2,
    BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, STEP: tl.constexpr, HAS_VALID: tl.constexpr, HAS_KV_LENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Bounds (B, Hkv, rows, blocks) in base 2 of COLS blocks; -inf where no key is valid."""
    batch = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    kv_end = valid_length(kv_lens_ptr, batch, kv_len, HAS_KV_LENS)
    box_base = head_base(boxes_ptr, batch, kv_head, box_stride_b, box_stride_h)
    key_base = head_base(key_ptr, batch, kv_head, key_strides[0], key_strides[1])

    # The keys of the queries are new, whatever stood there before.
    right = tl.maximum(tl.minimum(tl.load(fresh_ptr + batch), kv_end - q_len), 0)
    first = tl.program_id(1) * COLS
    end = tl.minimum(first + COLS, tl.cdiv(kv_end, BLOCK_K))
    for block in range(tl.maximum(first, right // BLOCK_K), end):
        _refresh_box(
            box_base, block, key_base, key_strides[2], key_strides[3], kv_end,
            BLOCK_K, HEAD_DIM, BLOCK_D, STEP,
        )  # fmt: skip
    # What one thread of the program wrote, another reads below.
    tl.debug_barrier()

    column = first + tl.arange(0, COLS)  # (N,)
    ends = _box_pointers(box_base, column, HEAD_DIM, BLOCK_D)
    low = load_tile(ends, column, end, HEAD_DIM, BLOCK_D, True)  # (N, D)
    high = load_tile(ends + HEAD_DIM, column, end, HEAD_DIM, BLOCK_D, True)
    seen = column < end
    if HAS_VALID:
        seen = seen & _holds_valid(valid_ptr, batch, stride_valid, column, kv_end, BLOCK_K)

    dims = tl.arange(0, BLOCK_D)
    query_base = query_ptr + batch.to(tl.int64) * query_strides[0]
    bounds_base = bounds_ptr + tl.program_id(0).to(tl.int64) * rows * blocks
    for start in range(0, rows, ROWS):
        lane = start + tl.arange(0, ROWS)  # (M,) all queries of one head, then of the next
        head = kv_head * group + lane // q_len
        places = head.to(tl.int64) * query_strides[1]
        places += (lane % q_len).to(tl.int64) * query_strides[2]
        pointers = query_base + places[:, None] + dims.to(tl.int64)[None, :] * query_strides[3]
        query = load_tile(pointers, lane, rows, HEAD_DIM, BLOCK_D, True)  # (M, D)
        above = tl.where(query > 0.0, query, 0.0).to(query.dtype)
        below = tl.where(query > 0.0, 0.0, query).to(query.dtype)  # NaN stays NaN
        bounds = tl.dot(above, tl.trans(high), input_precision=PRECISION)  # (M, N)
        bounds = tl.dot(below, tl.trans(low), bounds, input_precision=PRECISION) * scale_log2
        bounds = tl.where(seen[None, :], bounds, float("-inf"))
        target = bounds_base + lane.to(tl.int64)[:, None] * blocks + column[None, :]
        tl.store(target, bounds, mask=(lane < rows)[:, None] & (column < blocks)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _choose_kernel(
    bounds_ptr, counts_ptr, indices_ptr, fresh_ptr, totals_ptr, kv_lens_ptr,
    kv_heads, rows, q_len, kv_len, blocks, width, sink, local, share, least,
    BLOCK_K: tl.constexpr, COLS: tl.constexpr, HAS_KV_LENS: tl.constexpr,
):  # fmt: skip
    """The list of one key head: the heaviest blocks, the first, and those around the queries."""
    program = tl.program_id(0)
    batch = program // kv_heads
    kv_end = valid_length(kv_lens_ptr, batch, kv_len, HAS_KV_LENS)
    column = tl.arange(0, COLS)
    base = bounds_ptr + program.to(tl.int64) * rows * blocks
    mass = tl.zeros([COLS], tl.float32)
    seen = tl.zeros([COLS], tl.int32)
    for row in range(0, rows):
        bounds = tl.load(base + row * blocks + column, mask=column < blocks, other=float("-inf"))
        seen = (bounds != float("-inf")).to(tl.int32)  # the same in every row
        p = tl.exp2(bounds - tl.maximum(tl.max(bounds, 0), NO_SCORE))
        total = tl.sum(p, 0)
        mass += p / tl.where(total == 0.0, 1.0, total)
    # A prediction that is not finite keeps the first blocks; what is not seen is never kept.
    mass = tl.where(mass == mass, mass, float("inf"))
    mass = tl.where(seen > 0, mass, -1.0)

    rank = tl.cumsum(seen, 0)
    visible = tl.sum(seen, 0)
    asked = tl.maximum(tl.ceil(visible.to(tl.float32) * share).to(tl.int32), least)
    asked = tl.minimum(asked, visible)
    # Non-negative floats are ordered as their bits are: the asked-th largest by bisection.
    bits = asked * 0
    for step in range(31):
        candidate = bits | (1 << (30 - step))
        reached = tl.sum((mass >= candidate.to(tl.float32, bitcast=True)).to(tl.int32), 0)
        bits = tl.where(reached >= asked, candidate, bits)
    threshold = bits.to(tl.float32, bitcast=True)
    heavier = mass > threshold
    tie = (mass == threshold).to(tl.int32)
    left = asked - tl.sum(heavier.to(tl.int32), 0)
    keep = heavier | ((tie > 0) & (tl.cumsum(tie, 0) <= left))
    near = column > tl.maximum(kv_end - q_len, 0) // BLOCK_K - local
    keep = (keep | (rank <= sink) | near) & (seen > 0)

    kept = keep.to(tl.int32)
    count = tl.sum(kept, 0)
    out = indices_ptr + program.to(tl.int64) * width
    slot = tl.cumsum(kept, 0) - 1
    tl.store(out + slot, column, mask=keep & (slot < width))
    tl.store(out + column, column * 0, mask=(column >= count) & (column < width))
    tl.store(counts_ptr + program, count)
    tl.atomic_add(totals_ptr, count.to(tl.int64))
    tl.atomic_add(totals_ptr + 1, visible.to(tl.int64))
    if program % kv_heads == 0:
        tl.store(fresh_ptr + batch, kv_end)


def choose_blocks(
    query: Tensor,
    key: Tensor,
    boxes: Tensor,
    fresh: Tensor,
    totals: Tensor,
    valid: Tensor | None,
    kv_lens: Tensor | None,
    block: int,
    sink: int,
    local: int,
    share: float,
    least: int,
    width: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Launch both kernels; see `entropy_attn.decoding.ops.choose_blocks`.

    Args:
        boxes: (B, Hkv, at least the number of blocks, 2, D) in the dtype of the keys.
        width: entries a list, at least as many as can be kept.

    Returns:
        counts (B, Hkv, 1), indices (B, Hkv, 1, width), int32.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    blocks, group = ceil_div(kv_len, block), heads // kv_heads
    rows = group * q_len
    bounds = query.new_empty((batch, kv_heads, rows, blocks), dtype=torch.float32)
    counts = fresh.new_empty((batch, kv_heads, 1))
    indices = fresh.new_empty((batch, kv_heads, 1, width))
    cols, block_d = max(16, next_power_of_2(blocks)), padded_head_dim(head_dim)
    tile = max(16, min(64, TILE_BYTES // (block_d * key.element_size())))
    with device_of(query):
        _bound_kernel[(batch * kv_heads, ceil_div(blocks, tile))](
            query, key, boxes, bounds, fresh, valid, kv_lens,
            query.stride(), key.stride(), *boxes.stride()[:2],
            0 if valid is None else valid.stride(0),
            kv_heads, group, rows, q_len, kv_len, blocks, exponent_scale(scale),
            BLOCK_K=block, HEAD_DIM=head_dim, BLOCK_D=block_d,
            ROWS=max(16, min(MOST_ROWS, next_power_of_2(rows))), COLS=tile,
            STEP=min(tile, block),
            HAS_VALID=valid is not None, HAS_KV_LENS=kv_lens is not None,
            PRECISION=dot_precision(query.dtype), num_warps=4,
        )  # fmt: skip
        _choose_kernel[(batch * kv_heads,)](
            bounds, counts, indices, fresh, totals, kv_lens,
            kv_heads, rows, q_len, kv_len, blocks, width, sink, local, share, least,
            BLOCK_K=block, COLS=cols, HAS_KV_LENS=kv_lens is not None,
            num_warps=max(1, min(16, cols // 512)),
        )  # fmt: skip
    return counts, indices
