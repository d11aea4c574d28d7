"""Block-sparse attention, backward, for Hopper (sm_90a): one pass over the scores, in Gluon.

The same sums as `entropy_attn.kernels.block_sparse_backward`, without entropies and windows. With
P = exp(S - lse), dP = dO V^T, delta_i = dO_i . O_i - dlse_i:
    dS = P * (dP - delta),  dV = P^T dO,  dK = scale * dS^T Q,  dQ = scale * dS K.

An item is a column: a block of 128 keys, with the queries that list it (the transposed lists,
CSR) in all query heads of its group. Two warpgroups of 64 keys each hold their part of dK and dV
in registers; a producer warp feeds rings of keys, of values, and of queries with their gradients,
each row's lse and -delta, through the copy engine. Scores are computed once, transposed, so that
P^T and dS^T are left operands in the registers where they are. A step is in `backward_step`.

Programs are persistent. The producer claims an item when it has fetched all queries of the one
before, and announces it to the others; there are two slots for what an item is. Of lists, the
longest columns of a few heads come first (`order.backward_order`).

dQ is the sum of the columns' parts: dS goes through shared memory, as each warpgroup needs both
halves of the keys, and a third kind of warp, the writer, lets the copy engine add the product to
fp32 sums in memory (as in FlashAttention-3, Shah et al., arXiv 2407.08608). The order of these
additions is not fixed. dQ of a step is computed at the end of the step after, so that a warpgroup
does not wait for what the other does at the same time. Two more warps, the caretaker, clear and
round the sums of other heads meanwhile (`sums`).

Memory and barriers (`backward_memory`). `Ring` is described in `primitives`. For dS a slot is
filled by both warpgroups, each its half, and read by both:
    step s:  S(s) | dP(s) | P, dV(s) | dS into slot s + 1 | dQ(s - 1) from slot s, dK(s)
Slot 0 counts as full at the start, with anything in it: the writer drops what comes of it. A slot
is free for dS once both warpgroups have released the queries of the step before, in which they read
it. Steps are counted over all columns, so that dQ of a column's last step is computed in the first
step of the next column, with the keys of the one before; these are given back then, and there are
two slots of them. dV and dK leave through the memory of the column's values, which are given back
when that is done.

Every column takes a step at least: one of no queries if nobody lists it.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from entropy_attn.kernels.backward_statistics import row_statistics
from entropy_attn.kernels.hopper import forward
from entropy_attn.kernels.hopper.backward_memory import allocate_buffers
from entropy_attn.kernels.hopper.backward_step import (
    hand_over,
    query_product,
    store_gradient,
    take_step,
)
from entropy_attn.kernels.hopper.columns import BLOCK_N, KEYS, Columns
from entropy_attn.kernels.hopper.config import (
    REGISTERS,
    HopperBackwardConfig,
    hopper_backward_config,
)
from entropy_attn.kernels.hopper.forward import descriptor
from entropy_attn.kernels.hopper.order import backward_order
from entropy_attn.kernels.hopper.primitives import (
    NO_ITEM,
    pass_turn,
    phase_of,
    slot_of,
    valid_ends,
)
from entropy_attn.kernels.hopper.sums import (
    UNITS,
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


@gluon.jit
def _counter():
    """0, unsigned: the remainder by two slots is one instruction then."""
    return gl.to_tensor(0).to(gl.uint32)


# Producer


@gluon.jit
def _fetch(buffers, use, query_desc, grad_desc, rows_desc, batch, head, start, row):
    """Fill a slot with queries, their gradients, lse and -delta."""
    ring = buffers.queries
    ROWS: gl.constexpr = ring.boxes.shape[3]
    BYTES: gl.constexpr = 2 * ROWS * (2 * ring.boxes.shape[4] + 4)
    ring.wait_empty(use)
    slot = slot_of(use, ring.SLOTS)
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
def _producer(
    columns, buffers, sums, query_desc, key_desc, value_desc, grad_desc, rows_desc
):  # fmt: skip
    turn = _counter()  # items so far
    use = _counter()  # steps so far
    item = sums.claim()
    while item != NO_ITEM:
        column, begin, count, first_row = columns.entry(item)
        batch, kv_head, key_start = columns.place(column)
        buffers.keys.wait_empty(turn)
        buffers.keys.fetch(turn, key_desc, batch, kv_head, key_start, key_start)
        buffers.await_item_slot(turn)
        buffers.items.announce(turn, item, column, begin, count, 0, 0)
        q_end, kv_end = valid_ends(columns, batch)
        first_use = use
        member = 0
        while member < columns.GROUP:
            head = kv_head * columns.GROUP + member
            row = 2 * (batch * columns.kv_heads * columns.GROUP + head)
            pointer = columns.pointer(batch, head, begin)
            step, _, last = columns.steps(pointer, count, key_start, q_end, kv_end)
            end = columns.end(step, last, member, use == first_use)
            start = columns.first_start(pointer, step, last, first_row)
            while step < end:
                next_start = columns.start(pointer, step + 1, last)  # on its way meanwhile
                _fetch(buffers, use, query_desc, grad_desc, rows_desc, batch, head, start, row)
                if use == first_use:
                    buffers.values.wait_empty(turn)
                    buffers.values.fetch(
                        turn, value_desc, batch, kv_head, key_start, key_start + KEYS
                    )
                use += 1
                step += 1
                start = next_start
            member += 1
            begin, count = columns.next_column(batch, head + 1, key_start, member, begin, count)
        turn += 1
        # Not before: who claims early takes what another program would begin sooner.
        item = sums.claim()
    buffers.await_item_slot(turn)
    buffers.items.announce(turn, item, 0, 0, 0, 0, 0)


# Consumers


@gluon.jit
def _consumer(columns, buffers, grad_key_desc, grad_value_desc, WARPGROUP: gl.constexpr):
    BLOCK_D: gl.constexpr = buffers.keys.tiles.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    mbarrier.arrive(buffers.scores_full.index(0), count=1)
    if columns.TURNS and WARPGROUP == 1:
        pass_turn(1)  # the first turn is the other's
    turn = _counter()
    use = _counter()
    item, column, begin, count, _, _ = buffers.items.read(turn)
    while item != NO_ITEM:
        batch, kv_head, key_start = columns.place(column)
        q_end, kv_end = valid_ends(columns, batch)
        grad_key = gl.zeros([KEYS, BLOCK_D], gl.float32, layout)
        grad_value = gl.zeros([KEYS, BLOCK_D], gl.float32, layout)
        first_use = use
        nobody = False  # lists the column
        buffers.keys.wait_full(turn)
        member = 0
        while member < columns.GROUP:
            head = kv_head * columns.GROUP + member
            pointer = columns.pointer(batch, head, begin)
            step, clear, last = columns.steps(pointer, count, key_start, q_end, kv_end)
            end = columns.end(step, last, member, use == first_use)
            nobody = end > last
            if columns.IS_CAUSAL or columns.MAY_CUT:
                start = columns.start(pointer, step, last)
                while step < clear:
                    next_start = columns.start(pointer, step + 1, last)  # on its way meanwhile
                    grad_key, grad_value = take_step(
                        columns, buffers, grad_key, grad_value, turn, first_use, use, start,
                        key_start, q_end, kv_end, WARPGROUP, True,
                    )  # fmt: skip
                    start = next_start
                    use += 1
                    step += 1
            while step < end:
                grad_key, grad_value = take_step(
                    columns, buffers, grad_key, grad_value, turn, first_use, use, 0,
                    key_start, q_end, kv_end, WARPGROUP, False,
                )  # fmt: skip
                use += 1
                step += 1
            member += 1
            begin, count = columns.next_column(batch, head + 1, key_start, member, begin, count)
        # Read once more, as it would be on the stack, and spill more, if kept all the time.
        _, column, _, _, _, _ = buffers.items.read(turn)
        buffers.give_item_back(turn)
        batch, kv_head, key_start = columns.place(column)
        start = key_start + WARPGROUP * KEYS
        # Also of keys that are no numbers, as padding may be.
        grad_value = gl.where(nobody, 0.0, grad_value)
        grad_key = gl.where(nobody, 0.0, grad_key * columns.scale)
        store_gradient(buffers, grad_value_desc, grad_value, turn, batch, kv_head, start, WARPGROUP)
        store_gradient(buffers, grad_key_desc, grad_key, turn, batch, kv_head, start, WARPGROUP)
        if buffers.values.SLOTS == 1:
            tma.store_wait(0)
            buffers.values.release(turn)
        turn += 1
        item, column, begin, count, _, _ = buffers.items.read(turn)
    query_part = query_product(columns, buffers, turn - 1, use, WARPGROUP)
    query_part = warpgroup_mma_wait(0, deps=(query_part,))
    hand_over(columns, buffers, query_part, use, WARPGROUP)
    tma.store_wait(0)


# Writer


@gluon.jit
def _writer(columns, buffers, sums, sum_desc):
    """Add the parts of dQ to the sums in memory."""
    mbarrier.wait(buffers.sum_full, 0)
    mbarrier.arrive(buffers.sum_empty, count=1)
    turn = _counter()
    use = _counter() + 1
    head_steps = (columns.q_len + columns.BLOCK_M - 1) // columns.BLOCK_M
    item, column, begin, count, _, _ = buffers.items.read(turn)
    while item != NO_ITEM:
        buffers.give_item_back(turn)
        batch, kv_head, key_start = columns.place(column)
        q_end, kv_end = valid_ends(columns, batch)
        sums.wait_cleared(item)
        first_use = use
        member = 0
        while member < columns.GROUP:
            head = kv_head * columns.GROUP + member
            pointer = columns.pointer(batch, head, begin)
            step, _, last = columns.steps(pointer, count, key_start, q_end, kv_end)
            end = columns.end(step, last, member, use == first_use)
            while step < end:
                row = columns.start(pointer, step, last)
                mbarrier.wait(buffers.sum_full, phase_of(use, 1))
                if row < columns.q_len:  # else it is a step of no queries
                    place = (batch * columns.kv_heads * columns.GROUP + head) * head_steps
                    place += row // columns.BLOCK_M
                    add_to_global(sum_desc, [place, 0, 0], buffers.sum_box)
                tma.store_wait(0)
                mbarrier.arrive(buffers.sum_empty, count=1)
                use += 1
                step += 1
            member += 1
            begin, count = columns.next_column(batch, head + 1, key_start, member, begin, count)
        sums.tell_added(item)
        turn += 1
        item, column, begin, count, _, _ = buffers.items.read(turn)


# Caretaker


@gluon.jit
def _caretaker(buffers, sums):
    """Clear and round shares of other sums."""
    turn = _counter()
    item, _, _, _, _, _ = buffers.items.read(turn)
    while item != NO_ITEM:
        buffers.give_item_back(turn)
        sums.clear_and_round(item)
        turn += 1
        item, _, _, _, _, _ = buffers.items.read(turn)


@gluon.jit(do_not_specialize=(*LENGTHS, "kv_heads", *UNITS))
def _backward_kernel(
    query_desc, key_desc, value_desc, grad_desc, rows_desc, sum_desc, grad_key_desc,
    grad_value_desc, sums_ptr, grad_query_ptr, counters_ptr,
    order_ptr, offsets_ptr, rows_ptr, kv_lens_ptr, q_lens_ptr,
    count_stride_b, count_stride_h, index_stride_b, index_stride_h,
    kv_heads, q_len, kv_len, kv_tiles, scale_log2, scale,
    units, lead, unit_items, all_items, head_strips, unit_strips, all_strips,
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
        sums_ptr, grad_query_ptr, counters_ptr, units, lead, unit_items, all_items, q_len,
        head_strips, unit_strips, all_strips, HEAD_DIM,
    )  # fmt: skip
    buffers = allocate_buffers(
        query_desc, key_desc, value_desc, rows_desc, sum_desc, STAGES, BLOCK_M, BLOCK_D
    )  # fmt: skip
    wait_for_last(True)  # for the order, the statistics and the sums
    may_start_next(True)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    produce = columns, buffers, sums, query_desc, key_desc, value_desc, grad_desc, rows_desc
    gl.warp_specialize(
        [
            (_consumer, (columns, buffers, grad_key_desc, grad_value_desc, FIRST)),
            (_consumer, (columns, buffers, grad_key_desc, grad_value_desc, SECOND)),
            (_producer, produce),
            (_writer, (columns, buffers, sums, sum_desc)),
            (_caretaker, (buffers, sums)),
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
    """Of what a step adds to, in contiguous fp32, (steps, 64, 128)."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    return TensorDescriptor.from_tensor(sums, [1, *sums.shape[1:]], layout)


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
    config = config or hopper_backward_config(query.shape[3], is_causal)
    multiprocessors, _ = device_limits(query.get_device())
    units = divide(
        key.shape[0] * key.shape[1], query.shape[1] // key.shape[1], kv_tiles,
        ceil_div(query.shape[2], config.block_m), int(config.unit * multiprocessors), config.lead,
    )  # fmt: skip
    sums, counters, cleared = allocate(units, query.device)
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
        sums, grad_query, counters,
    )  # fmt: skip
    integers = (order, offsets, rows, kv_lens, q_lens)
    launch = _plan_backward(
        *tensors[:8], *integers, units, multiprocessors, block_size[0], is_causal, scale, config
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
    multiprocessors: int,
    block_q: int,
    is_causal: bool,
    scale: float,
    config: HopperBackwardConfig,
) -> Launch:
    _, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    block_d = 64 if head_dim <= 64 else 128
    strides = list_strides(offsets, rows)
    kv_tiles = ceil_div(kv_len, BLOCK_N.value)
    _, *registers = REGISTERS[1]
    row_sides = ((0, query), (3, grad_out))
    value_sides = ((2, value), (6, grad_key), (7, grad_value))
    return Launch(
        _backward_kernel, (min(units.all_items, multiprocessors),),
        (
            *strides[:2], *strides[3:5],
            kv_heads, q_len, kv_len, kv_tiles, exponent_scale(scale), scale,
            *units.numbers(),
        ),
        described={
            **{n: descriptor(tensor, config.block_m, block_d) for n, tensor in row_sides},
            1: descriptor(key, BLOCK_N.value, block_d),
            **{n: descriptor(tensor, KEYS.value, block_d) for n, tensor in value_sides},
            4: _row_descriptor(statistics, config.block_m), 5: _sum_descriptor(sums),
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
