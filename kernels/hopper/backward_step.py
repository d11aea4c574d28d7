"""A step of the Hopper backward: what a warpgroup of 64 keys does with the queries of a slot.

See `backward` for the order of a step and for what the partitions tell each other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from entropy_attn.kernels.hopper.columns import KEYS, PIECE
from entropy_attn.kernels.hopper.primitives import (
    exp2,
    operand,
    pass_turn,
    phase_of,
    slot_of,
    take_turn,
)
from entropy_attn.kernels.hopper.sum_tiles import in_order


@gluon.jit
def _anew(x):
    """x, of which the compiler does not know that it is the same in each step.

    It would compute the descriptors of keys and values before the loop, all sixteen, and as they do
    not fit the registers, load them from the stack in each step, in front of the products.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1
    )


@gluon.jit
def query_product(columns, buffers, turn, use, WARPGROUP: gl.constexpr):
    """Start this warpgroup's part of dQ, (64, 64), from slot ``use`` of dS and a column's keys."""
    CHUNKS: gl.constexpr = buffers.keys.tiles.shape[2] // PIECE  # of a row of keys
    HALVES: gl.constexpr = columns.BLOCK_M // 64  # of a row of dS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    mbarrier.wait(buffers.scores_full.index(slot_of(use, 2)), phase_of(use, 2))
    # With 64 queries a step the warpgroups share the columns of dQ, with 128 its rows.
    scores = buffers.pieces.index(slot_of(use, 2) * HALVES + WARPGROUP * (HALVES - 1))
    keys = buffers.key_pieces.index(
        slot_of(turn, buffers.keys.SLOTS) * CHUNKS + WARPGROUP * (CHUNKS - 1)
    )  # (128, 64)
    acc = gl.zeros([64, PIECE], gl.float32, layout)
    return warpgroup_mma(scores.permute((1, 0)), keys, acc, use_acc=False, is_async=True)


@gluon.jit
def hand_over(columns, buffers, acc, use, WARPGROUP: gl.constexpr):
    """Give this warpgroup's part of dQ to the writer."""
    mbarrier.wait(buffers.sum_empty, phase_of(use, 1) ^ 1)
    buffers.sum_tiles.index(WARPGROUP).store(in_order(acc * columns.scale))
    fence_async_shared()
    mbarrier.arrive(buffers.sum_full, count=1)


@gluon.jit
def take_step(
    columns, buffers, grad_key, grad_value, turn, first_use, use, start, key_start, q_end, kv_end,
    WARPGROUP: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add the queries of a step to dK and dV, and hand over dQ of the step before.

    In a column's first step that is dQ of the column before, whose keys are given back then; values
    too, if there are two slots of them.
    """
    BLOCK_M: gl.constexpr = columns.BLOCK_M
    DTYPE: gl.constexpr = buffers.queries.tiles.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    row_layout: gl.constexpr = gl.SliceLayout(0, layout)
    keys = buffers.keys.tile(_anew(turn)).slice(WARPGROUP * KEYS, KEYS)  # (64, D)
    if buffers.values.SLOTS > 1:
        values = buffers.values.tile(_anew(turn), WARPGROUP)  # (64, D)
    else:  # the slot is known, so that the tile has to look new
        values = buffers.values.tiles.index(_anew(gl.to_tensor(WARPGROUP)))  # (64, D)
    zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, layout)

    buffers.queries.wait_full(use)
    query = buffers.queries.tile(use)  # (M, D)
    grad = buffers.queries.tile(use, 1)  # (M, D)
    if columns.TURNS:
        take_turn(WARPGROUP)
    scores = warpgroup_mma(keys, query.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if use == first_use:
        buffers.values.wait_full(turn)
    scores = warpgroup_mma_wait(0, deps=(scores,))  # (64, M)
    grad_p, _ = gl.broadcast(buffers.rows(use, row_layout, 1)[None, :], zeros)
    grad_p = warpgroup_mma(values, grad.permute((1, 0)), grad_p, is_async=True)
    if columns.TURNS:
        pass_turn(WARPGROUP)
    lse = buffers.rows(use, row_layout, 0)  # (M,)
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
    slot = slot_of(use + 1, 2)
    half = buffers.scores.index(slot).slice(WARPGROUP * KEYS, KEYS)
    half.store(gl.convert_layout(grad_scores, layout))
    # The fence takes as long as a product; were this one ahead of the store, dS would have to wait
    # in more registers.
    is_first = use == first_use
    query_part = query_product(columns, buffers, turn - is_first, use, WARPGROUP)
    fence_async_shared()
    mbarrier.arrive(buffers.scores_full.index(slot), count=1)
    grad_key = warpgroup_mma(grad_scores, query, grad_key, is_async=True)
    query_part, grad_value = warpgroup_mma_wait(1, deps=(query_part, grad_value))
    hand_over(columns, buffers, query_part, use, WARPGROUP)
    if is_first & (turn > 0):
        buffers.keys.release(turn - 1)
        if buffers.values.SLOTS > 1:
            tma.store_wait(0)
            buffers.values.release(turn - 1)
    grad_key = warpgroup_mma_wait(0, deps=(grad_key,))
    buffers.queries.release(use)
    return grad_key, grad_value


@gluon.jit
def store_gradient(buffers, descriptor, grad, turn, batch, head, start, WARPGROUP: gl.constexpr):
    """Write dK or dV of this warpgroup's keys, those that exist, from where its values were."""
    tma.store_wait(0)
    tile = buffers.values.tile(turn, WARPGROUP)
    tile.store(grad.to(tile.dtype))
    fence_async_shared()
    boxes = buffers.values.boxes.index(slot_of(turn, buffers.values.SLOTS) * 2 + WARPGROUP)
    tma.async_copy_shared_to_global(descriptor, [batch, head, start, 0], boxes)
