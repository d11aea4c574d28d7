"""Jit helpers shared by the kernels: addressing, which blocks a tile visits, online softmax.

Notation: M rows of queries and N keys a tile, D head_dim. Scores live in base 2: a score s is
handled as s * scale * log2(e), because exp2 is one instruction.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
# Where a running maximum starts: below every score, yet finite, so that a row which sees no key
# needs no guard against -inf - -inf.
NO_SCORE = tl.constexpr(-1.0e38)


@triton.jit
def may_start_next(OVERLAP: tl.constexpr):
    """With OVERLAP, let the next kernel start; it must `wait_for_last`."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last(OVERLAP: tl.constexpr):
    """With OVERLAP, wait until the kernel before has ended and what it wrote is there."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def head_base(pointer, batch, head, stride_batch, stride_head):
    """Address of one head; int64, since batch * stride passes 2^31 on large tensors."""
    return pointer + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head


@triton.jit
def tile_offsets(rows, stride_row, BLOCK_D: tl.constexpr, stride_dim):
    """(rows, D) offsets inside one head, int64."""
    dims = tl.arange(0, BLOCK_D)
    return rows.to(tl.int64)[:, None] * stride_row + dims.to(tl.int64)[None, :] * stride_dim


@triton.jit
def load_tile(
    pointers, rows, row_end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """(rows, BLOCK_D) tile; 0 past the last row and past HEAD_DIM."""
    dims = tl.arange(0, BLOCK_D)
    if MASK_ROWS and HEAD_DIM != BLOCK_D:
        mask = (rows < row_end)[:, None] & (dims < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=(rows < row_end)[:, None], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_box(descriptor, batch, head, start, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, BLOCK_D) tile of one head by the copy engine; 0 outside the tensor.

    ``descriptor`` is one of `launch.tile_descriptor`.
    """
    return tl.reshape(descriptor.load([batch, head, start, 0]), (ROWS, BLOCK_D))


@triton.jit
def store_tile(pointers, tile, rows, row_end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the rows before ``row_end`` of a (rows, BLOCK_D) tile."""
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < row_end)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def valid_length(lens_pointer, batch, default, HAS_LENS: tl.constexpr):
    """Valid tokens of a batch row, never more than there are."""
    if HAS_LENS:
        length = tl.minimum(tl.load(lens_pointer + batch), default)
    else:
        length = default
    return length


@triton.jit
def valid_keys(valid_pointer, batch, stride_batch, keys, kv_end):
    """Whether each of some keys may be attended to, by (B, Nk) bytes that are odd where it may."""
    row = valid_pointer + batch.to(tl.int64) * stride_batch
    return (tl.load(row + keys, mask=keys < kv_end, other=0) & 1) != 0


@triton.jit
def list_base(
    counts, indices, batch, head, tile, count_strides, index_strides, LISTED: tl.constexpr
):
    """Address of a tile's block list, and its length."""
    if LISTED:
        count_offset = batch * count_strides[0] + head * count_strides[1] + tile * count_strides[2]
        pointer = (
            head_base(indices, batch, head, index_strides[0], index_strides[1])
            + tile.to(tl.int64) * index_strides[2]
        )
        count = tl.load(counts + count_offset)
    else:
        pointer = 0  # never read; a function cannot return None
        count = 0
    return pointer, count


@triton.jit
def count_below(pointer, count, limit, total, LISTED: tl.constexpr, CHUNK: tl.constexpr = 128):
    """How many entries of an ascending list, of ``count`` of ``total`` blocks, are < limit.

    Not listed: every block is an entry, and there is no end of them.
    """
    below = tl.maximum(limit, 0)
    if LISTED:
        # At most total - limit entries are not: near the end of long lists few have to be read.
        certain = tl.maximum(count - tl.maximum(total - below, 0), 0)
        most = tl.minimum(count, below)
        below = certain
        for start in range(certain, most, CHUNK):
            slots = start + tl.arange(0, CHUNK)
            entries = tl.load(pointer + slots, mask=slots < most, other=2147483647)
            below += tl.sum((entries < limit).to(tl.int32), 0)
    return below


@triton.jit
def visited_blocks(
    pointer,
    count,
    first_position,
    last_position,
    kv_end,
    kv_len,
    window,
    BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    LISTED: tl.constexpr,
    MAY_CUT: tl.constexpr,
):
    """Split a tile's ascending block list into [first, full) without and [full, last) with masks.

    Args:
        first_position, last_position: where the tile's first and last query stand among the keys.
        kv_end: valid keys. MAY_CUT: kv_end may cut a listed block.

    Entries before ``first`` lie outside the window, entries from ``last`` on after the diagonal
    or the last valid key. With a window every visited block is masked: [first, first) is full.
    """
    total = tl.cdiv(kv_len, BLOCK_K)
    first = 0
    last = total
    if LISTED:
        last = count
    full = last
    if MAY_CUT or IS_CAUSAL:
        # Blocks before ``reach`` are seen by a query, those before ``clear`` by all of them.
        reach = total
        clear = total
        if MAY_CUT:
            reach = tl.cdiv(kv_end, BLOCK_K)
            clear = kv_end // BLOCK_K
        if IS_CAUSAL:
            # Floor division of a negative number rounds to zero in Triton, hence the maximum.
            reach = tl.minimum(reach, tl.maximum(last_position + BLOCK_K, 0) // BLOCK_K)
            clear = tl.minimum(clear, tl.maximum(first_position + 1, 0) // BLOCK_K)
        last = tl.minimum(last, count_below(pointer, count, reach, total, LISTED))
        full = tl.minimum(last, count_below(pointer, count, clear, total, LISTED))
    if HAS_WINDOW:
        out_of_reach = tl.maximum(first_position - window + 1, 0) // BLOCK_K
        first = tl.minimum(last, count_below(pointer, count, out_of_reach, total, LISTED))
        full = first
    return first, full, last


@triton.jit
def program_tile(tiles, heads, IS_CAUSAL: tl.constexpr):
    """(batch, head, tile) of queries that this program takes.

    Causal: the last tiles have the most work, they start first.
    """
    program = tl.program_id(0)
    tile = program % tiles
    if IS_CAUSAL:
        tile = tiles - 1 - tile
    batch_head = program // tiles
    return batch_head // heads, batch_head % heads, tile


@triton.jit
def tile_blocks(
    counts, indices, batch, head, tile, count_strides, index_strides, q_end, kv_end, kv_len, window,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr, MAY_CUT: tl.constexpr,
    HAS_Q_LENS: tl.constexpr,
):  # fmt: skip
    """The block list of the BLOCK_M queries of a tile: its address, count and `visited_blocks`."""
    first_row = tile * BLOCK_M
    pointer, count = list_base(
        counts, indices, batch, head, first_row // BLOCK_Q, count_strides, index_strides, LISTED
    )
    offset = kv_end - q_end
    last_row = tl.minimum(first_row + BLOCK_M, q_end) - 1
    first, full, last = visited_blocks(
        pointer, count, first_row + offset, last_row + offset, kv_end, kv_len, window,
        BLOCK_K, IS_CAUSAL, HAS_WINDOW, LISTED, MAY_CUT,
    )  # fmt: skip
    if HAS_Q_LENS:
        if first_row >= q_end:  # a tile of padding visits nothing
            last = first
            full = first
    return pointer, count, first, full, last


@triton.jit
def block_start(pointer, slot, count, LISTED: tl.constexpr, BLOCK_K: tl.constexpr):
    """First token of the block in a slot of the list; 0 for slots past the end."""
    if LISTED:
        start = tl.load(pointer + slot, mask=slot < count, other=0) * BLOCK_K
    else:
        start = slot * BLOCK_K
    return start


@triton.jit
def gathered_keys(
    pointer, slot, count, kv_len, LISTED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(BLOCK_N,) keys of the blocks in consecutive slots; kv_len for slots past the end."""
    lane = tl.arange(0, BLOCK_N)
    slots = slot + lane // BLOCK_K
    if LISTED:
        blocks = tl.load(pointer + slots, mask=slots < count, other=0)
    else:
        blocks = slots
    return tl.where(slots < count, blocks * BLOCK_K + lane % BLOCK_K, kv_len)


@triton.jit
def visible_scores(
    scores,
    positions,
    keys,
    kv_end,
    window,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """(M, N) scores with -inf where the query at a position must not see the key."""
    visible = (keys < kv_end)[None, :]
    if IS_CAUSAL:
        visible = visible & (keys[None, :] <= positions[:, None])
    if HAS_WINDOW:
        visible = visible & (positions[:, None] - keys[None, :] < window)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def visible_columns(scores, rows, keys, diagonal, window, HAS_WINDOW: tl.constexpr):
    """(N, M) scores with -inf where the key stands after the query, or before its window."""
    visible = keys[:, None] <= rows[None, :] + diagonal
    if HAS_WINDOW:
        visible = visible & (rows[None, :] + diagonal - keys[:, None] < window)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def online_softmax(scores, scale_log2, maximum):
    """One step of the online softmax.

    Args:
        scores: (M, N) raw scores; maximum: (M,) running maximum in base 2, NO_SCORE at first.

    Returns:
        exponents (M, N) in base 2, relative to the new maximum; the new maximum (M,); shift (M,),
        the old maximum minus the new one.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    exponents = scores * scale_log2 - new_maximum[:, None]
    return exponents, new_maximum, maximum - new_maximum


@triton.jit
def log_mass_of_block(
    p, query, lse, positions, batch, kv_head, key_base, stride_kn, stride_kd, block, step,
    kv_end, kv_len, window, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(M,) log2 P_iB of the block of keys that starts at ``block``; p (M, N) is of one step.

    The other steps of the block are computed again.
    """
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    mass = tl.sum(p, 1)
    for part in range(1, STEPS):
        start = block + (step + part) % STEPS * BLOCK_N
        keys = start + tl.arange(0, BLOCK_N)
        if DESCRIPTORS:
            key = load_box(key_base, batch, kv_head, start, BLOCK_N, BLOCK_D)  # (N, D)
        else:
            pointers = key_base + tile_offsets(keys, stride_kn, BLOCK_D, stride_kd)
            key = load_tile(pointers, keys, kv_len, HEAD_DIM, BLOCK_D, MASKED)  # (N, D)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (M, N)
        if MASKED:
            scores = visible_scores(scores, positions, keys, kv_end, window, IS_CAUSAL, HAS_WINDOW)
        mass += tl.sum(tl.exp2(scores * scale_log2 - lse[:, None]), 1)
    return tl.log2(tl.maximum(mass, 1.0e-37))


@triton.jit
def log_mass_of_columns(
    p, query, lse, rows, keys, key_base, stride_kn, stride_kd, kv_end, kv_len, diagonal, window,
    scale_log2, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, MAY_CUT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(M,) log2 P_iB of the whole block that the (N,) keys belong to; p is theirs, (N, M).

    What other programs have of the block is computed again.
    """
    if MAY_CUT:
        p = tl.where((keys < kv_end)[:, None], p, 0.0)
    mass = tl.sum(p, 0)
    for part in range(1, BLOCK_K // BLOCK_N):
        others = keys // BLOCK_K * BLOCK_K + (keys + part * BLOCK_N) % BLOCK_K
        pointers = key_base + tile_offsets(others, stride_kn, BLOCK_D, stride_kd)
        key = load_tile(pointers, others, kv_len, HEAD_DIM, BLOCK_D, MAY_CUT)  # (N, D)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # (N, M)
        if MASKED:
            scores = visible_columns(scores, rows, others, diagonal, window, HAS_WINDOW)
        p = tl.exp2(scores * scale_log2 - lse[None, :])
        if MAY_CUT:
            p = tl.where((others < kv_end)[:, None], p, 0.0)
        mass += tl.sum(p, 0)
    return tl.log2(tl.maximum(mass, 1.0e-37))


@triton.jit
def load_rows(base, rows, row_end, dims, DIM: tl.constexpr, stride_row, stride_dim):
    """(rows, dims) part of a matrix in its own dtype; 0 past the last row and past DIM."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + dims.to(tl.int64)[None, :] * stride_dim
    mask = (rows < row_end)[:, None] & inside(dims, DIM)[None, :]
    return tl.load(base + offsets, mask=mask, other=0.0)


@triton.jit
def inside(dims, DIM: tl.constexpr):
    """Which of a step's dims exist: known beforehand to be all where steps divide DIM."""
    if tl.constexpr(DIM) % dims.shape[0] == 0:
        mask = tl.full([dims.shape[0]], True, tl.int1)
    else:
        mask = dims < DIM
    return mask


@triton.jit
def load_part(base, rows, row_end, dims, DIM: tl.constexpr, stride_row, stride_dim):
    """(rows, dims) part of a matrix in fp32; 0 past the last row and past DIM."""
    return load_rows(base, rows, row_end, dims, DIM, stride_row, stride_dim).to(tl.float32)


@triton.jit
def row_weights(pointer, batch, head, strides, rows, row_end, HAS_WEIGHTS: tl.constexpr):
    """(rows,) weights of one head in fp32; 1 where there are none, 0 past the last row."""
    if HAS_WEIGHTS:
        base = head_base(pointer, batch, head, strides[0], strides[1])
        pointers = base + rows.to(tl.int64) * strides[2]
        weights = tl.load(pointers, mask=rows < row_end, other=0.0).to(tl.float32)
    else:
        weights = (rows < row_end).to(tl.float32)
    return weights


@triton.jit
def weighted_rows(values, weights):
    """(rows, N) values times the row's weight; 0, and never NaN, where the weight is 0."""
    return tl.where((weights > 0.0)[:, None], values * weights[:, None], 0.0)


@triton.jit
def half_range_scale(largest):
    """A power of two that takes a number >= 0 to [2^13, 2^14), and its inverse.

    What is at most that number then fits fp16 with room for a factor of 4, and 38 binary digits
    below it are above the least subnormal. By the bits of the exponent, hence exact.
    """
    exponent = tl.maximum(largest, 2.0**-100).to(tl.int32, bitcast=True) & 0x7F800000
    scale = (254 << 23) - exponent + (13 << 23)
    inverse = exponent - (13 << 23)
    return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def two_terms(values, dtype: tl.constexpr):
    """fp32 values as a sum of two in half precision: of fp16, 22 of their 24 binary digits."""
    high = values.to(dtype)
    return high, (values - high.to(tl.float32)).to(dtype)


@triton.jit
def dot_terms(a, a_low, b, b_low, PAIRS: tl.constexpr):
    """a @ b in fp32, of half-precision operands or, with PAIRS, of sums of two.

    The product of the two low terms is below the digits of the pairs and left out. Small terms
    come first, since the accumulator of tensor cores cuts digits off.
    """
    if PAIRS:
        product = tl.dot(a_low, b)
        product = tl.dot(a, b_low, product)
        product = tl.dot(a, b, product)
    else:
        product = tl.dot(a, b)
    return product
