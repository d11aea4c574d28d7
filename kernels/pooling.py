"""Groups of tokens as one row each: means, and the boxes around groups of keys.

    mean       of the group's valid tokens.
    envelope   c = (max + min) / 2 and r = |max - min| / 2 with the maximum and minimum of each
               channel over the group's valid keys: all of them lie within r of c.
Both are one pass over queries and keys, and one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import ceil_div, padded_head_dim
from entropy_attn.kernels.plans import Launch, planned
from entropy_attn.kernels.primitives import (
    head_base,
    load_tile,
    store_tile,
    tile_offsets,
    valid_length,
)

# Arguments that vary from call to call: a new length must not compile the kernel again.
LENGTHS = ("q_len", "kv_len", "q_groups", "kv_groups", "query_programs")
# Loads of a loop that are issued together.
UNROLL = 8


@triton.jit
def _groups_of_program(
    tokens_ptr, out_ptr, lens_ptr, strides, heads, length, groups, program,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_LENS: tl.constexpr,
):  # fmt: skip
    """The head's tokens, where its groups go, the program's groups (M,), the end of the tokens."""
    chunks = tl.cdiv(groups, ROWS)
    batch_head = program // chunks
    batch = batch_head // heads
    end = valid_length(lens_ptr, batch, length, HAS_LENS)
    rows = (program % chunks) * ROWS + tl.arange(0, ROWS)
    base = head_base(tokens_ptr, batch, batch_head % heads, strides[0], strides[1])
    return base, out_ptr + batch_head.to(tl.int64) * groups * HEAD_DIM, rows, end


@triton.jit
def _mean_of_groups(
    tokens_ptr, means_ptr, lens_ptr, strides, heads, length, groups, program,
    POOL: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Means of ROWS groups of one head; a group without a valid token has mean 0."""
    base, out, rows, end = _groups_of_program(
        tokens_ptr, means_ptr, lens_ptr, strides, heads, length, groups, program,
        ROWS, HEAD_DIM, HAS_LENS,
    )  # fmt: skip
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, POOL, STEP):
        for t in tl.static_range(STEP):
            token = rows * POOL + start + t
            pointers = base + tile_offsets(token, strides[2], BLOCK_D, strides[3])
            total += load_tile(pointers, token, end, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    count = tl.minimum(tl.maximum(end - rows * POOL, 1), POOL)
    mean = total / count.to(tl.float32)[:, None]
    store_tile(
        out + tile_offsets(rows, HEAD_DIM, BLOCK_D, 1), mean, rows, groups, HEAD_DIM, BLOCK_D
    )


@triton.jit
def _envelope_of_groups(
    tokens_ptr, centres_ptr, spreads_ptr, lens_ptr, strides, heads, length, groups, program,
    spread,
    POOL: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Middle of the box around each group, and ``spread`` times the length of its half diagonal;
    a group without a valid token has 0 and 0."""
    base, out, rows, end = _groups_of_program(
        tokens_ptr, centres_ptr, lens_ptr, strides, heads, length, groups, program,
        ROWS, HEAD_DIM, HAS_LENS,
    )  # fmt: skip
    # Tokens past the end are read as the last valid one.
    final = tl.minimum(rows * POOL + POOL, end) - 1
    low = tl.full([ROWS, BLOCK_D], float("inf"), tl.float32)
    high = tl.full([ROWS, BLOCK_D], float("-inf"), tl.float32)
    for start in range(0, POOL, STEP):
        for t in tl.static_range(STEP):
            token = tl.minimum(rows * POOL + start + t, final)
            pointers = base + tile_offsets(token, strides[2], BLOCK_D, strides[3])
            inside = tl.where(rows * POOL < end, token, end)
            tile = load_tile(pointers, inside, end, HEAD_DIM, BLOCK_D, True).to(tl.float32)
            low = tl.minimum(low, tile, propagate_nan=tl.PropagateNan.ALL)
            high = tl.maximum(high, tile, propagate_nan=tl.PropagateNan.ALL)
    centre = (low + high) * 0.5
    store_tile(
        out + tile_offsets(rows, HEAD_DIM, BLOCK_D, 1), centre, rows, groups, HEAD_DIM, BLOCK_D
    )
    half = (high - low) * 0.5
    radius = tl.sqrt(tl.sum(half * half, 1))
    batch_head = (program // tl.cdiv(groups, ROWS)).to(tl.int64)
    tl.store(spreads_ptr + batch_head * groups + rows, radius * spread, mask=rows < groups)


@triton.jit(do_not_specialize=LENGTHS)
def _pool_kernel(
    query_ptr, key_ptr, query_out_ptr, key_out_ptr, spreads_ptr, q_lens_ptr, kv_lens_ptr,
    query_strides, key_strides, q_heads, kv_heads, q_len, kv_len, q_groups, kv_groups,
    query_programs, spread,
    POOL: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_Q_LENS: tl.constexpr, HAS_KV_LENS: tl.constexpr, ENVELOPE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < query_programs:
        _mean_of_groups(
            query_ptr, query_out_ptr, q_lens_ptr, query_strides, q_heads, q_len, q_groups,
            program, POOL, ROWS, HEAD_DIM, BLOCK_D, HAS_Q_LENS, STEP,
        )  # fmt: skip
    else:
        if ENVELOPE:
            _envelope_of_groups(
                key_ptr, key_out_ptr, spreads_ptr, kv_lens_ptr, key_strides, kv_heads, kv_len,
                kv_groups, program - query_programs, spread, POOL, ROWS, HEAD_DIM, BLOCK_D,
                HAS_KV_LENS, STEP,
            )  # fmt: skip
        else:
            _mean_of_groups(
                key_ptr, key_out_ptr, kv_lens_ptr, key_strides, kv_heads, kv_len, kv_groups,
                program - query_programs, POOL, ROWS, HEAD_DIM, BLOCK_D, HAS_KV_LENS, STEP,
            )  # fmt: skip


def pool_tokens(
    query: Tensor, key: Tensor, q_lens: Tensor | None, kv_lens: Tensor | None, pool: int
) -> tuple[Tensor, Tensor]:
    """Means of groups of ``pool`` valid tokens, in one launch.

    Returns:
        (B, Hq, ceil(Nq / pool), D) and (B, Hkv, ceil(Nk / pool), D), contiguous, in the dtype of
        the inputs; means are taken in fp32.
    """
    query_means, key_means, _ = _pool(query, key, q_lens, kv_lens, pool, None)
    return query_means, key_means


def envelope_tokens(
    query: Tensor,
    key: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    pool: int,
    spread: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of groups of queries, middles and spreads of groups of keys, in one launch.

    Returns:
        As `pool_tokens`, and (B, Hkv, ceil(Nk / pool)) fp32: ``spread`` times the length of the
        half diagonal of the box around each group.
    """
    return _pool(query, key, q_lens, kv_lens, pool, spread)


def _pool(
    query: Tensor,
    key: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    pool: int,
    spread: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, device = query.dtype, query.device
    batch, q_heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    q_shape = (batch, q_heads, ceil_div(q_len, pool), head_dim)
    kv_shape = (batch, kv_heads, ceil_div(kv_len, pool), head_dim)
    query_out = torch.empty(q_shape, dtype=dtype, device=device)
    key_out = torch.empty(kv_shape, dtype=dtype, device=device)
    shape = (0,) if spread is None else kv_shape[:3]
    spreads = torch.empty(shape, dtype=torch.float32, device=device)
    if query_out.numel() or key_out.numel():
        launch = plan_pooling(query, key, q_lens, kv_lens, pool, spread)
        launch(query, key, query_out, key_out, spreads, q_lens, kv_lens)
    return query_out, key_out, spreads


@planned
def plan_pooling(
    query: Tensor,
    key: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    pool: int,
    spread: float | None,
) -> Launch:
    batch, q_heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    q_groups, kv_groups = ceil_div(q_len, pool), ceil_div(kv_len, pool)
    block_d = padded_head_dim(head_dim)
    rows = max(1, 4096 // (block_d * query.element_size()))  # 32 bytes a thread and token
    query_programs = batch * q_heads * ceil_div(q_groups, rows)
    programs = query_programs + batch * kv_heads * ceil_div(kv_groups, rows)
    return Launch(
        _pool_kernel, (programs,),
        (
            query.stride(), key.stride(), q_heads, kv_heads, q_len, kv_len, q_groups, kv_groups,
            query_programs, spread or 0.0,
        ),
        POOL=pool, ROWS=rows, HEAD_DIM=head_dim, BLOCK_D=block_d,
        HAS_Q_LENS=q_lens is not None, HAS_KV_LENS=kv_lens is not None,
        ENVELOPE=spread is not None, STEP=min(UNROLL, pool), num_warps=4,
    )  # fmt: skip
