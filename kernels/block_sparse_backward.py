"""Block-sparse attention, backward: no atomics, so the gradients are the same in every run.

With P = exp(S - lse), dP = dO V^T and delta_i = dO_i . O_i - dlse_i:
    dS = P * (dP - delta),  dQ = scale * dS K,  dK = scale * dS^T Q,  dV = P^T dO.
(FlashAttention-2, Dao, arXiv 2307.08691; dlse enters through delta: d lse_i / d S_ij = P_ij.)
Gradients of the entropies add terms to delta and, in the brackets, - gR_i S_ij - gB_i log P_i,B(j)
+ g_A,B(j): see `kernels/backward_statistics.py`, which leaves lse, delta and gR, gB of each row.
Without a gradient of the output (HAS_OUT) there are only those: no dP, no dV, no need of values.
Two kernels: dK and dV by one program a block of keys, which walks over the queries that list it
(the transposed lists, CSR) in all query heads of its group; dQ by one program a block of queries.
P is computed twice, and in return nothing is accumulated through memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.backward_config import BackwardConfig, backward_config
from entropy_attn.kernels.launch import (
    LENGTHS,
    adjacent_lists,
    architecture,
    ceil_div,
    has_copy_engine,
    list_strides,
    padded_head_dim,
    row_descriptor,
    tile_descriptor,
)
from entropy_attn.kernels.plans import Launch, dot_precision, planned
from entropy_attn.kernels.primitives import (
    LOG2_E,
    block_start,
    count_below,
    head_base,
    load_box,
    load_tile,
    log_mass_of_block,
    log_mass_of_columns,
    program_tile,
    store_tile,
    tile_blocks,
    tile_offsets,
    valid_length,
    visible_columns,
    visible_scores,
)


@triton.jit
def _visit_queries(
    grad_key, grad_value, key, value, keys, batch, head, query_base, grad_base, statistics_source,
    key_base, terms, stride_qn, stride_qd, stride_gn, stride_gd, stride_kn, stride_kd, term_stride,
    list_pointer, first, last, count, statistics_row, q_len, kv_end, kv_len, padded_len, diagonal,
    window, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr, MASK_ROWS: tl.constexpr,
    MAY_CUT: tl.constexpr, MASKED: tl.constexpr, ROW_ENTROPY: tl.constexpr,
    BLOCK_ENTROPY: tl.constexpr, TILE_ENTROPY: tl.constexpr, HAS_OUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the query blocks in slots [first, last) of a column's list to dK and dV.

    ``terms`` points to g_AB of the block of keys and of the query block in slot 0.
    DESCRIPTORS: ``query_base``, ``grad_base`` and ``statistics_source`` are descriptors of the
    whole tensors; else they point to the head's rows, the last one to all statistics.
    """
    STEPS: tl.constexpr = BLOCK_Q // BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    if not DESCRIPTORS:
        query_offsets = tile_offsets(lane, stride_qn, BLOCK_D, stride_qd)  # (M, D)
        if HAS_OUT:
            grad_offsets = tile_offsets(lane, stride_gn, BLOCK_D, stride_gd)  # (M, D)
        lse_base = statistics_source + statistics_row.to(tl.int64) * padded_len
        delta_base = lse_base + padded_len
    next_start = block_start(list_pointer, first, count, LISTED, BLOCK_Q)
    for step in range(first * STEPS, last * STEPS):
        start = next_start + (step % STEPS) * BLOCK_M
        rows = start + lane  # (M,)
        next_start = block_start(list_pointer, (step + 1) // STEPS, count, LISTED, BLOCK_Q)
        if DESCRIPTORS:
            query = load_box(query_base, batch, head, start, BLOCK_M, BLOCK_D)  # (M, D)
            lse = tl.reshape(statistics_source.load([statistics_row, start]), (BLOCK_M,))
        else:
            query_pointers = query_base + start.to(tl.int64) * stride_qn + query_offsets
            query = load_tile(query_pointers, rows, q_len, HEAD_DIM, BLOCK_D, MASK_ROWS)  # (M, D)
            lse = tl.load(lse_base + rows)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # (N, M)
        raw_scores = scores
        if MASKED:
            scores = visible_columns(scores, rows, keys, diagonal, window, HAS_WINDOW)
        p = tl.exp2(scores * scale_log2 - lse[None, :])  # (N, M)
        if DESCRIPTORS:
            if HAS_OUT:
                grad = load_box(grad_base, batch, head, start, BLOCK_M, BLOCK_D)  # (M, D)
            delta = tl.reshape(statistics_source.load([statistics_row + 1, start]), (BLOCK_M,))
        else:
            if HAS_OUT:
                grad_pointers = grad_base + start.to(tl.int64) * stride_gn + grad_offsets
                grad = load_tile(grad_pointers, rows, q_len, HEAD_DIM, BLOCK_D, MASK_ROWS)  # (M, D)
            delta = tl.load(delta_base + rows)
        if BLOCK_ENTROPY:
            if DESCRIPTORS:
                grad_block = statistics_source.load([statistics_row + 2 + ROW_ENTROPY, start])
                grad_block = tl.reshape(grad_block, (BLOCK_M,))
            else:
                grad_block = tl.load(lse_base + (2 + ROW_ENTROPY) * padded_len + rows)
            delta += grad_block * log_mass_of_columns(
                p, query, lse, rows, keys, key_base, stride_kn, stride_kd, kv_end, kv_len,
                diagonal, window, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, HAS_WINDOW,
                MAY_CUT, MASKED, PRECISION,
            )  # fmt: skip
        if TILE_ENTROPY:
            delta -= tl.load(terms + step // STEPS * term_stride)
        # dP is issued before dV, so that dS is computed while the product for dV runs.
        if ROW_ENTROPY:
            # The scores die in what dP is added to: no further tile is held in registers.
            if DESCRIPTORS:
                grad_row = statistics_source.load([statistics_row + 2, start])
                grad_row = tl.reshape(grad_row, (BLOCK_M,))
            else:
                grad_row = tl.load(lse_base + 2 * padded_len + rows)
            grad_p = -delta[None, :] - grad_row[None, :] * raw_scores
            if HAS_OUT:
                grad_p = tl.dot(value, tl.trans(grad), grad_p, input_precision=PRECISION)  # (N, M)
        elif HAS_OUT:
            grad_p = tl.dot(value, tl.trans(grad), input_precision=PRECISION)  # (N, M)
        if HAS_OUT:
            grad_value = tl.dot(p.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
        if ROW_ENTROPY:
            grad_scores = p * grad_p
        elif HAS_OUT:
            grad_scores = p * (grad_p - delta[None, :])
        else:
            grad_scores = -p * delta[None, :]
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=LENGTHS)
def _key_value_kernel(
    query_source, key_ptr, value_ptr, grad_source, statistics_source, terms_ptr,
    grad_key_ptr, grad_value_ptr, offsets_ptr, rows_ptr, kv_lens_ptr, q_lens_ptr,
    query_strides, key_strides, value_strides, grad_out_strides, grad_key_strides,
    count_stride_b, count_stride_h, count_stride_t, index_stride_b, index_stride_h, index_stride_t,
    heads, kv_heads, q_len, kv_len, padded_len, kv_tiles, window, scale, terms_a_head, term_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr,
    MASK_ROWS: tl.constexpr, MAY_CUT: tl.constexpr, HAS_KV_LENS: tl.constexpr,
    HAS_Q_LENS: tl.constexpr, ROW_ENTROPY: tl.constexpr, BLOCK_ENTROPY: tl.constexpr,
    TILE_ENTROPY: tl.constexpr, HAS_OUT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % kv_tiles
    batch = program // kv_tiles // kv_heads
    kv_head = program // kv_tiles % kv_heads

    kv_end = valid_length(kv_lens_ptr, batch, kv_len, HAS_KV_LENS)
    q_end = valid_length(q_lens_ptr, batch, q_len, HAS_Q_LENS)
    diagonal = kv_end - q_end
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # (N,)
    key_base = head_base(key_ptr, batch, kv_head, key_strides[0], key_strides[1])
    key_pointers = key_base + tile_offsets(keys, key_strides[2], BLOCK_D, key_strides[3])
    key = load_tile(key_pointers, keys, kv_len, HEAD_DIM, BLOCK_D, True)  # (N, D)
    value = key
    if HAS_OUT:
        value_base = head_base(value_ptr, batch, kv_head, value_strides[0], value_strides[1])
        value_offsets = tile_offsets(keys, value_strides[2], BLOCK_D, value_strides[3])
        value = load_tile(value_base + value_offsets, keys, kv_len, HEAD_DIM, BLOCK_D, True)
    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    q_blocks = tl.cdiv(q_len, BLOCK_Q)
    last_key = tile * BLOCK_N + BLOCK_N - 1
    if BLOCK_ENTROPY:
        last_key = tile * BLOCK_N // BLOCK_K * BLOCK_K + BLOCK_K - 1  # masses are of whole blocks

    for member in range(GROUP):
        head = kv_head * GROUP + member
        if LISTED:
            offset_base = (
                head_base(offsets_ptr, batch, head, count_stride_b, count_stride_h)
                + tile * BLOCK_N // BLOCK_K
            )
            begin = tl.load(offset_base)
            count = (tl.load(offset_base + 1) - begin).to(tl.int32)
            list_pointer = head_base(rows_ptr, batch, head, index_stride_b, index_stride_h) + begin
        else:
            count = q_blocks
            list_pointer = rows_ptr
        first = 0
        last = count
        clear = 0
        if tile * BLOCK_N >= kv_end:
            last = 0
        if IS_CAUSAL:
            # Blocks whose last query stands before the first key see nothing of the tile; those
            # whose first query stands at or after the last key see all of it.
            first = tl.maximum(tile * BLOCK_N - diagonal, 0) // BLOCK_Q
            first = tl.minimum(last, count_below(list_pointer, count, first, q_blocks, LISTED))
            clear = tl.cdiv(tl.maximum(last_key - diagonal, 0), BLOCK_Q)
            clear = tl.minimum(last, count_below(list_pointer, count, clear, q_blocks, LISTED))
        if HAS_WINDOW:
            reach = tl.maximum(last_key + window - diagonal, 0)
            reach = tl.cdiv(reach, BLOCK_Q)
            last = tl.minimum(last, count_below(list_pointer, count, reach, q_blocks, LISTED))
            clear = last
        clear = tl.maximum(clear, first)

        terms = terms_ptr
        if TILE_ENTROPY:
            terms += (batch * heads + head).to(tl.int64) * terms_a_head
            if LISTED:
                terms += begin  # they lie in the order of the columns' lists
            else:
                terms += tile * BLOCK_N // BLOCK_K
        statistics_row = (batch * heads + head) * (2 + ROW_ENTROPY + BLOCK_ENTROPY)
        if DESCRIPTORS:
            query_base = query_source
            grad_base = grad_source
        else:
            query_base = head_base(query_source, batch, head, query_strides[0], query_strides[1])
            grad_base = query_base
            if HAS_OUT:
                grad_base = head_base(
                    grad_source, batch, head, grad_out_strides[0], grad_out_strides[1]
                )
        if IS_CAUSAL:
            grad_key, grad_value = _visit_queries(
                grad_key, grad_value, key, value, keys, batch, head, query_base, grad_base,
                statistics_source, key_base, terms, query_strides[2], query_strides[3],
                grad_out_strides[2], grad_out_strides[3], key_strides[2], key_strides[3],
                term_stride.to(tl.int64), list_pointer, first, clear, count, statistics_row,
                q_len, kv_end, kv_len, padded_len, diagonal, window, scale * LOG2_E, HEAD_DIM,
                BLOCK_D, BLOCK_Q, BLOCK_K, BLOCK_M, BLOCK_N, HAS_WINDOW, LISTED, MASK_ROWS, MAY_CUT,
                True, ROW_ENTROPY, BLOCK_ENTROPY, TILE_ENTROPY, HAS_OUT, DESCRIPTORS, PRECISION,
            )  # fmt: skip
        if not HAS_WINDOW:
            grad_key, grad_value = _visit_queries(
                grad_key, grad_value, key, value, keys, batch, head, query_base, grad_base,
                statistics_source, key_base, terms, query_strides[2], query_strides[3],
                grad_out_strides[2], grad_out_strides[3], key_strides[2], key_strides[3],
                term_stride.to(tl.int64), list_pointer, clear, last, count, statistics_row,
                q_len, kv_end, kv_len, padded_len, diagonal, window, scale * LOG2_E, HEAD_DIM,
                BLOCK_D, BLOCK_Q, BLOCK_K, BLOCK_M, BLOCK_N, HAS_WINDOW, LISTED, MASK_ROWS, MAY_CUT,
                False, ROW_ENTROPY, BLOCK_ENTROPY, TILE_ENTROPY, HAS_OUT, DESCRIPTORS, PRECISION,
            )  # fmt: skip

    # Padding keys were treated like the others up to here; their gradient is 0.
    valid = (keys < kv_end)[:, None]
    grad_offsets = tile_offsets(keys, grad_key_strides[2], BLOCK_D, grad_key_strides[3])
    grad_key_base = head_base(
        grad_key_ptr, batch, kv_head, grad_key_strides[0], grad_key_strides[1]
    )
    grad_key = tl.where(valid, grad_key * scale, 0.0)
    store_tile(grad_key_base + grad_offsets, grad_key, keys, kv_len, HEAD_DIM, BLOCK_D)
    if HAS_OUT:
        grad_value_base = head_base(
            grad_value_ptr, batch, kv_head, grad_key_strides[0], grad_key_strides[1]
        )
        grad_value = tl.where(valid, grad_value, 0.0)
        store_tile(grad_value_base + grad_offsets, grad_value, keys, kv_len, HEAD_DIM, BLOCK_D)


@triton.jit
def _visit_keys(
    grad_query, query, grad, lse, delta, grad_row, grad_block, terms, positions, batch, kv_head,
    key_base, value_base, stride_kn, stride_kd, stride_vn, stride_vd,
    list_pointer, first, last, count, kv_end, kv_len, window, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr,
    MASKED: tl.constexpr, ROW_ENTROPY: tl.constexpr, BLOCK_ENTROPY: tl.constexpr,
    TILE_ENTROPY: tl.constexpr, HAS_OUT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the key blocks in slots [first, last) of a row's list to dQ.

    ``terms`` points to g_AB of the block of queries and of the key block in slot 0.
    DESCRIPTORS: ``key_base`` and ``value_base`` are descriptors of the whole tensors.
    """
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    if not DESCRIPTORS:
        key_offsets = tile_offsets(lane, stride_kn, BLOCK_D, stride_kd)  # (N, D)
        if HAS_OUT:
            value_offsets = tile_offsets(lane, stride_vn, BLOCK_D, stride_vd)  # (N, D)
    next_start = block_start(list_pointer, first, count, LISTED, BLOCK_K)
    for step in range(first * STEPS, last * STEPS):
        start = next_start + (step % STEPS) * BLOCK_N
        keys = start + lane  # (N,)
        next_start = block_start(list_pointer, (step + 1) // STEPS, count, LISTED, BLOCK_K)
        if DESCRIPTORS:
            key = load_box(key_base, batch, kv_head, start, BLOCK_N, BLOCK_D)  # (N, D)
        else:
            key_pointers = key_base + start.to(tl.int64) * stride_kn + key_offsets
            key = load_tile(key_pointers, keys, kv_len, HEAD_DIM, BLOCK_D, MASKED)  # (N, D)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (M, N)
        raw_scores = scores
        if MASKED:
            scores = visible_scores(scores, positions, keys, kv_end, window, IS_CAUSAL, HAS_WINDOW)
        p = tl.exp2(scores * scale_log2 - lse[:, None])  # (M, N)
        if HAS_OUT:
            if DESCRIPTORS:
                value = load_box(value_base, batch, kv_head, start, BLOCK_N, BLOCK_D)  # (N, D)
            else:
                value_pointers = value_base + start.to(tl.int64) * stride_vn + value_offsets
                value = load_tile(value_pointers, keys, kv_len, HEAD_DIM, BLOCK_D, MASKED)  # (N, D)
        subtract = delta
        if BLOCK_ENTROPY:
            block = start - (step % STEPS) * BLOCK_N
            subtract += grad_block * log_mass_of_block(
                p, query, lse, positions, batch, kv_head, key_base, stride_kn, stride_kd, block,
                step, kv_end, kv_len, window, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N,
                IS_CAUSAL, HAS_WINDOW, MASKED, DESCRIPTORS, PRECISION,
            )  # fmt: skip
        if TILE_ENTROPY:
            subtract -= tl.load(terms + step // STEPS)
        if ROW_ENTROPY:
            grad_p = -subtract[:, None] - grad_row[:, None] * raw_scores
            if HAS_OUT:
                grad_p = tl.dot(grad, tl.trans(value), grad_p, input_precision=PRECISION)  # (M, N)
            grad_scores = p * grad_p
        elif HAS_OUT:
            grad_p = tl.dot(grad, tl.trans(value), input_precision=PRECISION)  # (M, N)
            grad_scores = p * (grad_p - subtract[:, None])
        else:
            grad_scores = -p * subtract[:, None]
        grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=PRECISION)
    return grad_query


@triton.jit(do_not_specialize=LENGTHS)
def _query_kernel(
    query_ptr, key_source, value_source, grad_out_ptr, statistics_ptr, terms_ptr, grad_query_ptr,
    counts_ptr, indices_ptr, kv_lens_ptr, q_lens_ptr,
    query_strides, key_strides, value_strides, grad_out_strides, grad_query_strides,
    count_stride_b, count_stride_h, count_stride_t, index_stride_b, index_stride_h, index_stride_t,
    heads, group, q_len, kv_len, padded_len, q_tiles, window, scale, terms_a_head, terms_a_row,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr,
    MAY_CUT: tl.constexpr, HAS_KV_LENS: tl.constexpr, HAS_Q_LENS: tl.constexpr,
    ROW_ENTROPY: tl.constexpr, BLOCK_ENTROPY: tl.constexpr, TILE_ENTROPY: tl.constexpr,
    HAS_OUT: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, tile = program_tile(q_tiles, heads, IS_CAUSAL)
    kv_end = valid_length(kv_lens_ptr, batch, kv_len, HAS_KV_LENS)
    q_end = valid_length(q_lens_ptr, batch, q_len, HAS_Q_LENS)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    positions = rows + (kv_end - q_end)
    list_pointer, count, first, full, last = tile_blocks(
        counts_ptr, indices_ptr, batch, head, tile,
        (count_stride_b, count_stride_h, count_stride_t),
        (index_stride_b, index_stride_h, index_stride_t),
        q_end, kv_end, kv_len, window, BLOCK_M, BLOCK_Q, BLOCK_K,
        IS_CAUSAL, HAS_WINDOW, LISTED, MAY_CUT, HAS_Q_LENS,
    )  # fmt: skip

    query_base = head_base(query_ptr, batch, head, query_strides[0], query_strides[1])
    query_pointers = query_base + tile_offsets(rows, query_strides[2], BLOCK_D, query_strides[3])
    query = load_tile(query_pointers, rows, q_len, HEAD_DIM, BLOCK_D, True)  # (M, D)
    grad = query
    if HAS_OUT:
        grad_base = head_base(grad_out_ptr, batch, head, grad_out_strides[0], grad_out_strides[1])
        grad_offsets = tile_offsets(rows, grad_out_strides[2], BLOCK_D, grad_out_strides[3])
        grad = load_tile(grad_base + grad_offsets, rows, q_len, HEAD_DIM, BLOCK_D, True)  # (M, D)
    batch_head = (batch * heads + head).to(tl.int64)
    PER_HEAD: tl.constexpr = 2 + ROW_ENTROPY + BLOCK_ENTROPY
    statistics = statistics_ptr + batch_head * PER_HEAD * padded_len + rows
    lse = tl.load(statistics)
    delta = tl.load(statistics + padded_len)
    grad_row = delta
    grad_block = delta
    if ROW_ENTROPY:
        grad_row = tl.load(statistics + 2 * padded_len)
    if BLOCK_ENTROPY:
        grad_block = tl.load(statistics + (2 + ROW_ENTROPY) * padded_len)
    terms = terms_ptr
    if TILE_ENTROPY:
        terms += batch_head * terms_a_head + (tile * BLOCK_M // BLOCK_Q).to(tl.int64) * terms_a_row
    kv_head = head // group
    if DESCRIPTORS:
        key_base = key_source
        value_base = value_source
    else:
        key_base = head_base(key_source, batch, kv_head, key_strides[0], key_strides[1])
        value_base = key_base
        if HAS_OUT:
            value_base = head_base(value_source, batch, kv_head, value_strides[0], value_strides[1])

    grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad_query = _visit_keys(
        grad_query, query, grad, lse, delta, grad_row, grad_block, terms, positions, batch,
        kv_head, key_base, value_base, key_strides[2], key_strides[3], value_strides[2],
        value_strides[3], list_pointer, first, full, count, kv_end, kv_len, window,
        scale * LOG2_E, HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, IS_CAUSAL, HAS_WINDOW, LISTED,
        False, ROW_ENTROPY, BLOCK_ENTROPY, TILE_ENTROPY, HAS_OUT, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    if IS_CAUSAL or HAS_WINDOW or MAY_CUT:
        grad_query = _visit_keys(
            grad_query, query, grad, lse, delta, grad_row, grad_block, terms, positions, batch,
            kv_head, key_base, value_base, key_strides[2], key_strides[3], value_strides[2],
            value_strides[3], list_pointer, full, last, count, kv_end, kv_len, window,
            scale * LOG2_E, HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, IS_CAUSAL, HAS_WINDOW, LISTED,
            True, ROW_ENTROPY, BLOCK_ENTROPY, TILE_ENTROPY, HAS_OUT, DESCRIPTORS, PRECISION,
        )  # fmt: skip
    grad_query_base = head_base(
        grad_query_ptr, batch, head, grad_query_strides[0], grad_query_strides[1]
    )
    grad_query_pointers = grad_query_base + tile_offsets(
        rows, grad_query_strides[2], BLOCK_D, grad_query_strides[3]
    )
    store_tile(grad_query_pointers, grad_query * scale, rows, q_len, HEAD_DIM, BLOCK_D)


def block_sparse_backward(
    grad_out: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    statistics: Tensor,
    terms: tuple[Tensor, Tensor] | None,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    columns: tuple[Tensor, Tensor] | None,
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    scale: float,
    row_entropy: bool = False,
    block_entropy: bool = False,
    config: BackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels.

    Args:
        grad_out: None where only entropies have gradients; values are not read then.
        statistics: (B, Hq, R, padded Nq) fp32 of `kernels/backward_statistics.py`; row_entropy and
            block_entropy say which rows it has besides lse and delta.
        terms: g_AB of the tile entropies, contiguous fp32, in the order of the lists (B, Hq, Mq, W)
            and in that of ``columns`` (B, Hq, Mq * W); without lists both are (B, Hq, Mq, Mk).
        columns: the transposed lists in CSR form, offsets (B|1, H|1, Mk + 1) and rows
            (B|1, H|1, Mq * W), ascending in each column; None where every block is visited.

    Returns:
        dQ, dK, dV, contiguous, in the dtype of the inputs; dV is 0 without grad_out, and empty
        without values.
    """
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    value_shape = (0,) if value is None else value.shape
    make_value = torch.zeros if grad_out is None else torch.empty
    grad_value = make_value(value_shape, dtype=key.dtype, device=key.device)
    if query.numel() == 0 or key.numel() == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()

    row_terms, column_terms = terms if terms is not None else (None, None)
    counts, indices = adjacent_lists(kv_num_blocks, kv_indices)
    offsets, rows = adjacent_lists(*columns) if columns is not None else (None, None)
    visit_queries, visit_keys = _plan_backward(
        grad_out, query, key, value, statistics, row_terms, column_terms, counts, indices,
        kv_lens, q_lens, offsets, rows, grad_query.stride(), grad_key.stride(), block_size,
        is_causal, window, scale, row_entropy, block_entropy, config,
        architecture(query.device), dot_precision(query.dtype),
    )  # fmt: skip
    visit_queries(
        query, key, value, grad_out, statistics, column_terms, grad_key, grad_value,
        offsets, rows, kv_lens, q_lens,
    )  # fmt: skip
    visit_keys(
        query, key, value, grad_out, statistics, row_terms, grad_query,
        counts, indices, kv_lens, q_lens,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


@planned
def _plan_backward(
    grad_out: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    statistics: Tensor,
    row_terms: Tensor | None,
    column_terms: Tensor | None,
    counts: Tensor | None,
    indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    offsets: Tensor | None,
    rows: Tensor | None,
    grad_query_strides: tuple[int, ...],
    grad_key_strides: tuple[int, ...],
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    scale: float,
    row_entropy: bool,
    block_entropy: bool,
    config: BackwardConfig | None,
    arch: str,
    precision: str,
) -> tuple[Launch, Launch]:
    """The launches for dK and dV, and for dQ."""
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    given = [query, key] if grad_out is None else [query, key, value, grad_out]
    config = config or backward_config(
        arch,
        head_dim,
        query.element_size(),
        block_size,
        is_causal,
        has_copy_engine(arch, *given),
        block_entropy,
    )
    padded_len = statistics.shape[-1]
    terms_a_row = 0 if row_terms is None else row_terms.shape[-1]
    terms_a_head = ceil_div(q_len, block_size[0]) * terms_a_row
    may_cut = kv_lens is not None or kv_len % block_size[1] != 0
    shared = dict(
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_Q=block_size[0],
        BLOCK_K=block_size[1],
        IS_CAUSAL=is_causal,
        HAS_WINDOW=window > 0,
        LISTED=indices is not None,
        HAS_KV_LENS=kv_lens is not None,
        HAS_Q_LENS=q_lens is not None,
        ROW_ENTROPY=row_entropy,
        BLOCK_ENTROPY=block_entropy,
        TILE_ENTROPY=row_terms is not None,
        HAS_OUT=grad_out is not None,
        DESCRIPTORS=config.descriptors,
        PRECISION=precision,
    )
    # Without grad_out the last two are not read.
    strides = tuple(t.stride() for t in (given * 2)[:4])
    # What the steps of the dK, dV kernel and those of the dQ kernel fetch.
    query_side: dict[int, Any] = {}
    key_side: dict[int, Any] = {}
    if config.descriptors:
        query_side = {
            0: tile_descriptor(query, config.key_block_m),
            4: row_descriptor(statistics, config.key_block_m),
        }
        key_side = {1: tile_descriptor(key, config.query_block_n)}
        if grad_out is not None and value is not None:
            query_side[3] = tile_descriptor(grad_out, config.key_block_m)
            key_side[2] = tile_descriptor(value, config.query_block_n)
    kv_tiles = ceil_div(kv_len, config.key_block_n)
    q_tiles = ceil_div(q_len, config.query_block_m)
    visit_queries = Launch(
        _key_value_kernel, (kv_tiles * batch * kv_heads,),
        (
            *strides, grad_key_strides, *list_strides(offsets, rows),
            heads, kv_heads, q_len, kv_len, padded_len, kv_tiles, window, scale, terms_a_head,
            1 if indices is not None else terms_a_row,
        ),
        described=query_side,
        BLOCK_M=config.key_block_m, BLOCK_N=config.key_block_n, GROUP=heads // kv_heads,
        MASK_ROWS=q_len % block_size[0] != 0, MAY_CUT=block_entropy and may_cut,
        num_warps=config.key_warps, num_stages=config.key_stages, **shared,
    )  # fmt: skip
    visit_keys = Launch(
        _query_kernel, (q_tiles * batch * heads,),
        (
            *strides, grad_query_strides, *list_strides(counts, indices),
            heads, heads // kv_heads, q_len, kv_len, padded_len, q_tiles, window, scale,
            terms_a_head, terms_a_row,
        ),
        described=key_side,
        BLOCK_M=config.query_block_m, BLOCK_N=config.query_block_n, MAY_CUT=may_cut,
        num_warps=config.query_warps, num_stages=config.query_stages, **shared,
    )  # fmt: skip
    return visit_queries, visit_keys
