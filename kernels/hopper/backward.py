"""Block-sparse attention, backward, for Hopper (sm_90a): one pass over the scores, in Gluon.

The same sums as `entropy_attn.kernels.block_sparse_backward`, without entropies and windows. With
P = exp(S - lse), dP = dO V^T, delta_i = dO_i . O_i - dlse_i:
    dS = P * (dP - delta),  dV = P^T dO,  dK = scale * dS^T Q,  dQ = scale * dS K.

A program takes a block of 128 keys and walks over the queries that list it (the transposed lists,
CSR) in all query heads of its group. Two warpgroups of 64 keys each hold their part of dK and dV in
registers; a producer warp feeds rings of queries and of their gradients through the copy engine,
with each row's lse and -delta. Scores are computed once, transposed, so that P^T and dS^T are left
operands in the registers where they are. Of lists, the longest columns of a few heads come first
(`order.backward_order`).

dQ is the sum of the programs' parts: dS goes through shared memory, as each warpgroup needs both
halves of the keys, and a third kind of warp, the writer, lets the copy engine add the product to
fp32 sums in memory (as in FlashAttention-3, Shah et al., arXiv 2407.08608). The order of these
additions is not fixed. dQ of a step is computed at the end of the step after, so that a warpgroup
does not wait for what the other does at the same time. Two more warps clear and round the sums of
other heads meanwhile (`sums`).

Memory and barriers. `Ring` is described in `primitives`. For dS a slot is filled by both
warpgroups, each its half, and read by both:
    step s:  S(s) | dP(s) | P, dV(s) | dS into slot s + 1 | dQ(s - 1) from slot s, dK(s)
Slot 0 counts as full at the start, with anything in it: the writer drops what comes of it. A slot
is free for dS once both warpgroups have released the queries of the step before, in which they read
it.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from entropy_attn.kernels.backward_statistics import row_statistics
from entropy_attn.kernels.hopper import forward
from entropy_attn.kernels.hopper.columns import (
    BLOCK_N,
    KEYS,
    PIECE,
    Buffers,
    Columns,
)
from entropy_attn.kernels.hopper.config import (
    REGISTERS,
    HopperBackwardConfig,
    hopper_backward_config,
)
from entropy_attn.kernels.hopper.forward import descriptor
from entropy_attn.kernels.hopper.order import backward_order
from entropy_attn.kernels.hopper.primitives import (
    barriers,
    exp2,
    operand,
    pass_turn,
    ring,
    take_turn,
    valid_ends,
)
from entropy_attn.kernels.hopper.sums import (
    WARPS,
    Sums,
    Units,
    add_to_global,
    allocate,
    divide,
    round_last,
)
from entropy_attn.kernels.launch import (
    LENGTHS,
    adjacent_lists,
    ceil_div,
    device_limits,
    exponent_scale,
    has_copy_engine,
    list_strides,
)
from entropy_attn.kernels.plans import Launch, planned
from entropy_attn.kernels.primitives import may_start_next, wait_for_last

# Of the division of work, which follows from lengths.
UNITS = "units", "lead", "programs", "unit_rows", "all_rows"


# Producer


@gluon.jit
def _fetch(buffers, use, query_desc, grad_desc, rows_desc, batch, head, start, row):
    """Fill a slot with queries, their gradients, lse and -delta."""
    ring = buffers.queries
    ROWS: gl.constexpr = ring.boxes.shape[3]
    BYTES: gl.constexpr = 2 * ROWS * (2 * ring.boxes.shape[4] + 4)
    ring.wait_empty(use)
    slot = use % ring.SLOTS
    full = ring.full.index(slot)
    mbarrier.expect(full, BYTES)
    place = [batch, head, start, 0]
    tma.async_copy_global_to_shared(query_desc, place, full, ring.boxes.index(2 * slot))
    tma.async_copy_global_to_shared(
        rows_desc, [row, start], full, buffers.row_boxes.index(2 * slot)
    )
    tma.async_copy_global_to_shared(grad_desc, place, full, ring.boxes.index(2 * slot + 1))
    tma.async_copy_global_to_shared(
        rows_desc, [row + 1, start], full, buffers.row_boxes.index(2 * slot + 1)
    )


@gluon.jit
def _producer(columns, buffers, query_desc, key_desc, value_desc, grad_desc, rows_desc):
    batch, kv_head, key_start, begin, count, first_row = columns.place()
    q_end, kv_end = valid_ends(columns, batch)
    buffers.keys.fetch(0, key_desc, batch, kv_head, key_start, key_start + KEYS)
    buffers.values.fetch(0, value_desc, batch, kv_head, key_start, key_start + KEYS)
    use = 0
    member = 0
    while member < columns.GROUP:
        head = kv_head * columns.GROUP + member
        row = 2 * ((batch * columns.kv_heads + kv_head) * columns.GROUP + member)
        pointer = columns.pointer(batch, head, begin)
        step, _, last = columns.steps(pointer, count, key_start, q_end, kv_end)
        start = columns.first_start(pointer, step, last, first_row)
        while step < last:
            next_start = columns.start(pointer, step + 1, last)  # on its way meanwhile
            _fetch(buffers, use, query_desc, grad_desc, rows_desc, batch, head, start, row)
            use += 1
            step += 1
            start = next_start
        member += 1
        begin, count = columns.next_column(batch, head + 1, key_start, member, begin, count)


# Consumers


@gluon.jit
def _zero():
    """0, of which the compiler does not know that it is the same in each step.

    It would compute the descriptors of keys and values before the loop, all sixteen, and as they do
    not fit the registers, load them from the stack in each step, in front of the products.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _row_values(buffers, use, layout: gl.constexpr, PART: gl.constexpr):
    """(M,) lse or -delta of a slot's rows."""
    return buffers.row_values.index(use % buffers.queries.SLOTS * 2 + PART).load(layout)


@gluon.jit
def _query_product(columns, buffers, use, WARPGROUP: gl.constexpr):
    """Start this warpgroup's part of dQ, (64, 64), from slot ``use`` of dS: two products."""
    CHUNKS: gl.constexpr = buffers.keys.tiles.shape[2] // PIECE  # of a row of keys
    HALVES: gl.constexpr = columns.BLOCK_M // 64  # of a row of dS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    mbarrier.wait(buffers.scores_full.index(use % 2), use // 2 & 1)
    acc = gl.zeros([64, PIECE], gl.float32, layout)
    # With 64 queries a step the warpgroups share the columns of dQ, with 128 its rows.
    for half in gl.static_range(2):
        piece = (use % 2 * 2 + half) * HALVES + WARPGROUP * (HALVES - 1)
        scores = buffers.pieces.index(piece).permute((1, 0))  # (64 queries, 64 keys)
        piece = half * CHUNKS + WARPGROUP * (CHUNKS - 1)
        keys = buffers.key_pieces.index(piece)  # (64 keys, 64 columns)
        acc = warpgroup_mma(scores, keys, acc, use_acc=half > 0, is_async=True)
    return acc


@gluon.jit
def _hand_over(columns, buffers, acc, use, WARPGROUP: gl.constexpr):
    """Give this warpgroup's part of dQ to the writer."""
    mbarrier.wait(buffers.sum_empty, use & 1 ^ 1)
    buffers.sum_tiles.index(WARPGROUP).store(acc * columns.scale)
    fence_async_shared()
    mbarrier.arrive(buffers.sum_full, count=1)


@gluon.jit
def _step(
    columns, buffers, grad_key, grad_value, use, start, key_start, q_end, kv_end,
    WARPGROUP: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add the queries of a step to dK and dV, and hand over dQ of the step before."""
    BLOCK_M: gl.constexpr = columns.BLOCK_M
    DTYPE: gl.constexpr = buffers.queries.tiles.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    row_layout: gl.constexpr = gl.SliceLayout(0, layout)
    keys = buffers.keys.tiles.index(WARPGROUP + _zero())  # (64, D)
    values = buffers.values.tiles.index(WARPGROUP + _zero())  # (64, D)
    zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, layout)

    buffers.queries.wait_full(use)
    query = buffers.queries.tile(use)  # (M, D)
    grad = buffers.queries.tile(use, 1)  # (M, D)
    if columns.TURNS:
        take_turn(WARPGROUP)
    scores = warpgroup_mma(keys, query.permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))  # (64, M)
    grad_p = zeros + _row_values(buffers, use, row_layout, 1)[None, :]  # -delta, for the product
    grad_p = warpgroup_mma(values, grad.permute((1, 0)), grad_p, is_async=True)
    if columns.TURNS:
        pass_turn(WARPGROUP)
    lse = _row_values(buffers, use, row_layout, 0)  # (M,)
    if MASKED:
        # The first query of the step that sees each key.
        keys_seen = key_start + WARPGROUP * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, layout))
        first = gl.zeros_like(keys_seen)  # (64,)
        if columns.IS_CAUSAL:
            first = keys_seen - (start + kv_end - q_end)
        if columns.MAY_CUT:
            first = gl.where(keys_seen < kv_end, first, BLOCK_M)
        lane = gl.arange(0, BLOCK_M, row_layout)  # (M,)
        scores = gl.where(lane[None, :] >= first[:, None], scores, float("-inf"))
    p = exp2(scores * columns.scale_log2 - lse[None, :])  # (64, M)

    grad_value = warpgroup_mma(operand(p, grad_value, DTYPE), grad, grad_value, is_async=True)
    grad_p = warpgroup_mma_wait(1, deps=(grad_p,))  # (64, M)
    grad_scores = operand(p * grad_p, grad_key, DTYPE)  # (64, M)

    # Both warpgroups have ended the step before, in which they read the slot.
    buffers.queries.wait_empty(use - 1 + buffers.queries.SLOTS)
    slot = (use + 1) % 2
    buffers.scores.index(slot * 2 + WARPGROUP).store(gl.convert_layout(grad_scores, layout))
    # The fence takes as long as a product; were this one ahead of the store, dS would have to wait
    # in more registers.
    query_part = _query_product(columns, buffers, use, WARPGROUP)
    fence_async_shared()
    mbarrier.arrive(buffers.scores_full.index(slot), count=1)
    grad_key = warpgroup_mma(grad_scores, query, grad_key, is_async=True)
    query_part, grad_value = warpgroup_mma_wait(1, deps=(query_part, grad_value))
    _hand_over(columns, buffers, query_part, use, WARPGROUP)
    grad_key = warpgroup_mma_wait(0, deps=(grad_key,))
    buffers.queries.release(use)
    return grad_key, grad_value


@gluon.jit
def _store(buffers, descriptor, grad, batch, head, start, WARPGROUP: gl.constexpr):
    """Write dK or dV of this warpgroup's keys, those that exist, from where its values were."""
    tma.store_wait(0)
    tile = buffers.values.tile(0, WARPGROUP)
    tile.store(grad.to(tile.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(
        descriptor, [batch, head, start, 0], buffers.values.boxes.index(WARPGROUP)
    )


@gluon.jit
def _consumer(columns, buffers, grad_key_desc, grad_value_desc, WARPGROUP: gl.constexpr):
    BLOCK_D: gl.constexpr = buffers.keys.tiles.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    batch, kv_head, key_start, begin, count, _ = columns.place()
    q_end, kv_end = valid_ends(columns, batch)
    grad_key = gl.zeros([KEYS, BLOCK_D], gl.float32, layout)
    grad_value = gl.zeros([KEYS, BLOCK_D], gl.float32, layout)
    mbarrier.arrive(buffers.scores_full.index(0), count=1)
    if columns.TURNS and WARPGROUP == 1:
        pass_turn(1)  # the first turn is the other's
    buffers.keys.wait_full(0)
    buffers.values.wait_full(0)
    use = 0
    member = 0
    while member < columns.GROUP:
        head = kv_head * columns.GROUP + member
        pointer = columns.pointer(batch, head, begin)
        step, clear, last = columns.steps(pointer, count, key_start, q_end, kv_end)
        if columns.IS_CAUSAL or columns.MAY_CUT:
            start = columns.start(pointer, step, last)
            while step < clear:
                next_start = columns.start(pointer, step + 1, last)  # on its way meanwhile
                grad_key, grad_value = _step(
                    columns, buffers, grad_key, grad_value, use, start, key_start, q_end, kv_end,
                    WARPGROUP, True,
                )  # fmt: skip
                start = next_start
                use += 1
                step += 1
        while step < last:
            grad_key, grad_value = _step(
                columns, buffers, grad_key, grad_value, use, 0, key_start, q_end, kv_end,
                WARPGROUP, False,
            )  # fmt: skip
            use += 1
            step += 1
        member += 1
        begin, count = columns.next_column(batch, head + 1, key_start, member, begin, count)
    # Asked for once more, as it would be on the stack, and spill more, if kept all the time.
    batch, kv_head, key_start, _, _, _ = columns.place()
    start = key_start + WARPGROUP * KEYS
    ENDS_FIRST: gl.constexpr = columns.TURNS and WARPGROUP == 0  # the other is half a step behind
    if ENDS_FIRST:
        _store(buffers, grad_value_desc, grad_value, batch, kv_head, start, WARPGROUP)
        _store(buffers, grad_key_desc, grad_key * columns.scale, batch, kv_head, start, WARPGROUP)
    query_part = _query_product(columns, buffers, use, WARPGROUP)
    if not ENDS_FIRST:
        _store(buffers, grad_value_desc, grad_value, batch, kv_head, start, WARPGROUP)
    query_part = warpgroup_mma_wait(0, deps=(query_part,))
    _hand_over(columns, buffers, query_part, use, WARPGROUP)
    if not ENDS_FIRST:
        _store(buffers, grad_key_desc, grad_key * columns.scale, batch, kv_head, start, WARPGROUP)
    tma.store_wait(0)


# Writer


@gluon.jit
def _writer(columns, buffers, sums, sum_desc):
    """Add the parts of dQ to the sums in memory; rows past the last one are cut."""
    batch, kv_head, key_start, begin, count, _ = columns.place()
    q_end, kv_end = valid_ends(columns, batch)
    mbarrier.wait(buffers.sum_full, 0)
    mbarrier.arrive(buffers.sum_empty, count=1)
    sums.wait_cleared()
    use = 1
    member = 0
    while member < columns.GROUP:
        head = kv_head * columns.GROUP + member
        pointer = columns.pointer(batch, head, begin)
        step, _, last = columns.steps(pointer, count, key_start, q_end, kv_end)
        while step < last:
            row = columns.start(pointer, step, last)
            mbarrier.wait(buffers.sum_full, use & 1)
            add_to_global(sum_desc, [batch, head, row, 0], buffers.sum_boxes.index(0))
            # The second warpgroup has the other rows, or the other columns.
            if columns.BLOCK_M == 64:
                add_to_global(sum_desc, [batch, head, row, PIECE], buffers.sum_boxes.index(1))
            else:
                add_to_global(sum_desc, [batch, head, row + 64, 0], buffers.sum_boxes.index(1))
            tma.store_wait(0)
            mbarrier.arrive(buffers.sum_empty, count=1)
            use += 1
            step += 1
        member += 1
        begin, count = columns.next_column(batch, head + 1, key_start, member, begin, count)
    sums.tell_added()


# Caretaker


@gluon.jit
def _caretaker(buffers, sums, rows_desc):
    """Clear and round shares of other sums."""
    sums.clear_and_round(rows_desc, buffers.old_boxes, buffers.old_tiles, buffers.old_full)


@gluon.jit(do_not_specialize=(*LENGTHS, "kv_heads", *UNITS))
def _backward_kernel(
    query_desc, key_desc, value_desc, grad_desc, rows_desc, sum_desc, grad_key_desc,
    grad_value_desc, old_desc, sums_ptr, grad_query_ptr, counters_ptr,
    order_ptr, offsets_ptr, rows_ptr, kv_lens_ptr, q_lens_ptr,
    count_stride_b, count_stride_h, index_stride_b, index_stride_h,
    kv_heads, q_len, kv_len, kv_tiles, scale_log2, scale,
    units, lead, programs, unit_rows, all_rows,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_Q: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, MAY_CUT: gl.constexpr,
    LISTED: gl.constexpr, HAS_KV_LENS: gl.constexpr, HAS_Q_LENS: gl.constexpr, TURNS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    # Each warpgroup takes one half of dQ: of its rows, or of its columns.
    gl.static_assert(BLOCK_M * BLOCK_D == 8192)
    columns = Columns(
        order_ptr, offsets_ptr, rows_ptr, kv_lens_ptr, q_lens_ptr,
        count_stride_b, count_stride_h, index_stride_b, index_stride_h,
        kv_heads, q_len, kv_len, kv_tiles, scale_log2, scale, GROUP, BLOCK_M, BLOCK_Q,
        IS_CAUSAL, MAY_CUT, LISTED, HAS_KV_LENS, HAS_Q_LENS, TURNS,
    )  # fmt: skip
    sums = Sums(
        sums_ptr, grad_query_ptr, counters_ptr, units, lead, programs, unit_rows, all_rows,
        HEAD_DIM,
    )  # fmt: skip
    dtype: gl.constexpr = query_desc.dtype
    keys = ring(key_desc, 1, 2, KEYS, BLOCK_D, 0)
    piece_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, PIECE], dtype)
    score_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_M], dtype)
    scores = gl.allocate_shared_memory(dtype, [4, KEYS, BLOCK_M], score_layout)
    row_boxes = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, BLOCK_M], rows_desc.layout)
    sum_boxes = gl.allocate_shared_memory(gl.float32, [2, 1, 1, 64, PIECE], sum_desc.layout)
    sum_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, PIECE], gl.float32)
    old_boxes = gl.allocate_shared_memory(gl.float32, [2, 64, PIECE], old_desc.layout)
    buffers = Buffers(
        keys,
        ring(value_desc, 1, 2, KEYS, BLOCK_D, 0),
        ring(query_desc, STAGES, 2, BLOCK_M, BLOCK_D, 2),
        row_boxes,
        row_boxes._reinterpret(
            gl.float32, [2 * STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0])
        ),
        scores,
        scores._reinterpret(dtype, [4 * BLOCK_M // PIECE, KEYS, PIECE], piece_layout),
        barriers(2, 2),
        keys.boxes._reinterpret(dtype, [2 * BLOCK_D // PIECE, KEYS, PIECE], piece_layout),
        sum_boxes,
        sum_boxes._reinterpret(gl.float32, [2, 64, PIECE], sum_layout),
        barriers(1, 2).index(0),
        barriers(1, 1).index(0),
        old_boxes,
        old_boxes._reinterpret(gl.float32, [2, 64, PIECE], sum_layout),
        barriers(2, 1),
    )
    wait_for_last(True)  # for the order, the statistics and the sums
    may_start_next(True)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    produce = columns, buffers, query_desc, key_desc, value_desc, grad_desc, rows_desc
    gl.warp_specialize(
        [
            (_consumer, (columns, buffers, grad_key_desc, grad_value_desc, FIRST)),
            (_consumer, (columns, buffers, grad_key_desc, grad_value_desc, SECOND)),
            (_producer, produce),
            (_writer, (columns, buffers, sums, sum_desc)),
            (_caretaker, (buffers, sums, old_desc)),
        ],
        [4, 1, 1, WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )


# Launcher


def _row_descriptor(statistics: Tensor, length: int) -> TensorDescriptor:
    """Of the (.., length) pieces of the rows of a contiguous fp32 tensor, taken as 2D."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor.from_tensor(statistics.flatten(0, -2), [1, length], layout)


def _sum_descriptor(sums: Tensor) -> TensorDescriptor:
    """Of (64, 64) tiles of contiguous fp32, (B, H, N, D) or (rows, D)."""
    rank = sums.dim()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=rank)
    return TensorDescriptor.from_tensor(sums, [1] * (rank - 2) + [64, PIECE.value], layout)


def unsupported(
    grad_out: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    block_size: tuple[int, int],
    scale: float,
    *,
    window: int,
    entropy: bool,
) -> str | None:
    """Why this kernel cannot take a call, or None if it can. Never waits for the device."""
    if block_size[0] % 128 or block_size[1] != BLOCK_N.value:
        return f"it has tiles for blocks of 128 keys and multiples of 128 queries, not {block_size}"
    if window > 0 or entropy:
        return "it has no window and no gradients of entropies"
    if grad_out is None or value is None:
        return "there must be a gradient of the output"
    problem = forward.unsupported(query, key, value, block_size, scale)
    if problem is None and not has_copy_engine("sm90", grad_out):
        return "the copy engine needs the gradient at multiples of 16 bytes, in address and strides"
    return problem


def hopper_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    columns: tuple[Tensor, Tensor] | None,
    block_size: tuple[int, int],
    is_causal: bool,
    scale: float,
    config: HopperBackwardConfig | None = None,
    *,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    after_lists: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel and what it needs, for calls that `unsupported` has nothing against.

    Args:
        out, lse, grad_lse: as `backward_statistics.row_statistics` takes them.
        columns: the transposed lists in CSR form, as `block_sparse_backward` takes them, fewer than
            2^31 entries a head; those past the last offset are not read.
        kv_lens, q_lens: (B,) int32 valid lengths, or None.
        after_lists: see `row_statistics`.

    Returns:
        dQ, dK, dV, contiguous, in the dtype of the inputs.
    """
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), grad_key.zero_(), grad_value.zero_()
    offsets, rows = adjacent_lists(*columns) if columns is not None else (None, None)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    kv_tiles = ceil_div(key.shape[2], BLOCK_N.value)
    config = config or hopper_backward_config(query.shape[3], kv_tiles, is_causal)
    multiprocessors, _ = device_limits(query.get_device())
    units = divide(
        key.shape[0] * key.shape[1], kv_tiles,
        query.shape[1] // key.shape[1] * query.shape[2],
        int(config.unit * multiprocessors), config.lead,
    )  # fmt: skip
    sums, counters, cleared = allocate(query, units)
    order = None
    if offsets is not None:
        order = backward_order(
            query, key, offsets, rows, units.heads, block_size[0], is_causal, kv_lens, q_lens
        )
    statistics = row_statistics(
        out, grad_out, lse, grad_lse, *[None] * 5, block_size[0], scale,
        negative=True, cleared=cleared, after_lists=after_lists,
    )  # fmt: skip
    tensors = (
        query, key, value, grad_out, statistics, sums, grad_key, grad_value,
        sums, sums, grad_query, counters,
    )  # fmt: skip
    integers = (order, offsets, rows, kv_lens, q_lens)
    launch = _plan_backward(
        *tensors[:8], *integers, units, block_size[0], is_causal, scale, config
    )  # fmt: skip
    launch(*tensors, *(counters if x is None else x for x in integers))
    round_last(sums, counters, grad_query, units)
    return grad_query, grad_key, grad_value


@planned
def _plan_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    statistics: Tensor,
    sums: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    rows: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    units: Units,
    block_q: int,
    is_causal: bool,
    scale: float,
    config: HopperBackwardConfig,
) -> Launch:
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    block_d = 64 if head_dim <= 64 else 128
    strides = list_strides(offsets, rows)
    kv_tiles = ceil_div(kv_len, BLOCK_N.value)
    _, *registers = REGISTERS[1]
    row_sides = ((0, query), (3, grad_out))
    key_sides = ((1, key), (2, value), (6, grad_key), (7, grad_value))
    return Launch(
        _backward_kernel, (kv_tiles * batch * kv_heads,),
        (
            *strides[:2], *strides[3:5],
            kv_heads, q_len, kv_len, kv_tiles, exponent_scale(scale), scale,
            units.count, units.lead, units.programs, units.rows, batch * heads * q_len,
        ),
        described={
            **{n: descriptor(tensor, config.block_m, block_d) for n, tensor in row_sides},
            **{n: descriptor(tensor, KEYS.value, block_d) for n, tensor in key_sides},
            4: _row_descriptor(statistics, config.block_m), 5: _sum_descriptor(sums),
            8: _sum_descriptor(sums.view(-1, head_dim)),
        },
        GROUP=heads // kv_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m,
        BLOCK_Q=block_q, STAGES=config.stages, IS_CAUSAL=is_causal,
        MAY_CUT=kv_lens is not None or kv_len % BLOCK_N.value != 0,
        LISTED=rows is not None,
        HAS_KV_LENS=kv_lens is not None, HAS_Q_LENS=q_lens is not None,
        TURNS=config.turns,
        CONSUMER_REGISTERS=registers[0], PRODUCER_REGISTERS=registers[1],
        launch_pdl=True, num_warps=4,
    )  # fmt: skip
